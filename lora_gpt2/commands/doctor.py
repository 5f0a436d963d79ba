"""`lora-gpt2 doctor`: what works here."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

import click

from lora_gpt2.commands.shared import emit, end_as_failed, json_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.store.catalog import Store

MARKS = {"ok": "ok", "missing": "--", "failed": "NO", "": "  "}


@click.command("doctor")
@click.option("--hub", is_flag=True, help="Also ask the Hugging Face hub, over the network.")
@store_option
@json_option
@click.pass_obj
def command(reporter: Reporter, hub: bool, store: Store, as_json: bool) -> None:
    """Say what works on this machine: device, dtypes, versions, store, and each job tried for a moment.

    The output is one block to paste into a bug report; it names no text and no key. It ends with 9 if training or
    generating fails, or if the store is damaged.

    \b
    Examples:
      lora-gpt2 doctor
      lora-gpt2 doctor --hub --json > doctor.json
    """
    from lora_gpt2.doctor import ESSENTIAL, examine

    reporter.message("trying, for some seconds …")
    findings = list(examine(store, hub))

    def render() -> list[str]:
        lines = []
        for topic, items in groupby(findings, key=lambda finding: finding.topic):
            lines.append(topic)
            lines += [f"  {MARKS[item.status]} {item.name:<22} {item.detail}" for item in items]
        return lines

    emit({"findings": [asdict(finding) for finding in findings]}, as_json, render)
    if broken := [finding.name for finding in findings if finding.status == "failed" and finding.name in ESSENTIAL]:
        end_as_failed(f"does not work: {', '.join(broken)}", "see above, and report it with this block", as_json)
