"""Every setting, once: its name, default, bounds and help (the docstring under it).

A recipe is a YAML file with the sections below; `--set section.key=value` goes through the same models. Unknown keys
are refused with the nearest valid one. Precedence: command line, recipe file, default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from lora_gpt2.core.errors import RecipeError
from lora_gpt2.core.printable import shorten, show_value
from lora_gpt2.core.section import Section
from lora_gpt2.core.suggest import suggest
from lora_gpt2.core.synonyms import explain_setting
from lora_gpt2.recipe.training import (
    BLOCKS,
    Fraction,
    LoraSettings,
    Positive,
    PreferenceSettings,
    Sources,
    Target,
    TrainSettings,
    TuneSettings,
)
from lora_gpt2.renamed_settings import REMOVED, RENAMED

__all__ = ["BLOCKS", "LoraSettings", "PreferenceSettings", "Target", "TrainSettings", "TuneSettings"]
"""What is imported from here and defined in `recipe/training.py`."""
MergeMethod = Literal["cat", "linear", "svd", "task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Format = Literal["auto", "text", "html", "json", "jsonl", "csv", "tsv", "parquet"]


class DataSettings(Section):
    """The text and how it becomes blocks of tokens."""

    sources: Sources = ()
    """Text of the domain: files (text, Markdown, HTML, JSON, CSV, Parquet, PDF, DOCX, source code, ..., also .gz, .zip, .tar), folders, globs, - for stdin, hf:NAME for a data set of the hub."""  # noqa: E501
    validation: Sources = ()
    """Files to validate on; without them a fraction of the sources is held out."""
    test: Sources = ()
    """Files for the final evaluation; without them a fraction of the sources is held out."""
    format: Format = "auto"
    """Format of the sources; auto goes by file name, and detects the format of stdin."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """Unit of a text file that is one document; lines of <|endoftext|> always separate documents."""
    encoding: str = "auto"
    """Encoding of text files; auto detects UTF-8, UTF-16, the charset an HTML page declares, and Windows-1252."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Handling of invalid bytes: stop with file:offset (strict), or replace them by U+FFFD."""
    text_field: str = "text"
    """Field or column that holds the document; dots lead into nested fields, and into each item of a list."""
    header: bool = True
    """The first row of a table (.csv, .tsv) names its columns; false: it is a record, and columns are 1, 2, 3, …"""
    template: str = ""
    """Builds a document from several fields, such as "Q: {question}\\nA: {answer}"; lists go through item_template."""
    item_template: str = "{role}: {content}"
    """Formats each item of a list in a template, such as the messages of a chat, on a line of its own."""
    prompt: str = ""
    """Template of a prompt that precedes the document and is masked from the loss, such as "Q: {question}\\nA:"."""
    separator: str = ""
    """Text up to the first occurrence of this separator is the prompt, which is masked from the loss."""
    skip_bad: bool = False
    """Skip records that cannot be read, logging where and why, instead of stopping."""
    dataset_config: str = ""
    """Configuration of a dataset on the hub."""
    dataset_split: str = "train"
    """Split of a dataset on the hub, or of a saved one that has several."""
    max_documents: Annotated[int, Field(ge=0)] = 0
    """Maximum number of documents to read of each split; 0 = all."""
    profile: Literal["prose", "code", "raw"] = "prose"
    """Set of cleaning rules: prose (for running text), code (leaves whitespace alone), raw (none)."""
    rules: dict[str, bool | str] = {}
    """Rules that differ from the profile: true, false or a mode, such as {urls: mask, pii: mask, emoji: drop}."""
    min_characters: Annotated[int, Field(ge=0)] = 0
    """Minimum length of a document in characters; shorter ones are rejected."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.97
    """Reject documents that DEFLATE compresses by more than this fraction, such as one repeated line; 1 = off."""
    languages: tuple[str, ...] = ()
    """Keep only documents in these languages (ISO 639-1, such as en), as identified by py3langid."""
    near_duplicate_threshold: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Drop documents whose Jaccard similarity to an earlier one (over word 5-grams) reaches this; 0 = off."""
    layout: Literal["concat", "packed"] = "concat"
    """concat: documents joined by EOS and cut into blocks anywhere; packed: whole documents per block, with block-diagonal attention."""  # noqa: E501
    num_proc: Annotated[int, Field(ge=0, le=256)] = 0
    """Number of processes for cleaning and tokenizing; 0 = one per core when there is enough text."""
    block_size: Annotated[int, Field(ge=16, le=1024)] = 512
    """Tokens per block; at most the base's n_positions."""
    validation_fraction: Fraction = 0.05
    """Fraction of documents held out for validation, by a hash of their content."""
    test_fraction: Fraction = 0.05
    """Fraction of documents held out for testing, by a hash of their content."""


