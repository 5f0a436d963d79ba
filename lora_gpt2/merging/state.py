"""The weights of a base with adapters written into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.model.base import TRANSPOSED, Base
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.merge import MergeRule


def merge_state(
    base: Base, adapters: Sequence[Adapter], weights: Sequence[float], rule: MergeRule, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns a merged base's tensors on the CPU under Hugging Face's names, projections as `Conv1D` has them."""
    adapted = {site for adapter in adapters for site in adapter.updates}
    tensors = base.model.state_dict()
    if HEAD in adapted:  # then the head is no longer tied to the token embeddings
        tensors.setdefault(f"{HEAD}.weight", tensors["wte.weight"])
    state = {}
    for key in list(tensors):
        tensor = tensors.pop(key).detach().to("cpu", torch.float32)
        site = key.removesuffix(".weight")
        if key.endswith(".weight") and site in adapted:
            tensor = tensor + rule.combine_site(adapters, weights, site)
        if not torch.isfinite(tensor).all() or tensor.abs().max() > torch.finfo(dtype).max:
            raise CorruptError(f"{key} of the merged base does not fit {dtype}", "use --set merge.dtype=float32")
        tensor = tensor.mT if key.endswith(TRANSPOSED) else tensor
        state[key if site == HEAD else f"transformer.{key}"] = tensor.to(dtype).contiguous()
    return state
