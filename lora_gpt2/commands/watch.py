"""`lora-gpt2 watch`: training runs in a browser."""

from __future__ import annotations

import os
from pathlib import Path

import click

from lora_gpt2.commands.shared import missing_extra
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_runs_dir
from lora_gpt2.core.errors import NotFoundError, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.user_files import check_output
from lora_gpt2.training.run_reader import RunReader, list_runs


@click.command("watch")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one.  [default: 8002, or a free one]")
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="Additional Host header to allow; repeatable."
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the newest run's page, and end.",
)
@click.pass_obj
def command(
    reporter: Reporter, folder: Path | None, host: str, port: int | None, hosts: tuple[str, ...], html: Path | None
) -> None:
    """Watch training runs in a browser: curves, speed, memory, samples; stop an adapter and keep it.

    FOLDER is that of a run, or one of runs; without it, the runs of this user. A run on another machine is watched
    through its folder, where that is shared. $LORA_GPT2_API_KEY, when set, is asked for everything; other machines are
    answered only with it, and may stop training only with $LORA_GPT2_ADMIN_KEY.

    \b
    Examples:
      lora-gpt2 watch
      lora-gpt2 watch /mnt/team/cache/runs
      lora-gpt2 watch --html run.html             the newest run as one file
    """
    runs = (folder or find_runs_dir()).resolve()
    found = list_runs(runs)
    if not found:
        raise NotFoundError(f"there is no run in {runs}", "begin one: lora-gpt2 train FILE --watch")
    if html:
        from lora_gpt2.training.report import render_run

        check_output(html)
        with wrap_os_errors(f"write {html}"):
            write_user_file(html, render_run(RunReader(found[0]), is_live=False))
        click.echo(f"written to {html}")
        return
    try:
        from lora_gpt2.serving.http import is_loopback
        from lora_gpt2.serving.middleware import Access
        from lora_gpt2.serving.watch import watch
    except ImportError as error:
        raise missing_extra("watching", "serve", error) from error
    key, admin_key = (os.environ.get(name) or None for name in ("LORA_GPT2_API_KEY", "LORA_GPT2_ADMIN_KEY"))
    if not is_loopback(host) and key is None:
        raise UsageError(f"{host} can be reached from other machines", "set LORA_GPT2_API_KEY to a secret first")
    access = Access(key=key, admin_key=admin_key, hosts=(*hosts, host), is_local=is_loopback(host))
    watch(runs, host, port, access, reporter)