class EvaluateSettings(Section):
    """How perplexity is measured."""

    window: Annotated[int, Field(ge=0, le=1024)] = 0
    """Context window in tokens; 0 = the base's maximum."""
    stride: Annotated[int, Field(ge=0, le=1024)] = 0
    """Stride between windows in tokens; 0 = half the window."""
    protocol: Literal["document", "stream"] = "document"
    """document: each document on its own, conditioned on EOS; stream: all text as one sequence, as in Hugging Face's documentation."""  # noqa: E501
    batch_tokens: Positive = 8192
    """Tokens per forward pass."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of the base's weights during evaluation."""


CONSTRAINTS = ("choice", "regex", "json_schema", "grammar")
"""The settings `generate.*` that constrain decoding, of which at most one is set."""


class GenerateSettings(Section):
    """How text is generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 150
    """Maximum number of new tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.7
    """Sampling temperature; 0 = greedy decoding."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """Sample from the k most likely tokens; 0 = all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling: the smallest set of tokens with this total probability; 1 = all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum probability relative to the most likely token (Nguyen et al. 2024, arXiv:2407.01082); 0 = off."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858); 1 = off."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens that were already generated."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from a token's logit for each time it was already generated."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=64)] = 0
    """Never repeat an n-gram of this size; 0 = off."""
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Bias added to the logits of these token ids."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=32)] = ()
    """Stop strings; the output ends before the first of them."""
    chat_turns: dict[str, str] = {}
    """How chats are written: a template for each role, such as {user: "U: {content}", assistant: "A: {content}"}."""
    choice: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=1000)] = ()
    """Constrained decoding: the output is exactly one of these, such as " yes" and " no"."""
    regex: str = ""
    """Constrained decoding: the output matches this regular expression as a whole."""
    json_schema: dict[str, Any] | None = None
    """Constrained decoding: the output is JSON that this schema accepts; the schema, or a file that holds it."""
    grammar: str = ""
    """Constrained decoding: the output is derived by this context-free grammar, in Lark's syntax or GBNF."""
    constrained: bool = True
    """Obey a constraint: the one that is set here, else that of the recipe an adapter was trained with."""
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of beams for beam search; 1 = sampling."""
    reroute_every: Annotated[int, Field(ge=0, le=1024)] = 0
    """With the adapter `auto`: choose it again each time the text has grown by this many tokens; 0 = once."""
    length_penalty: Annotated[float, Field(ge=-5, le=5)] = 1.0
    """Beam search: scores are log-probabilities divided by length to this power."""
    speculate: bool = True
    """Check several drafted tokens at once where that is faster (packed weights on a CPU); the text is the same."""
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 2**27
    """Memory for the beginnings of prompts, so that those that begin alike are read once; 0 = off."""
    merge_into_base: bool = False
    """Merge the adapter or mix into a copy of the base's weights first: faster decoding, more memory."""
    watermark: bool = False
    """Watermark sampled text, detectable by `audit watermark` (Kirchenbauer et al. 2023, arXiv:2301.10226)."""
    watermark_key: Annotated[int, Field(ge=0, lt=2**63)] = 15485863
    """Secret key of the watermark: whoever has it can detect or remove the mark."""
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Return the log-probabilities of each token and of this many most likely alternatives; 0 = off."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the base's weights; float16 on a CPU stores them and computes in float32: what auto does on x86."""

    @model_validator(mode="after")
    def _check_together(self) -> GenerateSettings:
        if 0 < self.temperature < 1e-3:
            raise ValueError("temperature is 0 (greedy) or at least 0.001")
        if self.num_beams > 1 and self.logprobs:
            raise ValueError("logprobs are not supported with beam search")
        if self.num_beams > 1 and self.reroute_every:
            raise ValueError("reroute_every is not supported with beam search")
        if self.num_beams > 1 and self.watermark:
            raise ValueError("watermark is not supported with beam search")
        if self.merge_into_base and self.reroute_every:
            raise ValueError("reroute_every and merge_into_base exclude each other")
        if self.chat_turns and not {"user", "assistant"} <= set(self.chat_turns):
            raise ValueError("chat_turns needs a template for user and one for assistant")
        if bad := [role for role, template in self.chat_turns.items() if template.count("{content}") != 1]:
            raise ValueError(f"chat_turns: the template for {bad[0]} must hold {{content}} once")
        if len(self._list_constraints()) > 1:
            raise ValueError(f"only one of {', '.join(CONSTRAINTS)} can be used at a time")
        return self

    @property
    def constraint(self) -> str:
        """Which of `CONSTRAINTS` constrains the output, "" if none does."""
        return next(iter(self._list_constraints()), "") if self.constrained else ""

    def _list_constraints(self) -> list[str]:
        return [name for name in CONSTRAINTS if getattr(self, name) not in (None, "", ())]


