"""The settings of training: the adapter, the loop, and the search for both."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_gpt2.core.names import is_name
from lora_gpt2.core.section import Section

Target = Literal["c_attn", "c_attn.q", "c_attn.k", "c_attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head"]
BLOCKS: tuple[Target, ...] = ("c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
Fraction = Annotated[float, Field(ge=0.0, le=0.5)]
Positive = Annotated[int, Field(gt=0)]
Sources = tuple[Annotated[str, Field(min_length=1)], ...]


class LoraSettings(Section):
    """Rank, scaling and targets of the adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of each update; lm_head, if it is a target, gets twice the rank and twice the alpha."""
    alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    """Updates are scaled by alpha / rank (alpha / sqrt(rank) with use_rslora); default: twice the rank (8 with use_rslora)."""  # noqa: E501
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = BLOCKS
    """Modules to adapt; c_attn.q, c_attn.k and c_attn.v adapt slices of c_attn; lm_head also adapts the tied head (PEFT has trouble with that)."""  # noqa: E501
    rank_pattern: dict[Target, Annotated[int, Field(ge=1, le=512)]] = {}
    """Ranks of single targets that differ from `rank`."""
    use_rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input during training."""
    first_layer: Annotated[int, Field(ge=0, le=1023)] = 0
    """First transformer block to adapt; the blocks below it need no backward pass."""
    init: Literal["default", "pissa"] = "default"
    """Initialisation: default (A random, B zero), or pissa (the leading singular vectors of each weight, Meng et al. 2024, arXiv:2404.02948; the published adapter has twice the rank)."""  # noqa: E501
    init_from: str = ""
    """Adapter to continue training from: a version in the store (law, law@2), a folder that PEFT saved, an archive or a hub id; auto: the mix of the store's adapters under which the text is most likely. Rank, alpha and targets are its own unless they are set."""  # noqa: E501

    @model_validator(mode="after")
    def _check_targets(self) -> LoraSettings:
        slices = [t for t in self.targets if t.startswith("c_attn.")]
        if slices and "c_attn" in self.targets:
            raise ValueError(f"targets name c_attn and its slice {slices[0]}; name one or the other")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets name the same projection twice")
        is_inherited = self.init_from and "targets" not in self.model_fields_set  # they are those of the parent
        if not is_inherited and (missing := sorted(set(self.rank_pattern) - set(self.targets))):
            raise ValueError(f"rank_pattern names {missing[0]}, which is not among the targets")
        if len({self.rank_of(t) for t in slices}) > 1:
            raise ValueError("the slices of c_attn share one rank; give them the same in rank_pattern")
        if self.init == "pissa" and (slices or self.init_from):
            raise ValueError(f"init pissa excludes {'slices of c_attn' if slices else 'init_from'}")
        return self

    @property
    def parent_name(self) -> str:
        """The name in the store of the adapter that training continues; "" for none, or one from elsewhere."""
        name = self.init_from.partition("@")[0]
        return name if is_name(name) else ""

    def alpha_of(self, target: Target) -> float:
        """Returns the alpha of one target; the head, where it has its twofold rank, is scaled like the others."""
        if self.alpha is None and not self.use_rslora:
            return 2.0 * self.rank_of(target)
        factor = 1 if target in self.rank_pattern else self.rank_of(target) / self.rank
        return (self.alpha or 8.0) * (math.sqrt(factor) if self.use_rslora else factor)

    def rank_of(self, target: Target) -> int:
        """Returns the rank of one target."""
        return self.rank_pattern.get(target, self.rank * (2 if target == "lm_head" else 1))


