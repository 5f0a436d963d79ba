"""Which settings are good: learning rate × rank × targets over several domains, and a full fine-tune beside them.

All learning rates and domains of one shape of adapter train together, as slots over one base, so a grid costs one run
per shape. Finished shapes are kept in a file, line by line, and skipped when the grid is started again. Settings are
ranked by perplexity on each domain's validation text, in blocks as in training; test text, which nothing is chosen by,
is measured on beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_gpt2.bench.domains import build_recipe_for
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import DataError, TrainingDiverged
from lora_gpt2.core.files import write_atomic
from lora_gpt2.core.fingerprint import fingerprint_json
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.user_files import check_output, read_user_text
from lora_gpt2.data.blocks import BlockBatch
from lora_gpt2.data.inspect import list_documents
from lora_gpt2.data.prepared import PreparedData, prepare_data
from lora_gpt2.evaluation.perplexity import measure_perplexity, to_perplexity
from lora_gpt2.merging.into_base import TOKENIZER_FILES
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import BLOCKS, Recipe
from lora_gpt2.training.schedule import lr_factor
from lora_gpt2.training.slot import TrainedAdapter, TrainingSlot
from lora_gpt2.training.trainer import Trainer
from lora_gpt2.training.validation import measure_blocks, spread_blocks

TARGETS: dict[str, tuple[str, ...]] = {
    "all": BLOCKS,
    "all+head": (*BLOCKS, "lm_head"),
    "attention": ("c_attn", "attn.c_proj"),
    "c_attn": ("c_attn",),
    "q,v": ("c_attn.q", "c_attn.v"),
}
FORMAT = 2  # of what a point holds
FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Perplexity on a domain's validation and test text of one setting; `targets` is `full` for a full fine-tune.

    The base's is on test text. `setup` is a fingerprint of everything else: base, text and the other settings. A run
    that diverged has infinity.
    """

    setup: str
    domain: str
    targets: str
    rank: int
    learning_rate: float
    base_perplexity: float
    validation_perplexity: float
    perplexity: float
    best_step: int

    @property
    def key(self) -> tuple[str, str, str, int, float]:
        """What makes it another point."""
        return self.setup, self.domain, self.targets, self.rank, self.learning_rate


def measure_grid(
    folders: Sequence[Path],
    rates: Sequence[float],
    ranks: Sequence[int],
    targets: Sequence[str],
    overrides: Sequence[str],
    *,
    kept: Path,
    reporter: Reporter,
    full: bool = False,
) -> list[Point]:
    """Returns a point for each domain and setting; `full` adds full fine-tunes at `FULL_RATES` of the same budget."""
    recipes = [build_recipe_for(folder, overrides) for folder in folders]
    base = load_base(recipes[0].base, choose_runtime(recipes[0].train.dtype))
    data = {recipe.name: prepare_data(recipe.data, base.tokenizer, reporter) for recipe in recipes}
    setups = {recipe.name: _identify(base, recipe, data[recipe.name]) for recipe in recipes}
    known = {point.key: point for point in _read(kept)}
    wanted: list[tuple[str, str, str, int, float]] = []
    shapes = list(itertools.product(ranks, targets))
    for number, (rank, name) in enumerate(shapes, start=1):
        keys = {(setups[r.name], r.name, name, rank, rate): (r, rate) for r in recipes for rate in rates}
        wanted += keys
        if missing := [pair for key, pair in keys.items() if key not in known]:
            reporter.message(f"shape {number} of {len(shapes)}: rank {rank}, {name}")
            fresh = list(_train_shape(base, data, setups, missing, rank, name=name, reporter=reporter))
            known |= {point.key: point for point in fresh}
            _append(kept, fresh)
    for recipe, rate in itertools.product(recipes if full else (), FULL_RATES):
        key = (setups[recipe.name], recipe.name, "full", 0, rate)
        wanted.append(key)
        if key not in known:
            known[key] = _train_full(base, data[recipe.name], setups[recipe.name], recipe, rate, reporter)
            _append(kept, [known[key]])
    return [known[key] for key in wanted]


def _identify(base: Base, recipe: Recipe, data: PreparedData) -> str:
    varied = {"learning_rate", "sample_tokens", "sample_prompt", "trackers", "checkpoint_every"}
    train = recipe.train.model_dump(mode="json", exclude=varied)
    lora = recipe.lora.model_dump(mode="json", exclude={"rank", "alpha", "targets", "rank_pattern"})
    evaluate = recipe.evaluate.model_dump(mode="json")
    return fingerprint_json(
        [FORMAT, base.fingerprint, base.runtime.dtype_name, data.fingerprint, train, lora, evaluate]
    )


BEGINS = '{"setup": "'  # what begins each line of the file


def _read(kept: Path) -> list[Point]:
    check_output(kept)
    if not kept.exists():
        return []
    *lines, rest = read_user_text(kept).split("\n")  # a run that was killed may have left half a line
    try:
        if rest and not BEGINS.startswith(rest[: len(BEGINS)]):
            raise ValueError(rest)  # noqa: TRY301
        found = [json.loads(line) for line in lines]
        return [Point(**values) for values in found if "validation_perplexity" in values]  # not of an earlier version
    except (ValueError, TypeError) as error:
        raise DataError(f"{kept} holds no points of a grid", "name another file with --keep") from error


def _append(kept: Path, points: Sequence[Point]) -> None:
    whole = kept.read_bytes() if kept.exists() else b""
    if not whole.endswith(b"\n") and whole:  # half a line, see `_read`
        write_atomic(kept, whole[: whole.rfind(b"\n") + 1])
    with kept.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(point)) + "\n" for point in points)