class MergeSettings(Section):
    """How adapters are combined, or merged into the base."""

    method: MergeMethod = "cat"
    """Merge method: weighted sum, exact (cat, task_arithmetic) or truncated to a rank (svd; linear also normalises the weights); of pruned updates (magnitude_prune, dare_linear); or mean with sign election (ties, dare_ties)."""  # noqa: E501
    rank: Annotated[int, Field(ge=0, le=4096)] = 0
    """Rank of the result; 0 = exact for cat and task_arithmetic, the parents' maximum for linear and svd, their sum for the others."""  # noqa: E501
    max_error: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Instead of a rank: maximum relative error per projection; 0 = off."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of an update's entries that pruning keeps (ties, magnitude_prune: the largest; dare: random ones)."""
    seed: int = 0
    """Random seed of DARE."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of a merged base; auto = as the base is stored."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 2_000_000_000
    """Maximum size of a weight file of a merged base."""
    gguf: bool = False
    """Also write the merged base as GGUF, for llama.cpp (needs the package gguf)."""
    search_steps: Annotated[int, Field(ge=4, le=10_000)] = 40
    """Maximum number of mixes that --search evaluates."""
    search_tokens: Annotated[int, Field(ge=64)] = 8192
    """Tokens of each text that --search evaluates a mix on."""

    @model_validator(mode="after")
    def _check_rank(self) -> MergeSettings:
        if self.rank and self.max_error:
            raise ValueError("rank and max_error exclude each other")
        return self


class ServeSettings(Section):
    """Limits and timeouts of the server."""

    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 16
    """Maximum number of sequences decoded concurrently."""
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = 64
    """Maximum number of queued sequences; beyond it, requests get 429 with Retry-After."""
    max_choices: Annotated[int, Field(ge=1, le=1024)] = 64
    """Maximum number of choices per request: prompts times n."""
    max_slots: Annotated[int, Field(ge=1, le=4096)] = 64
    """Maximum number of loaded adapters; the least recently used is evicted."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 1_000_000
    """Maximum size of a request body."""
    max_upload_bytes: Annotated[int, Field(ge=1024, le=2**34)] = 50_000_000
    """Maximum size of a file to train on that the web page sends."""
    header_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Disconnect clients that have not sent their headers within this time."""
    body_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Answer 408 to clients that have not sent their body within this time."""
    send_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Disconnect clients that read nothing for this long."""
    lameduck_seconds: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """Time after SIGTERM in which requests are still taken while /readyz says 503, so that load balancers turn away."""
    shutdown_grace_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Grace period for in-flight requests after SIGTERM."""


class Recipe(Section):
    """One adapter: its base, its text, and every setting."""

    name: str = ""
    """Name of the adapter in the store."""
    description: str = ""
    """One line on what the adapter is for."""
    license: str = ""
    """Licence of the text, for the model card, such as CC-BY-4.0."""
    base: str = "nano"
    """The frozen base model: nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a hub id or a folder."""
    data: DataSettings = DataSettings()
    """The text and how it becomes blocks of tokens."""
    lora: LoraSettings = LoraSettings()
    """Rank, scaling and targets of the adapter."""
    train: TrainSettings = TrainSettings()
    """The training loop."""
    preferences: PreferenceSettings = PreferenceSettings()
    """Training on choices between texts instead of on text."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """How perplexity is measured."""
    generate: GenerateSettings = GenerateSettings()
    """How text is generated."""
    tune: TuneSettings = TuneSettings()
    """The candidates of a search."""
    merge: MergeSettings = MergeSettings()
    """How adapters are combined, or merged into the base."""
    serve: ServeSettings = ServeSettings()
    """Limits and timeouts of the server."""

    @property
    def blocks_per_step(self) -> int:
        """Blocks in the batch of an optimizer step."""
        return self.train.batch_size or max(1, self.train.batch_tokens // self.data.block_size)

    @property
    def replayed_per_step(self) -> int:
        """Blocks of general text that an optimizer step replays."""
        is_replayed = self.train.forget is not None
        return max(1, round(self.blocks_per_step * self.train.replay_fraction)) if is_replayed else 0

    def count_epochs(self, tokens: int) -> float:
        """Returns the number of epochs over a training text of this many tokens."""
        step_tokens = min(self.blocks_per_step * self.data.block_size, tokens)  # a short text is seen once in a step
        return self.train.steps * step_tokens / max(1, tokens) if self.train.steps else self.train.epochs


SECTIONS = tuple(name for name, field in Recipe.model_fields.items() if isinstance(field.default, Section))


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
            raise RecipeError(f"{where}: there is no setting '{key}'", _explain_unknown(key)) from error
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Section | Mapping) else f", found {show_value(first['input'])}"
        raise RecipeError(f"{where}: {key or 'recipe'}: {reason}{given}", describe_key(key)) from error


def _explain_unknown(key: str) -> str:
    if new := RENAMED.get(key):
        return f"it is called {new} now"
    explained = REMOVED.get(key) or explain_setting(key)
    if explained.startswith("it is --"):  # an option: its key, of the same section if that has one
        name = explained.split()[2].removeprefix("--").replace("-", "_")
        keys = [each for each in list_keys() if each.rpartition(".")[2] == name]
        own = [each for each in keys if each.partition(".")[0] == key.partition(".")[0]]
        return f"it is {(own or keys)[0]} here" if keys else explained
    return explained or suggest(key, list_keys())


def find_field(key: str) -> FieldInfo | None:
    """Returns the field of a dotted key, or None."""
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
    return f"{key}: {field.description}" if (field := find_field(key)) else "see 'lora-gpt2 recipes show'"
