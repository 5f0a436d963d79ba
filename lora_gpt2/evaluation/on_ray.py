"""An evaluation over the devices of a Ray cluster: each measures some adapters on some texts.

Adapters and texts are sent from this machine, whose store and files no other one has to see; of the base only the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import MismatchError, ResourceError
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.printable import count_of
from lora_gpt2.core.ray_cluster import TaskLost, connect
from lora_gpt2.evaluation.perplexity import Score, ScoringWindows, Text
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import load_for_inference
from lora_gpt2.inference.session import Session
from lora_gpt2.model.probe import check_finite_logits
from lora_gpt2.recipe import EvaluateSettings
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import check_base, identify
from lora_gpt2.store.manifest import PEFT_CONFIG, WEIGHTS, BaseIdentity
from lora_gpt2.store.peft.tensors import from_peft


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """What one device measures.

    Args:
        base: what it must be; every machine finds it by its name.
        mixes: the rows; empty for the base alone.
        settings: how to measure.
        keep_tokens: see `ScoringWindows.measure`.
    """

    base: BaseIdentity
    mixes: Sequence[Mix]
    settings: EvaluateSettings
    keep_tokens: bool = False


Weights = tuple[bytes, bytes]
"""`adapter_model.safetensors` and `adapter_config.json` of an adapter."""


def score_on_ray(
    address: str, whole: ScoringTask, texts: Sequence[Sequence[Text]], store: Store, reporter: Reporter
) -> tuple[list[list[Score]], str]:
    """Returns the scores `[mixes][texts]`, and the dtype in which they were measured.

    Args:
        address: see `connect`.
        whole: all that is to be measured.
        texts: the documents of each text.
        store: has the adapters.
        reporter: shows progress.

    Raises:
        MismatchError: an adapter is of another base, a machine has another base by that name, or devices measure in
            different dtypes.
        NotFoundError, CorruptError: of an adapter.
        ResourceError: see `connect`; or a machine cannot measure.
    """
    references = {reference for mix in whole.mixes for reference in mix.references}
    adapters = {reference: _read_weights(store, reference, whole.base) for reference in references}
    scores: dict[tuple[int, int], Score] = {}
    dtypes = set[str]()
    with connect(address) as cluster, catch_signals() as stop:
        kept = {reference: cluster.put(weights) for reference, weights in adapters.items()}
        calls, parts = {}, {}
        for rows, columns in divide(
            len(whole.mixes), [sum(map(_measure, text)) for text in texts], cluster.num_devices
        ):
            key = f"{rows} {columns}"
            task = replace(whole, mixes=[whole.mixes[row] for row in rows])
            needed = list(dict.fromkeys(reference for mix in task.mixes for reference in mix.references))
            parts[key] = [(row, column) for row in rows for column in columns]
            chosen = [texts[column] for column in columns]
            calls[key] = [task, chosen, needed, *(kept[reference] for reference in needed)]
        reporter.message(f"{count_of(len(calls), 'task')}; {cluster.describe()}")
        with reporter.task("measuring on Ray", len(whole.mixes) * len(texts), "cells") as progress:
            for key, result in cluster.run(_score_in_ray, calls, lambda: stop.raise_if_asked("nothing is kept")):
                if isinstance(result, TaskLost):
                    raise ResourceError(result.reason, "see 'ray status', and measure again")
                found, dtype = result
                scores |= dict(zip(parts[key], found, strict=True))
                dtypes.add(dtype)
                progress.advance(len(found))
    if len(dtypes) > 1:
        hint = "give one with --dtype, or use machines of one kind"
        raise MismatchError(f"the devices measured in different dtypes: {', '.join(sorted(dtypes))}", hint)
    shape = range(len(whole.mixes)), range(len(texts))
    return [[scores[row, column] for column in shape[1]] for row in shape[0]], dtypes.pop()


def divide(num_rows: int, sizes: Sequence[int], num_devices: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yields the rows and columns of each task: about as many tasks as devices, and as large as each other.

    Rows are divided first, because every task reads its texts; `sizes` are those of the columns.
    """
    num_groups = min(num_rows, num_devices)
    bounds = [num_rows * index // num_groups for index in range(num_groups + 1)]
    columns = _divide_columns(sizes, -(-num_devices // num_groups))
    for start, end in pairwise(bounds):
        for group in columns:
            yield range(start, end), group


def _divide_columns(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Returns the columns in at most `count` groups: the largest first, each to the group that has the least."""
    groups: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
    for column in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        min(groups, key=lambda group: sum(sizes[each] for each in group)).append(column)
    return [sorted(group) for group in groups]


def _measure(text: Text) -> int:
    return len(text if isinstance(text, str) else text.text)


def _read_weights(store: Store, reference: str, base: BaseIdentity) -> Weights:
    with store.open(reference) as version:
        check_base(version.manifest, base)
        return version.read_file(WEIGHTS), version.read_file(PEFT_CONFIG)


def _score_in_ray(
    task: ScoringTask, texts: Sequence[Sequence[Text]], references: Sequence[str], *adapters: Weights
) -> tuple[list[Score], str]:
    """Runs on a machine of the cluster."""
    return score_task(task, texts, dict(zip(references, adapters, strict=True)))


def score_task(
    task: ScoringTask, texts: Sequence[Sequence[Text]], adapters: Mapping[str, Weights]
) -> tuple[list[Score], str]:
    """Returns the scores of a task, row by row, and the dtype of the base here.

    Raises `MismatchError` if the base is another one, and what `from_peft` and `ScoringWindows` do.
    """
    base = load_for_inference(task.base.name, task.settings.dtype)
    if identify(base) != task.base:
        raise MismatchError(f"a machine has another base '{task.base.name}'", "copy the same one to all machines")
    session = Session(base, max_slots=max(1, len(adapters)))
    for reference, (weights, config) in adapters.items():
        adapter = from_peft(weights, config, base.config, reference)
        check_finite_logits(base, adapter, reference)
        session.load_in_memory({reference: adapter})
    windows = ScoringWindows(base, texts, task.settings)
    found = windows.measure(session.select(*task.mixes), len(task.mixes), can_mix=True, keep_tokens=task.keep_tokens)
    return [score for row in found for score in row], base.runtime.dtype_name
