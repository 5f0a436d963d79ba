"""Every setting, once: its name, default, bounds and help (the docstring under it).

A recipe is a YAML file with the sections below; `--set section.key=value` goes through the same models. Unknown keys
are refused with the nearest valid one. Precedence: command line, recipe file, default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from lora_gpt2.core.errors import RecipeError
from lora_gpt2.core.printable import shorten, show_value
from lora_gpt2.core.section import Section
from lora_gpt2.core.suggest import suggest

Target = Literal["c_attn", "c_attn.q", "c_attn.k", "c_attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head"]
BLOCKS: tuple[Target, ...] = ("c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
MergeMethod = Literal["cat", "linear", "svd", "task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Share = Annotated[float, Field(ge=0.0, le=0.5)]
Positive = Annotated[int, Field(gt=0)]
Sources = tuple[Annotated[str, Field(min_length=1)], ...]
Format = Literal["auto", "text", "html", "json", "jsonl", "csv", "tsv", "parquet"]


class DataSettings(Section):
    """Where the text is and how it becomes blocks of tokens."""

    sources: Sources = ()
    """Text of the domain: files (.txt .md .html .json .jsonl .csv .tsv .parquet, also .gz), folders, globs, - for stdin, hf:NAME for a data set of the hub."""  # noqa: E501
    validation: Sources = ()
    """Files to validate on; without them a share of the sources is held out."""
    test: Sources = ()
    """Files kept for the final measurement; without them a share of the sources is held out."""
    format: Format = "auto"
    """What the sources are; auto goes by the file's name, and looks into stdin."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """What one document of a text file is; lines of <|endoftext|> always separate documents."""
    encoding: str = "auto"
    """Encoding of text files; auto finds UTF-8, UTF-16, what an HTML page declares, and Windows-1252 by evidence."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not valid text: stop with file:offset, or replace them by U+FFFD."""
    text_field: str = "text"
    """Field or column that holds the document; dots lead into nested fields, and into each item of a list."""
    header: bool = True
    """The first row of a table (.csv, .tsv) names its columns; false: it is a record, and columns are 1, 2, 3, …"""
    template: str = ""
    """Builds the document of several fields, such as "Q: {question}\\nA: {answer}"; item_template shows lists."""
    item_template: str = "{role}: {content}"
    """Builds a line of each item of a list that a template names, such as the messages of a chat."""
    prompt: str = ""
    """Template of what precedes the document and carries no loss, such as "Question: {question}\\nAnswer:"."""
    separator: str = ""
    """Text documents begin with a prompt, which carries no loss, up to the first occurrence of this."""
    special_tokens: bool = False
    """Special tokens that were added to the base are read as tokens in training text; else they are its characters."""
    skip_bad: bool = False
    """Set aside what cannot be read, with its place and the reason, instead of stopping."""
    dataset_config: str = ""
    """Configuration of a data set of the hub."""
    dataset_split: str = "train"
    """Split of a data set of the hub, or of a saved one that has several."""
    max_documents: Annotated[int, Field(ge=0)] = 0
    """Read at most so many documents; 0 reads all."""
    profile: Literal["prose", "code", "raw"] = "prose"
    """Which cleaning rules are on: prose (what running text needs), code (touches no spaces), raw (none)."""
    rules: dict[str, bool | str] = {}
    """Rules that differ from the profile: true, false or a mode, such as {urls: mask, personal: mask, emoji: drop}."""
    min_characters: Annotated[int, Field(ge=0)] = 0
    """Reject documents that are shorter."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.97
    """Reject documents of which compression (DEFLATE) saves a larger share, such as one line repeated; 1 is off."""
    languages: tuple[str, ...] = ()
    """Reject documents in other languages than these (ISO 639-1, such as en), as py3langid finds them."""
    near_duplicates: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Drop documents that share this part of their 5-word sequences with an earlier one (Jaccard); 0 is off."""
    layout: Literal["concat", "packed"] = "concat"
    """Blocks: documents joined by EOS and cut anywhere (concat), or whole documents that do not see each other (packed)."""  # noqa: E501
    processes: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that clean and tokenise; 0 takes one for each core when there is enough text."""
    block_size: Annotated[int, Field(ge=16, le=1024)] = 512
    """Tokens per block; at most the base's context."""
    validation_share: Share = 0.05
    """Share of documents held out for validation, by hash of their content."""
    test_share: Share = 0.05
    """Share of documents held out for testing, by hash of their content."""


