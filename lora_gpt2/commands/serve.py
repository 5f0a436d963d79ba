"""`lora-gpt2 serve`: the HTTP API and the web page."""

from __future__ import annotations

import os
from typing import Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import base_option, missing_extra, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store


def _read_key(name: str) -> str | None:
    """Returns a secret of the environment, without the line end of the file that it may come from."""
    key = os.environ.get(name, "").strip()
    if not key.isascii():
        raise UsageError(f"{name} has characters that an HTTP header has not", "use letters, figures and signs")
    return key or None


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="Additional Host header to allow; repeatable."
)
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="CORS origin to allow; repeatable.")
@setting_options("generate")
@base_option
@set_option
@store_option
@click.pass_obj
def command(
    reporter: Reporter,
    host: str,
    port: int,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    flags: dict[str, Any],
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
) -> None:
    """Answer OpenAI-compatible requests, in which the model is an adapter; a web page is at /.

    The model is an adapter, name@version, 'base', or a mix such as 'law:0.6+code:0.4'. $LORA_GPT2_API_KEY, when set, is
    asked on every route; $LORA_GPT2_ADMIN_KEY allows /v1/adapters. Other machines are answered only with a key.

    \b
    Examples:
      lora-gpt2 serve
      lora-gpt2 serve --base nano --port 9000 --set serve.max_num_seqs=32
      curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
           -d '{"model": "shakespeare", "prompt": "ROMEO:", "max_tokens": 40}'
    """
    recipe = load_recipe(None, overrides, {**flags, "base": base})
    try:
        from lora_gpt2.serving.api import Server
        from lora_gpt2.serving.http import bind, is_loopback, serve
        from lora_gpt2.serving.middleware import Access
    except ImportError as error:
        raise missing_extra("serving", "serve", error) from error
    key, admin_key = map(_read_key, ("LORA_GPT2_API_KEY", "LORA_GPT2_ADMIN_KEY"))
    if recipe.generate.merge_into_base:
        raise UsageError("generate.merge_into_base is for one adapter, a server has many", "leave it out")
    if not is_loopback(host) and key is None:
        raise UsageError(f"{host} can be reached from other machines", "set LORA_GPT2_API_KEY to a secret first")
    bound = bind(host, port)
    from lora_gpt2.inference.history import LocalLog, find_votes
    from lora_gpt2.inference.open import open_store

    session = open_store(store, recipe)
    access = Access(key=key, admin_key=admin_key, hosts=(*hosts, host), origins=origins, is_local=is_loopback(host))
    choices = LocalLog(find_votes(), reporter)
    serve(
        Server(session=session, defaults=recipe.generate, limits=recipe.serve, access=access, vote_log=choices),
        bound,
        reporter,
    )
