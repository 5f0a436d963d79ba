"""The whole of an evaluation in one call, for the command line and for Python: open base and adapters, and measure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.names import is_name
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.evaluation.general import GENERAL, add_general
from lora_gpt2.evaluation.held_out import list_differences, read_own_text, read_sketches
from lora_gpt2.evaluation.matrix import (
    Cell,
    EvaluationText,
    LabelledSource,
    build_cells,
    measure_matrix,
    read_sources,
)
from lora_gpt2.evaluation.on_ray import ScoringTask, score_on_ray
from lora_gpt2.evaluation.perplexity import choose_window, measure_perplexity
from lora_gpt2.evaluation.quality import GenerationTask, Quality, build_task, measure_quality
from lora_gpt2.evaluation.report import (
    build_figure,
    build_matrix_page,
    describe_cells,
    describe_versions,
    draw_matrix,
    format_matrix,
)
from lora_gpt2.evaluation.token_page import build_token_page
from lora_gpt2.evaluation.token_scores import TokenScores, check_protocol, iter_token_scores
from lora_gpt2.inference.generate import build_writer
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import find_base_name, list_mixes, open_session
from lora_gpt2.inference.session import Session
from lora_gpt2.model.checkpoint import Checkpoint, name_everywhere
from lora_gpt2.model.stored_weights import fingerprint_base
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.audits import write_audit
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import BaseIdentity, Manifest
from lora_gpt2.store.references import label_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Perplexities of adapters and the base on texts, and how they were measured.

    Args:
        cells: one for each adapter, mix or `base` on each text.
        forgetting: those on general English; empty if only the base was measured.
        base: name of the base.
        protocol, window, stride: the settings `evaluate.*`; tokens.
        dtype: of the base's weights.
        versions: of the adapters in each row, such as `law@2`.
        generation: how generated texts read, where that was asked for.
        token_scores: of each document, general English last, where they were asked for.
    """

    cells: list[Cell]
    forgetting: list[Cell]
    base: str
    protocol: str
    window: int
    stride: int
    dtype: str
    versions: dict[str, list[str]] = field(default_factory=dict)
    generation: list[Quality] = field(default_factory=list)
    token_scores: list[TokenScores] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns the result with the keys of `evaluate --json`."""
        how = {key: getattr(self, key) for key in ("base", "versions", "protocol", "window", "stride", "dtype")}
        cells = {
            "cells": [cell.to_json() for cell in self.cells],
            "forgetting": [cell.to_json() for cell in self.forgetting],
        }
        return cells | how | ({"generation": [row.to_json() for row in self.generation]} if self.generation else {})

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a row for each cell, general English included, with the columns of `evaluate --json`."""
        import pandas

        return pandas.DataFrame([cell.to_json() for cell in [*self.cells, *self.forgetting]])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Returns the matrix as a picture, blue where an adapter beats the base; writes it to a .png or .svg file."""
        cells = [cell.to_json() for cell in [*self.cells, *self.forgetting]]
        if path is not None:
            with wrap_os_errors(f"write {path}"):
                write_user_file(Path(path), draw_matrix(cells, Path(path).suffix.lower().lstrip(".") or "png"))
        return build_figure(cells)

    def to_html(self) -> str:
        """Returns a page with the matrix, its picture and every figure; it loads nothing."""
        return build_matrix_page(self.to_json())

    def tokens_to_html(self) -> str:
        """Returns a page of the texts, each token coloured by what an adapter gains on it; see `token_scores`."""
        if not self.token_scores:
            raise UsageError("no token was scored on its own", "evaluate(…, tokens=True)")
        return build_token_page(self.token_scores, self.base)

    def __str__(self) -> str:
        """Returns the matrix: `*` marks the best of each text, `!` text that an adapter was trained on."""
        shown = format_matrix([cell.to_json() for cell in [*self.cells, *self.forgetting]])
        notes = [*describe_cells([cell.to_json() for cell in self.cells]), *describe_versions(self.versions)]
        return "\n".join([shown, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns the matrix as a notebook shows it."""
        return f"<pre>{html.escape(str(self))}</pre>"


