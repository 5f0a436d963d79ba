"""TensorBoard, Weights & Biases and MLflow, through accelerate: our metrics in the tool that a team already has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_trackers_dir
from lora_gpt2.core.errors import ResourceError
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.checkpoint import RunFolder

Log = Callable[[str, Mapping[str, Any]], None]
PROJECT = "lora-gpt2"


@contextmanager
def track(recipes: Sequence[Recipe], run: RunFolder, reporter: Reporter, enabled: bool = True) -> Iterator[Log | None]:
    """Yields a function that logs a record of an adapter to the recipes' trackers, or None where there are none.

    Every run has a folder of its own in `find_trackers_dir()`; one that is resumed goes on in its own.

    Raises `ResourceError` if a tracker is not installed.
    """
    names = sorted({name for recipe in recipes for name in recipe.train.trackers})
    if not names or not enabled:
        yield None
        return
    label = f"{recipes[0].name}{f'-and-{len(recipes) - 1}' if len(recipes) > 1 else ''}-{run.begun:%Y%m%d-%H%M%S}"
    accelerator = _start(names, recipes, label)
    if "tensorboard" in names:
        reporter.message(f"curves: tensorboard --logdir {find_trackers_dir()}")

    def log(name: str, record: Mapping[str, Any]) -> None:
        numbers = {f"{name}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        accelerator.log(numbers, step=record["step"])

    try:
        yield log
    finally:
        accelerator.end_training()


def _start(names: Sequence[str], recipes: Sequence[Recipe], label: str) -> Any:
    hint = "pip install 'lora-gpt2[train-extras]' and the tracker's own package, or leave train.trackers empty"
    try:
        from accelerate import Accelerator
        from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available
    except ImportError as error:
        raise ResourceError("trackers need accelerate, which is not installed", hint) from error
    present = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "mlflow": is_mlflow_available}
    if missing := [name for name in names if not present[name]()]:
        raise ResourceError(f"the tracker {missing[0]} is not installed", hint)
    accelerator = Accelerator(log_with=list(names), project_dir=str(find_trackers_dir() / label), cpu=True)
    config = {
        f"{recipe.name}/{section}.{key}": value if isinstance(value, int | float) else str(value)
        for recipe in recipes
        for section in ("lora", "train")
        for key, value in getattr(recipe, section).model_dump(mode="json").items()
    }
    own = {"wandb": {"name": label}, "mlflow": {"run_name": label}}
    accelerator.init_trackers(PROJECT, config=config, init_kwargs={name: own[name] for name in names if name in own})
    return accelerator
