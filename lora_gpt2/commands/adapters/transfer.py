"""`adapters import | export | push | pull`: adapters from elsewhere and for elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import SAMPLE_PROMPT, base_option, emit, json_option, store_option, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.listing import summarise


@click.command("import")
@click.argument("source")
@click.option("--name", required=True, metavar="N", help="Name in the store.")
@click.option("--rank", type=click.IntRange(1, 4096), help="Rank to convert DoRA to.  [default: 64]")
@click.option("--alpha", type=float, help="lora_alpha of a loralib file, which does not say it.")
@base_option
@store_option
@json_option
@click.pass_obj
def import_(
    reporter: Reporter,
    source: str,
    name: str,
    rank: int | None,
    alpha: float | None,
    base: str | None,
    store: Store,
    as_json: bool,
) -> None:
    """Import SOURCE: a folder that PEFT saved, a .tar.gz of 'export', a loralib .pt file, or a hub id.

    LoRA, rsLoRA and PiSSA are imported exactly, DoRA as its best approximation, with the error stated. Adapters that
    are not supported are refused, and the error names the key. A loralib file with two slices of c_attn is taken as
    q and v, with one as q. The base is that of --base, else the one that the files name.

    \b
    Examples:
      lora-gpt2 adapters import ./peft_output --name legal --base gpt2
      lora-gpt2 adapters import law-3.tar.gz --name law
      lora-gpt2 adapters import gpt2_e2e.pt --name e2e --base gpt2-medium --alpha 32
    """
    _import(reporter, source, name, rank, alpha, base, store, as_json)


@click.command("pull")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--name", metavar="N", help="Name in the store; else that of the repository.")
@base_option
@store_option
@json_option
@click.pass_obj
def pull(reporter: Reporter, repository: str, name: str | None, base: str | None, store: Store, as_json: bool) -> None:
    """Import an adapter from the hub.

    \b
    Example:
      lora-gpt2 adapters pull my-name/law-adapter --name law
    """
    if repository.count("/") != 1 or Path(repository).exists():
        raise UsageError(f"'{repository}' is not a hub repository", "write owner/name; a folder is for 'import'")
    shown = name or repository.partition("/")[2].lower()
    _import(reporter, repository, shown, None, None, base, store, as_json)


@click.command("export")
@click.argument("reference", metavar="NAME[@VERSION]")
@click.argument("target", type=click.Path(path_type=Path), metavar="TARGET")
@click.option("--peft-safe", is_flag=True, help="Leave a change of the tied head out, and say what that costs.")
@store_option
@json_option
@click.pass_obj
def export(reporter: Reporter, reference: str, target: Path, peft_safe: bool, store: Store, as_json: bool) -> None:
    """Write a version to TARGET: a folder that PEFT loads, or one file: .tar.gz, or .gguf for llama.cpp.

    A folder and a .tar.gz hold every file of the version, also the sketch and the drafter of its training text, which
    are hashes. A .gguf is an adapter for `llama-cli --lora` over the base's GGUF ('bases export'); a Modelfile for
    ollama is written beside it.

    An adapter that changes the head (lm_head) runs in PeftModel, but what ties the head again, as
    AutoPeftModelForCausalLM and lm-evaluation-harness do, fails over it: --peft-safe leaves that change out.

    \b
    Examples:
      lora-gpt2 adapters export law ./law-peft
      lora-gpt2 adapters export law@2 law-2.tar.gz
      lora-gpt2 adapters export law ./law-peft --peft-safe
      lora-gpt2 adapters export law law.gguf
    """
    if target.suffix.lower() == ".gguf":
        if peft_safe:
            raise UsageError("--peft-safe is for PEFT's folders and archives", "llama.cpp applies a head's change")
        _export_gguf(reporter, reference, target, store, as_json)
        return
    from lora_gpt2.store.exchange import export_adapter, has_head

    price: dict[str, Any] = {}
    if peft_safe and has_head(store, reference):
        from lora_gpt2.evaluation.head_update import measure_head

        head = measure_head(store, reference, reporter)
        manifest, price = export_adapter(store, reference, target, head.base), head.to_json()
        reporter.message(f"without the head: {head.describe()}")
    else:
        manifest = export_adapter(store, reference, target)
        if has_head(store, reference):
            reporter.message("it changes the tied head, which PEFT ties again wrongly in places: see --peft-safe")
    row = summarise(manifest) | {"path": str(target)} | ({"perplexity": price} if price else {})
    emit({"adapter": row}, as_json, lambda: [f"wrote {target}"])
    suggest_next(
        reporter, "adapters", "import", target.absolute(), "--name", manifest.name, title="next, for another store"
    )


def _export_gguf(reporter: Reporter, reference: str, target: Path, store: Store, as_json: bool) -> None:
    from lora_gpt2.merging.gguf import export_gguf
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.recipe import GenerateSettings

    base = load_base(store.read_manifest(reference).base.name, choose_runtime("float32"))
    manifest = export_gguf(store, reference, target, base, GenerateSettings())
    emit({"adapter": summarise(manifest) | {"path": str(target)}}, as_json, lambda: [f"wrote {target}"])
    suggest_next(reporter, "bases", "export", base.name, target.with_name(f"{Path(base.name).name}.gguf"))


@click.command("push")
@click.argument("reference", metavar="NAME[@VERSION]")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@store_option
@json_option
def push(reference: str, repository: str, private: bool, store: Store, as_json: bool) -> None:
    """Upload a version with its card to the hub; needs a login ('hf auth login').

    \b
    Example:
      lora-gpt2 adapters push law my-name/law-adapter --private
    """
    from lora_gpt2.store.exchange import push_adapter

    address = push_adapter(store, reference, repository, private)
    emit({"adapter": {"reference": reference, "url": address}}, as_json, lambda: [f"pushed {reference}: {address}"])


COMMANDS = (import_, export, push, pull)


def _import(
    reporter: Reporter,
    source: str,
    name: str,
    rank: int | None,
    alpha: float | None,
    base: str | None,
    store: Store,
    as_json: bool,
) -> None:
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.store.exchange import import_adapter
    from lora_gpt2.store.fetch import fetch_adapter

    fetched = fetch_adapter(source)
    base_name = base or fetched.guess_base()
    if not base_name:
        raise UsageError(f"{source} does not name a base that can be found", "say it with --base, such as --base gpt2")
    loaded = load_base(base_name, choose_runtime("float32"))
    found = import_adapter(fetched, store, name, loaded, reporter, rank=rank, alpha=alpha)
    row: dict[str, Any] = summarise(found.manifest) | {
        "variant": found.variant,
        "relative_error": found.relative_error,
        "max_logit_difference": found.max_logit_difference,
    }
    converted = f" from {found.variant}" if found.variant != "lora" else ""
    emit({"adapter": row}, as_json, lambda: f"imported {found.manifest.reference} for {base_name}{converted}")
    suggest_next(reporter, "generate", SAMPLE_PROMPT, "--adapter", name, store=store)