def evaluate_texts(
    texts: Sequence[EvaluationText],
    adapters: Sequence[str],
    store: Store,
    recipe: Recipe,
    reporter: Reporter,
    *,
    general: bool = True,
    num_texts: int = 0,
    keep: bool = False,
    keep_tokens: bool = False,
    ray: str = "",
) -> Evaluation:
    """Measures adapters, mixes and the base on texts.

    Args:
        texts: see `read_texts`.
        adapters: names, versions or mixes; `all` for every adapter of the base.
        store: where they are.
        recipe: its `evaluate` settings; its `base` if it was set, else that of the first adapter.
        reporter: shows progress, and says where a figure differs from the one that training stored.
        general: also measure general English.
        num_texts: number of documents of each text to continue and to judge; 0 = none.
        keep: keep the figures with the adapters, for their cards.
        keep_tokens: also return the log-probability of each token; of protocol `document` alone.
        ray: address of a Ray cluster on whose devices to measure; see `core.ray_cluster.connect`.

    Raises:
        NotFoundError: there is no such adapter.
        UsageError: window and stride do not fit the base, or tokens are asked for with another protocol.
    """
    if keep_tokens:
        check_protocol(recipe.evaluate)
    if keep:
        store.check_writable()
    if ray and num_texts:
        raise UsageError("texts are generated on this machine alone", "leave --ray or --generate out")
    if ray:
        measured = _measure_on_ray(
            texts, adapters, store, recipe, reporter, general=general, keep_tokens=keep_tokens, address=ray
        )
        session, tasks = None, []
    else:
        session, mixes = open_session(store, adapters, recipe, recipe.evaluate.dtype)
        tasks = [build_task(text, session.base.tokenizer, num_texts) for text in texts] if num_texts else []
        measured = _measure_here(session, mixes, texts, recipe, reporter, general=general, keep_tokens=keep_tokens)
    split = len(measured.rows) if measured.has_general else 0
    cells, forgetting = measured.cells[split:], measured.cells[:split]
    evaluation = Evaluation(
        cells=cells,
        forgetting=forgetting,
        base=measured.base,
        protocol=recipe.evaluate.protocol,
        window=measured.window,
        stride=measured.stride,
        dtype=measured.dtype,
        versions=measured.versions,
        generation=_judge_texts(session, measured.rows, tasks, recipe, reporter) if session and tasks else [],
        token_scores=measured.token_scores,
    )
    alone = {str(mix): measured.versions[str(mix)][0] for mix in measured.rows if mix and mix == Mix.single(str(mix))}
    manifests = {name: store.read_manifest(version) for name, version in alone.items()}
    for line in list_differences(manifests, texts, cells, evaluation.to_json()):
        reporter.message(line)
    if keep:
        if mixed := [str(mix) for mix in measured.rows if len(mix) > 1]:
            reporter.message(f"figures are kept with single adapters, not with {', '.join(mixed)}")
        _keep(evaluation, manifests, store)
    return evaluation


def read_texts(
    sources: Sequence[LabelledSource], store: Store, recipe: Recipe, reporter: Reporter
) -> list[EvaluationText]:
    """Reads the texts of sources; one that is no path, but an adapter's name, is what was held out of its training."""
    own_base = recipe.base if "base" in recipe.model_fields_set else None

    def find_held_out(label: str, name: str) -> EvaluationText | None:
        plain = name.partition("@")[0]
        if not (is_name(plain) and store.has_adapter(plain)):
            return None
        own = read_own_text(store, name, reporter, own_base)
        return EvaluationText(
            label=label,
            documents=own.held_out,
            profile=own.manifest.recipe["data"].get("profile", ""),
            files=own.test_files,
        )

    return read_sources(sources, recipe.data, reporter, find_held_out)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """The cells of some rows, those of general English first if there are any, and how they were measured."""

    rows: list[Mix]
    cells: list[Cell]
    has_general: bool
    base: str
    window: int
    stride: int
    dtype: str
    versions: dict[str, list[str]]
    token_scores: list[TokenScores]


def _choose_texts(
    rows: Sequence[Mix], texts: Sequence[EvaluationText], general: bool
) -> tuple[Sequence[EvaluationText], bool]:
    """Returns what to measure, and whether general English was added: that says what adapters, if any, forgot."""
    has_general = general and len(rows) > 1 and GENERAL not in [text.label for text in texts]
    return (add_general(texts) if has_general else texts), has_general


def _list_rows(mixes: Sequence[Mix]) -> list[Mix]:
    """Returns the rows of the matrix, the base first; mixes that are written alike are one."""
    rows = dict[str, Mix]()
    for mix in [Mix(), *mixes]:
        rows.setdefault(str(mix), mix)
    return list(rows.values())