class LoraSettings(Section):
    """Shape and scale of the adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of each update; that of lm_head, where it is a target, is twice as large, and so is its alpha."""
    alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    """Updates are scaled by alpha / rank (alpha / sqrt(rank) with rslora); unset, alpha is twice the rank (8)."""
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = BLOCKS
    """Projections to adapt; c_attn.q, c_attn.k and c_attn.v adapt slices of c_attn, lm_head the tied head too (PEFT has trouble with that)."""  # noqa: E501
    ranks: dict[Target, Annotated[int, Field(ge=1, le=512)]] = {}
    """Ranks of single targets where they differ from `rank`."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    first_layer: Annotated[int, Field(ge=0, le=1023)] = 0
    """First block to adapt; those below it then need no backward pass."""

    @model_validator(mode="after")
    def _check_targets(self) -> LoraSettings:
        slices = [t for t in self.targets if t.startswith("c_attn.")]
        if slices and "c_attn" in self.targets:
            raise ValueError(f"targets name c_attn and its slice {slices[0]}; name one or the other")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets name the same projection twice")
        if missing := sorted(set(self.ranks) - set(self.targets)):
            raise ValueError(f"ranks name {missing[0]}, which is not among the targets")
        if len({self.rank_of(t) for t in slices}) > 1:
            raise ValueError("the slices of c_attn share one rank; give them the same in ranks")
        return self

    def alpha_of(self, target: Target) -> float:
        """Returns the alpha of one target; the head, where it has its twofold rank, is scaled like the others."""
        if self.alpha is None and not self.rslora:
            return 2.0 * self.rank_of(target)
        grown = 1 if target in self.ranks else self.rank_of(target) / self.rank
        return (self.alpha or 8.0) * (math.sqrt(grown) if self.rslora else grown)

    def rank_of(self, target: Target) -> int:
        """Returns the rank of one target."""
        return self.ranks.get(target, self.rank * (2 if target == "lm_head" else 1))


class TrainSettings(Section):
    """The training loop."""

    steps: Positive | None = None
    """Optimizer steps; overrides epochs."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    """Passes over the training blocks, when steps is not given."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of AdamW; unset, it is 0.576 over the base's width: 7.5e-4 for gpt2, 3.6e-4 for gpt2-xl."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354, suggests 16); 1 is off."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after warm-up: falls to a tenth (cosine), to zero (linear), stays, or stays and falls (wsd)."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps over which wsd falls linearly to zero (arXiv:2404.06395)."""
    warmup_share: Share = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    batch_tokens: Positive = 4096
    """Tokens per optimizer step and adapter, rounded down to whole blocks."""
    micro_batch_tokens: Positive = 4096
    """Tokens per forward pass over all adapters; the batch is accumulated from passes of this size."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of an adapter's gradient; 0 switches clipping off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's weight spread over the vocabulary (Szegedy et al. 2015); losses shown are without it."""
    neftune_alpha: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Noise on the token embeddings while training, 5 to 15 (NEFTune, Jain et al. 2023, arXiv:2310.05914); 0 is off."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block and compute the block again: less memory, about a quarter slower."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0 chooses a tenth of the run."""
    validation_tokens: Positive = 16384
    """Most tokens of a validation during the run, less in short runs; the one at the end uses all of them."""
    keep_best: bool = True
    """Publish the weights with the best validation instead of the last ones."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many validations in a row without a new best; 0 never stops early."""
    sample_tokens: Annotated[int, Field(ge=0, le=512)] = 32
    """Tokens of the sample that each validation writes for the report; 0 writes none."""
    sample_prompt: str = ""
    """Prompt of these samples; without one, the beginning of the validation text."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Also log to these, through accelerate."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 keeps one only when the run is interrupted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, data order, dropout and noise."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of the frozen base; auto: what the device computes fastest, or on a CPU $LORA_GPT2_CPU_DTYPE."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the base's projections in 8 or 4 bits: less memory, a little slower, a slightly different base."""

    def rate_for(self, width: int) -> float:
        """Returns the peak learning rate for a base's width, as it falls in Yang et al. 2022 (arXiv:2203.03466)."""
        return self.learning_rate or 0.576 / width

    def count_epochs(self, tokens: int) -> float:
        """Returns how often the steps pass over so many tokens."""
        return self.steps * self.batch_tokens / max(1, tokens) if self.steps else self.epochs


