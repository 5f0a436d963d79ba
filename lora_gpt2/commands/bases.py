"""`lora-gpt2 bases`: which frozen models there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import CommandGroup, emit, json_option
from lora_gpt2.core.errors import ConflictError, UsageError
from lora_gpt2.core.tables import format_table


@click.group("bases", cls=CommandGroup)
def command() -> None:
    """List, show and export bases."""


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the bases that have a name: the bundled ones, and those of the hub.

    \b
    Example:
      lora-gpt2 bases list
    """
    from lora_gpt2.model.checkpoint import HUB_NAMES, list_bundled

    rows = [{"name": name, "where": "bundled"} for name in list_bundled()]
    rows += [{"name": name, "where": f"hub: {identifier}"} for name, identifier in HUB_NAMES.items()]
    emit({"bases": rows}, as_json, lambda: format_table(["base", ""], [[row["name"], row["where"]] for row in rows]))


@command.command("export")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Of the matrices."
)
@json_option
def export(name: str, target: Path, dtype: str, as_json: bool) -> None:
    """Write a base as GGUF, for llama.cpp and ollama; adapters exported as .gguf go over it.

    \b
    Example:
      lora-gpt2 bases export nano nano.gguf
    """
    if target.suffix != ".gguf":
        raise UsageError(f"{target}: a base is written as GGUF", "name the file base.gguf, for example")
    if target.exists():
        raise ConflictError(f"{target} exists", "choose another name, or remove it first")
    import torch

    from lora_gpt2.merging.gguf import export_base_gguf
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import Runtime

    base = load_base(name, Runtime(torch.device("cpu"), getattr(torch, dtype)))
    export_base_gguf(target, base)
    emit({"base": {"name": base.name, "path": str(target)}}, as_json, lambda: [f"wrote {target}"])


@command.command("show")
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show a base: its shape, parameters and fingerprint.

    \b
    Example:
      lora-gpt2 bases show nano
    """
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime

    base = load_base(name, choose_runtime("float32"))
    content: dict[str, Any] = {
        "name": base.name,
        "path": str(base.folder),
        "fingerprint": base.fingerprint,
        "tokenizer_fingerprint": base.tokenizer.fingerprint,
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        **vars(base.config),
    }
    emit({"base": content}, as_json, lambda: [f"{key:<22} {value}" for key, value in content.items()])