def _train_shape(
    base: Base,
    data: Mapping[str, PreparedData],
    setups: Mapping[str, str],
    pairs: Sequence[tuple[Recipe, float]],
    rank: int,
    *,
    name: str,
    reporter: Reporter,
) -> Iterator[Point]:
    """Trains every domain at every rate together and yields their points."""
    recipes = []
    for recipe, rate in pairs:
        lora = recipe.lora.model_copy(
            update={"rank": rank, "alpha": None, "targets": TARGETS[name], "rank_pattern": {}}
        )
        train = recipe.train.model_copy(update={"learning_rate": rate, "sample_tokens": 0})
        recipes.append(recipe.model_copy(update={"lora": lora, "train": train}))
    trainer = Trainer(base, [TrainingSlot(recipe=recipe, data=data[recipe.name]) for recipe in recipes], reporter)
    found: dict[int, TrainedAdapter] = {}
    with catch_signals() as stop, contextlib.suppress(TrainingDiverged):
        found = {id(trained.slot): trained for trained in trainer.train(stop)}
    for slot in trainer.slots:
        trained = found.get(id(slot))
        validation = trained.validation_nll if trained else math.inf
        tested = trained.test_nll if trained else None
        rate = slot.recipe.train.peak_learning_rate(base.config.n_embd)
        yield Point(
            setup=setups[slot.name],
            domain=slot.name,
            targets=name,
            rank=rank,
            learning_rate=rate,
            base_perplexity=to_perplexity(tested[0]) if tested else _measure_test(base, slot.data, slot.recipe),
            validation_perplexity=to_perplexity(validation),
            perplexity=to_perplexity(tested[1]) if tested else math.inf,
            best_step=slot.best_step,
        )


def _compute_loss(model: Any, rows: BlockBatch) -> torch.Tensor:
    """Returns the mean cross-entropy of a batch under a model of transformers."""
    inputs, targets = (torch.from_numpy(side).to(model.device) for side in (rows.inputs, rows.targets))
    loss: torch.Tensor = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    return loss


def _train_full(base: Base, data: PreparedData, setup: str, recipe: Recipe, rate: float, reporter: Reporter) -> Point:
    """Trains all weights of a copy of the base, with torch's AdamW, on the blocks an adapter would see."""
    from transformers import GPT2LMHeadModel

    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel.from_pretrained(base.folder, dtype=torch.float32, **quiet).to(base.runtime.device)
    slot = TrainingSlot(recipe=recipe, data=data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=recipe.train.weight_decay)

    @torch.no_grad()
    def validate() -> float:
        total = seen = 0.0
        for index in spread_blocks(data.validation, slot.validation_tokens):
            rows = data.validation.read([index])
            scored = int((rows.targets >= 0).sum())
            total, seen = total + _compute_loss(model, rows).item() * scored, seen + scored
        return total / seen

    best, best_step, best_state = math.inf, 0, model.state_dict()
    with reporter.task(f"full fine-tune of {recipe.name} at {rate:g}", slot.num_steps, "steps") as task:
        for step in range(slot.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_factor(step, slot.num_steps, recipe.train)
            _compute_loss(model, slot.order.read(step)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % slot.validate_every == 0 or step + 1 == slot.num_steps:
                nll = validate()
                if nll < best:
                    best, best_step = nll, step + 1
                    best_state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            task.advance(1)
    model.load_state_dict(best_state)
    tuned = _convert(model, base)
    return Point(
        setup=setup,
        domain=recipe.name,
        targets="full",
        rank=0,
        learning_rate=rate,
        base_perplexity=_measure_test(base, data, recipe),
        validation_perplexity=to_perplexity(measure_blocks(tuned, data.validation, None)),
        perplexity=_measure_test(tuned, data, recipe),
        best_step=best_step,
    )


def _convert(model: Any, base: Base) -> Base:
    """Returns a model of transformers as a base, so that it is measured as adapters are."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (base.folder / name).is_file():
                shutil.copyfile(base.folder / name, Path(folder) / name)
        return load_base(folder, base.runtime)


def _measure_test(base: Base, data: PreparedData, recipe: Recipe) -> float:
    """Returns the perplexity of the test documents, by the protocol of `evaluate`, as training measures it."""
    return measure_perplexity(base, list_documents(data, "test", base.tokenizer), recipe.evaluate).perplexity


def find_best(points: Sequence[Point]) -> Mapping[str, Point]:
    """Returns each domain's best point among the adapters, by validation."""
    best: dict[str, Point] = {}
    for point in points:
        least = best[point.domain].validation_perplexity if point.domain in best else math.inf
        if point.targets != "full" and point.validation_perplexity < least:
            best[point.domain] = point
    return best


def rank_settings(points: Sequence[Point]) -> list[tuple[str, int, float, float, float]]:
    """Returns (targets, rank, rate, worst, mean) of validation perplexity over the domain's best, the best first."""
    best = find_best(points)
    groups: dict[tuple[str, int, float], list[float]] = {}
    for point in points:
        if point.targets != "full":
            key = (point.targets, point.rank, point.learning_rate)
            least = best[point.domain].validation_perplexity if point.domain in best else math.nan
            ratio = point.validation_perplexity / least if math.isfinite(least) else math.inf
            groups.setdefault(key, []).append(ratio)
    rows = [(*key, max(ratios), sum(ratios) / len(ratios)) for key, ratios in groups.items()]
    return sorted(rows, key=lambda row: row[3])