class EvaluateSettings(Section):
    """How perplexity is measured."""

    window: Annotated[int, Field(ge=0, le=1024)] = 0
    """Tokens a prediction may see; 0 takes the base's context."""
    stride: Annotated[int, Field(ge=0, le=1024)] = 0
    """New tokens scored per window; 0 takes half the window."""
    protocol: Literal["document", "stream"] = "document"
    """document: each on its own, after EOS; stream: one sequence, as in Hugging Face's documentation."""
    batch_tokens: Positive = 8192
    """Tokens per forward pass."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Numbers of the base while measuring."""


class GenerateSettings(Section):
    """How text is continued."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 150
    """Most tokens to add."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.7
    """Divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Keep the smallest set of tokens with this probability; 1 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest (Nguyen et al. 2024, arXiv:2407.01082); 0 is off."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Divides positive logits of tokens already seen, multiplies negative ones; 1 is off."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logit of each token that the continuation already has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logit of a token once for each time the continuation has it."""
    no_repeat_ngram: Annotated[int, Field(ge=0, le=64)] = 0
    """Never write a run of so many tokens a second time; 0 is off."""
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Added to the logits of these token ids."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=16)] = ()
    """Texts that end a continuation; they are not part of it."""
    beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Search the likeliest whole continuation with so many beams, instead of sampling; 1 is off."""
    length_penalty: Annotated[float, Field(ge=-5, le=5)] = 1.0
    """Beams are compared by log-probability over length to this power."""
    merged: bool = False
    """Write the adapter or mix into a copy of the weights first: tokens come faster, from more memory."""
    watermark: bool = False
    """Mark sampled text invisibly, so that `audit watermark` finds it (Kirchenbauer et al. 2023, arXiv:2301.10226)."""
    watermark_key: Annotated[int, Field(ge=0, lt=2**63)] = 15485863
    """Who knows this number can find the mark, and remove it."""
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Also give the log-probability of each token and of so many of the likeliest; 0 is off."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of the base while generating; on a CPU float16 is that of the weights alone, which are read faster."""

    @model_validator(mode="after")
    def _check_temperature(self) -> GenerateSettings:
        if 0 < self.temperature < 1e-3:
            raise ValueError("temperature is 0 (greedy) or at least 0.001")
        if self.beams > 1 and self.logprobs:
            raise ValueError("logprobs are not given for beams")
        if self.beams > 1 and self.watermark:
            raise ValueError("beams are not watermarked")
        return self


