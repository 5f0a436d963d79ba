"""`lora-gpt2 adapters`: the store. One file each for looking, changing and exchanging."""

from __future__ import annotations

import click

from lora_gpt2.commands.adapters import inspect as look
from lora_gpt2.commands.adapters import modify as change
from lora_gpt2.commands.adapters import transfer as exchange


@click.group("adapters")
def command() -> None:
    """The store: look at adapters, check them, change which there are, exchange them."""


for _module in (look, change, exchange):
    for _command in _module.COMMANDS:
        command.add_command(_command)
