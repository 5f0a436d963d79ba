"""`lora-gpt2 completion`: what a shell needs to complete commands, options, adapters, recipes, bases and settings."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_LORA_GPT2_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Write the completion script of a shell.

    \b
    Examples:
      eval "$(lora-gpt2 completion bash)"         in ~/.bashrc
      eval "$(lora-gpt2 completion zsh)"          in ~/.zshrc
      lora-gpt2 completion fish > ~/.config/fish/completions/lora-gpt2.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    group = click.get_current_context().find_root().command
    click.echo(kind(group, {}, "lora-gpt2", VARIABLE).source())