class MergeSettings(Section):
    """How adapters are combined, or written into the base."""

    method: MergeMethod = "cat"
    """Weighted sum kept exactly (cat, task_arithmetic) or cut to a rank (svd; linear also divides by the weights' sum); or of pruned updates (magnitude_prune, dare_linear), or their mean where signs agree (ties, dare_ties)."""  # noqa: E501
    rank: Annotated[int, Field(ge=0, le=4096)] = 0
    """Rank of the result; 0: exact for cat and task_arithmetic, the parents' largest for linear and svd, their sum for the others."""  # noqa: E501
    max_error: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Instead of a rank: the smallest one whose relative error at each projection is at most this; 0 is off."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of an update's entries that pruning keeps (ties, magnitude_prune: the largest; dare: drawn by chance)."""
    seed: int = 0
    """Seed of the drawing."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of a merged base; auto is as the base is stored."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 2_000_000_000
    """Largest weight file of a merged base."""
    gguf: bool = False
    """Also write a merged base as GGUF, for llama.cpp (needs the package gguf)."""
    search_steps: Annotated[int, Field(ge=4, le=10_000)] = 40
    """Most mixes that --search measures."""
    search_tokens: Annotated[int, Field(ge=64)] = 8192
    """Tokens of each text that --search measures a mix on."""

    @model_validator(mode="after")
    def _check_rank(self) -> MergeSettings:
        if self.rank and self.max_error:
            raise ValueError("rank and max_error exclude each other")
        return self


class ServeSettings(Section):
    """What a server takes on, and how long it waits for a slow client."""

    max_rows: Annotated[int, Field(ge=1, le=1024)] = 16
    """Continuations that grow at the same time."""
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = 64
    """Continuations that may wait; beyond, a request is answered 429 with Retry-After."""
    max_choices: Annotated[int, Field(ge=1, le=1024)] = 16
    """Most continuations of one request: prompts times n."""
    max_slots: Annotated[int, Field(ge=1, le=4096)] = 64
    """Adapters kept loaded; the least recently used makes room."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 1_000_000
    """Largest body of a request."""
    header_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """A client that has not sent its headers by then is let go."""
    body_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """A client that has not sent its body by then is answered 408."""
    send_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """A client that takes nothing for so long is let go."""
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """After SIGTERM, what has begun may go on for so long."""


class Recipe(Section):
    """One adapter: its base, its text, and every setting."""

    name: str = ""
    """Name of the adapter in the store."""
    description: str = ""
    """A line for people: what the adapter is for."""
    license: str = ""
    """Licence of the text, for the card, such as CC-BY-4.0."""
    base: str = "nano"
    """The frozen model: nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a hub id or a folder."""
    data: DataSettings = DataSettings()
    """Where the text is and how it becomes blocks."""
    lora: LoraSettings = LoraSettings()
    """Shape and scale of the adapter."""
    train: TrainSettings = TrainSettings()
    """The training loop."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """How perplexity is measured."""
    generate: GenerateSettings = GenerateSettings()
    """How text is continued."""
    merge: MergeSettings = MergeSettings()
    """How adapters are combined."""
    serve: ServeSettings = ServeSettings()
    """Limits of the server."""


SECTIONS = ("data", "lora", "train", "evaluate", "generate", "merge", "serve")


def list_keys() -> list[str]:
    """Returns every key that a recipe file or `--set` may name, dotted."""
    keys = [name for name in Recipe.model_fields if name not in SECTIONS]
    for section in SECTIONS:
        model = Recipe.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        keys += [f"{section}.{name}" for name in model.model_fields]
    return keys


def build_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Returns the validated recipe; raises `RecipeError` that names `where`, the key, and the nearest valid key."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = shorten(".".join(str(part) for part in first["loc"] if not isinstance(part, int)))
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: there is no setting '{key}'", suggest(key, list_keys())) from error
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Section | Mapping) else f", found {show_value(first['input'])}"
        raise RecipeError(f"{where}: {key or 'recipe'}: {reason}{given}", describe_key(key)) from error


def _find_field(key: str) -> FieldInfo | None:
    model: type[BaseModel] = Recipe
    field = None
    for part in key.split("."):
        field = model.model_fields.get(part)
        if field is None:
            return None
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return field


def describe_key(key: str) -> str:
    """Returns the help text of a dotted key as a hint."""
    return f"{key}: {field.description}" if (field := _find_field(key)) else "see 'lora-gpt2 recipes show'"


def is_text(key: str) -> bool:
    """True if the setting is a free text."""
    field = _find_field(key)
    return field is not None and field.annotation is str
