"""`lora-gpt2 adapters`: the store. A module each for inspecting, modifying and transferring."""

from __future__ import annotations

import click

from lora_gpt2.commands.adapters import compare, inspect, modify, transfer
from lora_gpt2.commands.shared import CommandGroup


@click.group("adapters", cls=CommandGroup)
def command() -> None:
    """The store: look at adapters, check them, change which there are, exchange them."""


for _module in (inspect, compare, modify, transfer):
    for _command in _module.COMMANDS:
        command.add_command(_command)
