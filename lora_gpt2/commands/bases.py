"""`lora-gpt2 bases`: which frozen models there are."""

from __future__ import annotations

from typing import Any

import click

from lora_gpt2.commands.shared import emit, json_option
from lora_gpt2.core.tables import format_table


@click.group("bases")
def command() -> None:
    """List and show bases."""


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
