"""Models of transformers and PEFT in memory, made of a base and adapters."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_gpt2.merging.state import merge_state
from lora_gpt2.model.base import Base
from lora_gpt2.model.checkpoint import Checkpoint
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.merge import MergeRule, combine_adapters
from lora_gpt2.store.peft.tensors import to_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_merged_model(base: Base, adapters: Sequence[Adapter], weights: Sequence[float]) -> PreTrainedModel:
    """Returns a `GPT2LMHeadModel` in float32 with the weighted updates of adapters in its weights.

    Its head is tied to the token embeddings unless an adapter changes it. The base must be unquantized.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    state = merge_state(base, adapters, weights, MergeRule(), torch.float32)
    values = {**Checkpoint.read(base.folder).values, "tie_word_embeddings": f"{HEAD}.weight" not in state}
    model: PreTrainedModel = GPT2LMHeadModel(GPT2Config.from_dict(values))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {f"{HEAD}.weight"}
    model.tie_weights()
    return _stop_as_here(model, base).eval()


def build_peft_model(base: Base, adapters: Sequence[Adapter], weights: Sequence[float]) -> PreTrainedModel:
    """Returns a `PeftModel` in float32 with one adapter: the weighted sum of some, as exact as `merge --method cat`."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    combined = combine_adapters(adapters, weights, MergeRule()).adapter
    model = GPT2LMHeadModel.from_pretrained(base.folder, dtype=torch.float32, use_safetensors=True)
    if HEAD in combined.updates:  # PEFT, merging, would write into embeddings that are tied to the head
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    with tempfile.TemporaryDirectory() as folder:
        for name, content in to_peft(combined, base.name, base.config).items():
            (Path(folder) / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # of the head, which is no Conv1D as the others are
            found: PreTrainedModel = PeftModel.from_pretrained(_stop_as_here(model, base), folder)
    return found.eval()


def _stop_as_here(model: PreTrainedModel, base: Base) -> PreTrainedModel:
    """Returns the model, which ends texts at each token at which they end here."""
    if len(base.tokenizer.stop_ids) > 1 and model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(base.tokenizer.stop_ids)
    return model
