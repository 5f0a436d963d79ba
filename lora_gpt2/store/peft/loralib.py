"""Adapters of microsoft/LoRA's GPT-2 example (`.pt` files): c_attn's q and v slices, or all of c_attn.

loralib's MergedLinear keeps A of the adapted slices one under the other, `[n·r, in]`, and B of each slice under the
other, `[n·d, r]` (Hu et al. 2021, section 4.2; loralib `layers.py`); alpha is not in the file. The pickle is read by
PyTorch's restricted reader, which runs nothing and knows tensors and containers only.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.core.errors import CorruptError, MismatchError, UsageError
from lora_gpt2.core.files import wrap_os_errors
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import SLICES, Adapter, LoraUpdate

KEY = re.compile(r"(?:module\.)?(?:lm_model\.)?(?:transformer\.)?(h\.\d{1,4}\.attn\.c_attn)\.lora_([AB])")
ENABLED = {1: ("c_attn.q",), 2: ("c_attn.q", "c_attn.v"), 3: SLICES}
MAX_BYTES, LARGEST_RANK = 2**32, 4096


def read_loralib(path: Path, config: GPT2Config, alpha: float | None) -> Adapter:
    """Returns the adapter in a `.pt` file that `lora_state_dict` wrote.

    `alpha` is `lora_alpha` of that training (32 in the published settings).

    Raises:
        UsageError: `alpha` is missing.
        CorruptError: it is not a file of tensors, or a tensor is missing or not finite.
        MismatchError: it holds weights that no adapter has, or of another base.
    """
    if alpha is None or not 0 < alpha < 1e6:
        raise UsageError(f"{path} does not say its alpha", "give --alpha (32 in microsoft/LoRA's GPT-2 example)")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(path).items():
        match = KEY.fullmatch(str(name))
        if match is None or not isinstance(tensor, Tensor):
            raise MismatchError(
                f"{path}: {str(name)[:80]} is not part of a LoRA of c_attn", "save lora_state_dict only"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    sites = sorted(halves, key=lambda site: int(site.split(".")[1]))
    if not sites:
        raise CorruptError(f"{path} holds no adapter", "save it again with lora_state_dict")
    return Adapter(updates={site: _build_update(site, halves[site], config, alpha, str(path)) for site in sites})


def load_tensors(path: Path) -> Mapping[str, Any]:
    """Returns the state dictionary in a PyTorch file, read by the restricted reader, which runs nothing.

    Raises `CorruptError` for an invalid one, or one larger than any adapter.
    """
    with wrap_os_errors(f"read {path}"):
        size = path.stat().st_size
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(item.file_size for item in archive.infolist()))
        except zipfile.BadZipFile:
            pass  # the older format, or nothing that can be read: the reader will say so
    if size > MAX_BYTES:
        raise CorruptError(f"{path} unpacks to {size:,} bytes, more than any adapter", "restore it from a copy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that it may not know: then it raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle the restricted reader raises whatever it stumbles over
        reason = str(error).split("\n")[0][:120]
        raise CorruptError(
            f"{path} is not a file of tensors: {reason}", "save it again as a state dictionary"
        ) from error
    content = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, Mapping):
        raise CorruptError(f"{path} is not a state dictionary", "save it again as a state dictionary")
    return content


def _build_update(site: str, halves: Mapping[str, Tensor], config: GPT2Config, alpha: float, where: str) -> LoraUpdate:
    d = config.n_embd
    if set(halves) != {"A", "B"}:
        raise CorruptError(f"{where}: a half of {site} is missing", "save it again with lora_state_dict")
    a, b = halves["A"], halves["B"]
    count = b.shape[0] // d if b.ndim == 2 else 0
    if a.ndim != 2 or count not in ENABLED or b.shape[0] != count * d or tuple(a.shape) != (count * b.shape[1], d):
        shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        raise MismatchError(f"{where}: {site} has {shapes}, which no base of width {d} has", "use its own base")
    if int(site.split(".")[1]) >= config.n_layer:
        raise MismatchError(f"{where}: {site} is not in this base of {config.n_layer} layers", "use its own base")
    rank = b.shape[1]
    if not 0 < rank <= LARGEST_RANK or any(t.numel() * t.element_size() > t.untyped_storage().nbytes() for t in (a, b)):
        raise CorruptError(f"{where}: {site} has rank {rank}, or numbers that are not in the file", "save it again")
    a, b = a.float(), b.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise CorruptError(f"{where}: {site} holds NaN or infinity", "train again: it diverged")
    wide = torch.zeros(3 * d, count * rank)
    for index, name in enumerate(ENABLED[count]):
        row = SLICES.index(name) * d
        wide[row : row + d, index * rank : (index + 1) * rank] = b[index * d : (index + 1) * d]
    return LoraUpdate(a.contiguous(), wide, alpha * count)
