"""GGUF for llama.cpp and what is built on it: a base, merged or not, and an adapter over it.

Names and keys are those of llama.cpp's GPT-2 architecture (`gguf.constants`). Matrices are stored `[out, in]`;
norms, biases and positions in float32, as llama.cpp's own conversion does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.core.errors import CheckFailed, ConflictError, MismatchError, ResourceError
from lora_gpt2.core.files import rename_path, sync_tree, temporary_dir, wrap_os_errors
from lora_gpt2.merging.state import merge_state
from lora_gpt2.model.base import TRANSPOSED, Base
from lora_gpt2.model.config import HEAD, GPT2Config
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.merge import MergeRule
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import load_adapter
from lora_gpt2.store.manifest import Manifest

ARCHITECTURE = "gpt2"
NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
MODULES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def check_gguf(config: GPT2Config) -> None:
    """Raises `ResourceError` without the package gguf, `MismatchError` for a base that llama.cpp would run wrongly."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "writing GGUF needs the package gguf, which is not installed", "pip install gguf"
        ) from error
    if config.gelu_approximate != "tanh" or config.scale_attn_by_inverse_layer_idx:
        raise MismatchError(
            "llama.cpp's GPT-2 has GELU by tanh and unscaled layers; this base has not", "leave GGUF out"
        )


def write_gguf(path: Path, state: Mapping[str, Tensor], base: Base) -> None:
    """Writes the tensors of a merged base, with everything llama.cpp needs to run it, into one file; reads it back.

    Raises `CheckFailed` if the file does not hold what was written.
    """
    import gguf

    config = base.config
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(base.name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens, merges = base.tokenizer.list_vocabulary()
    padding = [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    tokens += padding
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[len(kinds) - len(padding) :] = [gguf.TokenType.UNUSED] * len(padding)
    eos_id = base.tokenizer.eos_id
    for added in base.tokenizer.added:
        kinds[added] = gguf.TokenType.USER_DEFINED  # tokens wherever a text has them
    for end in base.tokenizer.stop_ids:
        kinds[end] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(eos_id)
    writer.add_eos_token_id(base.tokenizer.stop_id)
    named = {name_tensor(name): tensor.mT if name.endswith(TRANSPOSED) else tensor for name, tensor in state.items()}
    named.setdefault("output.weight", named["token_embd.weight"])
    arrays: dict[str, Any] = {}
    for name, tensor in named.items():
        is_matrix = tensor.ndim == 2 and name != "position_embd.weight"
        dtype = torch.float16 if is_matrix and tensor.dtype == torch.float16 else torch.float32
        arrays[name] = tensor.to(dtype).contiguous().numpy()
    _write_tensors(writer, path, arrays)


def export_base_gguf(target: Path, base: Base) -> None:
    """Writes a base as it is, its head as a tensor of its own, which an adapter may change; raises as `write_gguf`."""
    check_gguf(base.config)
    with _new_files(target) as work:
        write_gguf(work / target.name, merge_state(base, [], [], MergeRule(), base.runtime.dtype), base)


@contextmanager
def _new_files(*targets: Path) -> Iterator[Path]:
    """Yields a folder in which the block writes files of these names, which appear whole or not at all."""
    with wrap_os_errors(f"write {targets[0]}"), temporary_dir(targets[0].absolute().parent, targets[0].name) as work:
        yield work
        sync_tree(work)
        for path in targets:
            rename_path(work / path.name, path)


def write_lora_gguf(path: Path, adapter: Adapter, base: Base, name: str) -> None:
    """Writes an adapter for llama.cpp's `--lora`, in float32, with its scaling in B; reads it back.

    llama.cpp scales by alpha over the rank unless alpha is 0, so that is what is written.

    Raises `CheckFailed` if the file does not hold what was written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.name)
    arrays: dict[str, Any] = {}
    for site, update in adapter.updates.items():
        module = site if site == HEAD else f"transformer.{site}"
        tensor = name_tensor(f"{module}.weight")
        arrays[f"{tensor}.lora_a"] = update.a.float().contiguous().numpy()
        arrays[f"{tensor}.lora_b"] = (update.scaling * update.b.float()).contiguous().numpy()
    _write_tensors(writer, path, arrays)


def export_gguf(store: Store, reference: str, target: Path, base: Base, settings: GenerateSettings) -> Manifest:
    """Writes a version as `target`, a .gguf file, and a Modelfile for ollama beside it; returns its manifest.

    Raises:
        ConflictError: one of the two is there.
        ResourceError: the package gguf is missing, or a file cannot be written.
    """
    check_gguf(base.config)
    modelfile = target.with_name(f"{target.stem}.Modelfile")
    for path in (target, modelfile):
        if path.exists():
            raise ConflictError(f"{path} exists", "choose another name, or remove it first")
    manifest, adapter = load_adapter(store, reference, base)
    with _new_files(target, modelfile) as work:
        write_lora_gguf(work / target.name, adapter, base, manifest.reference)
        lines = build_modelfile(base, target.name, settings)
        (work / modelfile.name).write_text(lines, encoding="utf-8", newline="\n")
    return manifest


def build_modelfile(base: Base, adapter: str, settings: GenerateSettings) -> str:
    """Returns ollama's description of an adapter over a base, both files in its folder, with our sampling settings."""
    values = {
        "num_ctx": base.config.n_positions,
        "num_predict": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
    }
    parameters = "".join(f"PARAMETER {key} {value}\n" for key, value in values.items())
    return f'FROM ./{Path(base.name).name}.gguf\nADAPTER ./{adapter}\nTEMPLATE "{{{{ .Prompt }}}}"\n{parameters}'


def _write_tensors(writer: Any, path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes tensors after what the writer has, and compares what is read back."""
    import gguf

    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if set(found) != set(arrays) or not all(np.array_equal(found[name], array) for name, array in arrays.items()):
        raise CheckFailed(f"{path} does not hold what was written", "check the disk")


def name_tensor(name: str) -> str:
    """Returns llama.cpp's name of a tensor: `transformer.h.3.ln_1.bias` → `blk.3.attn_norm.bias`."""
    if name in NAMES:
        return NAMES[name]
    layer, _, rest = name.removeprefix("transformer.h.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{MODULES[part]}.{kind}"
