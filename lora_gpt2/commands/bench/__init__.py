"""`lora-gpt2 bench`: measurements on this machine."""

from __future__ import annotations

import click

from lora_gpt2.commands.bench import latency, quality, throughput
from lora_gpt2.commands.shared import CommandGroup


@click.group("bench", cls=CommandGroup)
def command() -> None:
    """Measure this machine: training, writing and serving beside transformers + PEFT, quality, start-up."""


for _module in (throughput, latency, quality):
    for _command in _module.COMMANDS:
        command.add_command(_command)