class TrainSettings(Section):
    """The training loop."""

    steps: Positive | None = None
    """Number of optimizer steps; overrides epochs."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    """Number of passes over the training blocks, if steps is not given."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of AdamW; default: 0.576 / n_embd, which is 7.5e-4 for gpt2 and 3.6e-4 for gpt2-xl."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """Ratio of B's learning rate to A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354, suggests 16); 1 = off."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning-rate schedule after the warmup: cosine decays to 10 %, linear to zero, constant holds, wsd (warmup-stable-decay) holds, then decays."""  # noqa: E501
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of the steps over which wsd decays linearly to zero (arXiv:2404.06395)."""
    warmup_fraction: Fraction = 0.05
    """Fraction of the steps over which the learning rate warms up linearly."""
    batch_tokens: Positive = 4096
    """Tokens per optimizer step and adapter, rounded down to whole blocks."""
    batch_size: Positive | None = None
    """Blocks per optimizer step and adapter; overrides batch_tokens."""
    micro_batch_tokens: Positive = 4096
    """Tokens per forward pass over all adapters; gradients are accumulated over such micro-batches."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping: maximum norm of an adapter's gradient; 0 = off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing (Szegedy et al. 2015); reported losses are without it."""
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Noise on the token embeddings during training, 5 to 15 (NEFTune, Jain et al. 2023, arXiv:2310.05914); 0 = off."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations: less memory, about 25 % slower."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0 = a tenth of the run."""
    validation_tokens: Positive = 16384
    """Maximum tokens per validation during the run, fewer in short runs; the final evaluation uses all of them."""
    keep_best: bool = True
    """Publish the weights with the lowest validation loss instead of the last ones."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Early stopping: stop after this many validations without improvement; 0 = off."""
    forget: Annotated[float, Field(gt=0, le=100)] | None = None
    """Budget of forgetting: maximum KL divergence from the base on general text, in nats per token; default: none."""
    replay: Literal["generated"] | Sources = ()
    """General text for `forget`; default: bundled English. `generated` is text that the base itself writes."""
    replay_tokens: Annotated[int, Field(ge=64, le=2**24)] = 32768
    """Number of tokens of general text, of which a sixteenth is only measured on."""
    replay_fraction: Annotated[float, Field(gt=0, le=4)] = 0.25
    """Replayed tokens per training token."""
    sample_tokens: Annotated[int, Field(ge=0, le=512)] = 32
    """Length of the sample text generated at each validation for the report; 0 = none."""
    sample_prompt: str = ""
    """Prompt of these samples; default: the beginning of the validation text."""
    drafter: bool = True
    """Keep with the adapter what drafts its text: frequent runs of its training tokens, hashed, at most 1 MB."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers to log to, through accelerate."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 = only when the run is interrupted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed for initialisation, data order, dropout and noise."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the frozen base's weights; auto: the fastest on the device, or $LORA_GPT2_CPU_DTYPE on a CPU."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Quantize the base's linear layers to 8 or 4 bits: less memory, slightly slower, slightly different logits."""

    def peak_learning_rate(self, n_embd: int) -> float:
        """Returns the peak learning rate on a base of this width; by default it scales as in Yang et al. 2022 (arXiv:2203.03466)."""  # noqa: E501
        return self.learning_rate or 0.576 / n_embd


class PreferenceSettings(Section):
    """Training on what people preferred, with the parent of `lora.init_from` as the reference."""

    sources: Sources = ()
    """Pairs (prompt, chosen, rejected) or labelled texts (prompt, completion, label) in files or hf: data sets; rounds
    of `rate`, choices that `serve` recorded."""
    loss: Literal["dpo", "ipo", "kto", "orpo"] = "dpo"
    """Loss: dpo (Rafailov et al. 2023), ipo (Azar et al. 2023), kto (Ethayarajh et al. 2024), for labelled texts, or
    orpo (Hong et al. 2024), which has no reference."""
    beta: Annotated[float, Field(gt=0, le=10)] = 0.05
    """How strongly the parent holds the new version back; with orpo, the weight of the odds ratio."""
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of the choices that are taken to be wrong (conservative DPO)."""
    batch_size: Positive = 8
    """Pairs per optimizer step."""
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The learning rate, as a share of that of training on text; train.learning_rate sets it outright."""
    replay_weight: Annotated[float, Field(ge=0, le=100)] = 0.3
    """Weight of the loss of the text that the parent was trained on, of which each step replays as many tokens."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] = 1.02
    """Limit for the perplexity of the parent's own held-out text, as a multiple of the parent's; 1.02 is 2 % more."""


class TuneSettings(Section):
    """The candidates of a search; a recipe's own settings are always one of them."""

    learning_rate_factors: Annotated[tuple[Annotated[float, Field(gt=0, le=100)], ...], Field(min_length=1)] = (
        0.25,
        0.5,
        1.0,
        2.0,
    )
    """Peak learning rates to try, as factors of the recipe's."""
    ranks: Annotated[tuple[Annotated[int, Field(ge=1, le=512)], ...], Field(min_length=1)] = (8, 16, 32)
    """Ranks to try."""
    targets: Annotated[tuple[tuple[Target, ...], ...], Field(min_length=1)] = (BLOCKS, (*BLOCKS, "lm_head"))
    """Sets of targets to try."""
    dropouts: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.0,)
    """Dropout rates to try; candidates with different ones do not share micro-batches, which is slower."""
    step_fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    """Lengths to try, as fractions of the recipe's steps."""