def _measure_here(
    session: Session,
    mixes: Sequence[Mix],
    texts: Sequence[EvaluationText],
    recipe: Recipe,
    reporter: Reporter,
    *,
    general: bool,
    keep_tokens: bool,
) -> _Measured:
    rows = _list_rows(mixes)
    window, stride = choose_window(session.base.config, recipe.evaluate)
    exact = [session.resolve(mix) for mix in rows]  # a publication meanwhile changes nothing
    session.load([reference for mix in exact for reference in mix.references])
    measured, has_general = _choose_texts(rows, texts, general)
    cells = measure_matrix(
        session.base,
        {str(mix): session.select(found) for mix, found in zip(rows, exact, strict=True)},
        measured,
        recipe.evaluate,
        reporter,
        together=session.select(*exact),
        sketches=read_sketches(session.store, _list_versions(rows, exact)),
        keep_tokens=keep_tokens,
    )
    return _Measured(
        rows=rows,
        cells=cells,
        has_general=has_general,
        base=session.base.name,
        window=window,
        stride=stride,
        dtype=session.base.runtime.dtype_name,
        versions=_list_versions(rows, exact),
        token_scores=_list_token_scores(session.base.tokenizer, texts, measured, cells) if keep_tokens else [],
    )


def _measure_on_ray(
    texts: Sequence[EvaluationText],
    adapters: Sequence[str],
    store: Store,
    recipe: Recipe,
    reporter: Reporter,
    *,
    general: bool,
    keep_tokens: bool,
    address: str,
) -> _Measured:
    base = name_everywhere(find_base_name(store, adapters, recipe))
    checkpoint = Checkpoint.open(base)
    window, stride = choose_window(checkpoint.config, recipe.evaluate)
    tokenizer = checkpoint.load_tokenizer()
    identity = BaseIdentity(
        name=base, fingerprint=fingerprint_base(checkpoint), tokenizer_fingerprint=tokenizer.fingerprint
    )
    rows = _list_rows(list_mixes(store, adapters, identity.fingerprint))
    measured, has_general = _choose_texts(rows, texts, general)
    exact = [Mix((store.read_manifest(reference).reference, weight) for reference, weight in mix) for mix in rows]
    task = ScoringTask(base=identity, mixes=exact, settings=recipe.evaluate, keep_tokens=keep_tokens)
    documents = [text.documents for text in measured]
    sketches = read_sketches(store, _list_versions(rows, exact))
    scores, dtype = score_on_ray(address, task, documents, store, reporter)
    cells = build_cells([str(mix) for mix in rows], measured, scores, sketches)
    return _Measured(
        rows=rows,
        cells=cells,
        has_general=has_general,
        base=base,
        window=window,
        stride=stride,
        dtype=dtype,
        versions=_list_versions(rows, exact),
        token_scores=_list_token_scores(tokenizer, texts, measured, cells) if keep_tokens else [],
    )


def _list_token_scores(
    tokenizer: Tokenizer, own: Sequence[EvaluationText], measured: Sequence[EvaluationText], cells: Sequence[Cell]
) -> list[TokenScores]:
    """Returns those of all that was measured, the texts that were asked for first."""
    added = [text for text in measured if text not in own]
    return list(iter_token_scores(tokenizer, [*own, *added], cells))


def _list_versions(rows: Sequence[Mix], exact: Sequence[Mix]) -> dict[str, list[str]]:
    return {str(mix): list(map(label_of, found.references)) for mix, found in zip(rows, exact, strict=True) if mix}


def _judge_texts(
    session: Session, mixes: Sequence[Mix], tasks: Sequence[GenerationTask], recipe: Recipe, reporter: Reporter
) -> list[Quality]:
    settings = recipe.evaluate.model_copy(update={"protocol": "document"})  # of continuations, without their prompts

    def judge(name: str, texts: Sequence[Document]) -> float:
        return measure_perplexity(session.base, texts, settings, session.select(Mix.parse(name))).perplexity

    names = [str(mix) for mix in mixes]
    with catch_signals() as stop:
        write = build_writer(session, reporter, stop)
        found = [measure_quality(task, name, recipe.generate, write, judge) for task in tasks for name in names]
    for line in (line for quality in found for line in quality.warnings):
        reporter.message(line)
    return found


def _keep(evaluation: Evaluation, manifests: Mapping[str, Manifest], store: Store) -> None:
    how = {key: getattr(evaluation, key) for key in ("protocol", "window", "stride")}
    for name, manifest in manifests.items():
        found = [cell.to_json() for cell in [*evaluation.cells, *evaluation.forgetting] if cell.adapter == name]
        write_audit(store, manifest, "evaluation", {"cells": found, **how})
