"""Audits in one call each: of a text before it is trained on, of an adapter and the text it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from lora_gpt2.audit.canaries import Canary
from lora_gpt2.audit.memorization import AuditSettings, MemorizationReport, audit_memorization
from lora_gpt2.audit.training_text import TermSwap, TextAudit, TextReport, measure_swaps
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import ResourceError, UsageError
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.names import AUTO
from lora_gpt2.data.ngram_index import NgramIndex
from lora_gpt2.data.pipeline import read_clean
from lora_gpt2.evaluation.held_out import read_own_text
from lora_gpt2.evaluation.perplexity import ScoringWindows
from lora_gpt2.inference.generate import Request, build_writer
from lora_gpt2.inference.mix import Mix, read_manifests
from lora_gpt2.inference.open import open_session
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.audits import write_audit
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import read_drafter


def audit_text(
    sources: Sequence[str], adapter: str | None, store: Store, recipe: Recipe, reporter: Reporter
) -> TextReport:
    """Returns what is risky in text, and whether a model prefers groups of people that it names.

    Args:
        sources: files, folders, globs, archives or `hf:` data sets.
        adapter: compare its preferences with those of its base; None for the base's own.
        store: where the adapter is.
        recipe: how the text is read, and how it is scored (`data`, `evaluate`).
        reporter: shows progress.

    Raises:
        NotFoundError: there is no such file or adapter.
    """
    read_manifests(store, [adapter] if adapter else [])
    audit = TextAudit()
    for document in read_clean(sources, recipe.data, reporter).documents:
        audit.add(document)
    swaps = _measure_swaps(audit.sentences, adapter, store, recipe) if audit.sentences else []
    return replace(audit.report(), sources=tuple(sources), adapter=adapter, swaps=swaps)


def _measure_swaps(sentences: Sequence[str], adapter: str | None, store: Store, recipe: Recipe) -> list[TermSwap]:
    session, _ = open_session(store, [adapter] if adapter else [], recipe, recipe.evaluate.dtype)
    settings = recipe.evaluate.model_copy(update={"protocol": "document"})

    def judge(name: str, texts: Sequence[str]) -> Sequence[float]:
        windows = ScoringWindows(session.base, [texts], settings)
        nats: Sequence[float] = windows.measure(session.select(Mix.parse(name)))[0][0].per_document[0].tolist()
        return nats

    control = partial(judge, "base") if adapter else None
    return measure_swaps(sentences, partial(judge, adapter or "base"), control)


def audit_adapter(
    adapter: str,
    store: Store,
    recipe: Recipe,
    settings: AuditSettings,
    reporter: Reporter,
    *,
    canaries: Sequence[Canary] = (),
) -> MemorizationReport:
    """Returns what an adapter repeats of the text it was trained on, and keeps it with the version, for its card.

    Raises:
        NotFoundError: there is no such adapter, or its training text is no longer where it was.
        Interrupted: a stop was requested; nothing is kept.
    """
    own = read_own_text(store, adapter, reporter, find_own_base(recipe))
    exact = own.manifest.reference  # a publication meanwhile changes nothing
    session, _ = open_session(store, [exact], recipe, recipe.evaluate.dtype)
    with store.open(exact) as version:
        drafter = read_drafter(version, session.base.tokenizer.vocab_size)
    with catch_signals() as stop:
        report = audit_memorization(
            session.base,
            session.select(Mix.single(exact)),
            exact,
            own,
            settings,
            reporter=reporter,
            write=build_writer(session, reporter, stop),
            sampling=recipe.generate,
            canaries=canaries,
            drafter=drafter,
        )
    try:
        write_audit(store, own.manifest, "memorization", report.to_json())
    except ResourceError as error:  # a store of others, which may be read alone
        reporter.message(f"not kept with the adapter: {error.message}")
    return report


def forbid_copies(
    requests: Sequence[Request], tokens: int, store: Store, recipe: Recipe, reporter: Reporter
) -> list[Request]:
    """Returns requests whose continuations never copy so many tokens in a row of the training text of their adapters.

    Raises `NotFoundError` where an adapter's training text is no longer where it was, `UsageError` for `auto`.
    """
    names = dict.fromkeys(name for request in requests for name, _ in request.mix)
    if AUTO in names:
        raise UsageError("--no-verbatim must know the adapter of each prompt", "name it instead of 'auto'")
    own = {name: read_own_text(store, name, reporter, find_own_base(recipe)).prepared.train.stream for name in names}
    indexes = {name: NgramIndex(text, tokens - 1) for name, text in own.items()}
    return [replace(request, no_verbatim=[indexes[name] for name, _ in request.mix]) for request in requests]


def find_own_base(recipe: Recipe) -> str | None:
    """Returns the base that the user named, which goes before the one in a manifest; None if none was named."""
    return recipe.base if "base" in recipe.model_fields_set else None
