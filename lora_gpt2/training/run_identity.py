"""What a run is made of: all that decides its numbers, and what those who watch it are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lora_gpt2.model.base import Base
from lora_gpt2.store.catalog import Store
from lora_gpt2.training.halving import Halving
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.slot import IRRELEVANT, MICRO_BATCHING, OF_MICRO_BATCHES, TrainingSlot

CHECKPOINT_FORMAT = 3  # version of what a checkpoint holds


def describe_run(
    base: Base, slots: Sequence[TrainingSlot], store: Store, halving: Halving | None, unreadable: Iterable[str]
) -> dict[str, Any]:
    """Returns what those who watch a run are told of it."""
    left_out = {"description": "", "num_steps": 0, "tokens_per_step": 0}
    return {
        "kind": "tune" if halving else "train",
        "base": base.name,
        "device": base.runtime.device.type,
        "dtype": base.runtime.dtype_name,
        "store": str(store.root.absolute()),
        "adapters": [
            {
                "name": slot.name,
                "description": slot.recipe.description,
                "num_steps": slot.num_steps,
                "tokens_per_step": slot.tokens_per_step,
            }
            for slot in slots
        ]
        + [{"name": name, **left_out} for name in unreadable],
    }


def identify_run(
    base: Base, slots: Sequence[TrainingSlot], process_group: ProcessGroup, parents: Sequence[str], replay: str
) -> dict[str, Any]:
    """Returns everything that decides the numbers of a run; what is under `MICRO_BATCHING` only by rounding."""
    return {
        MICRO_BATCHING: {
            slot.name: slot.recipe.train.model_dump(mode="json", include=OF_MICRO_BATCHES) for slot in slots
        },
        "format": CHECKPOINT_FORMAT,
        "order": [slot.name for slot in slots],
        "base": base.fingerprint,
        "dtype": base.runtime.dtype_name,
        "device": base.runtime.device.type,
        "processes": process_group.size,
        "replay": replay,
        "adapters": {
            slot.name: {
                "data": slot.data.fingerprint,
                "parent": parent,
                "lora": slot.recipe.lora.model_dump(mode="json"),
                "train": slot.recipe.train.model_dump(mode="json", exclude=IRRELEVANT | OF_MICRO_BATCHES)
                | {"learning_rate": slot.recipe.train.peak_learning_rate(base.config.n_embd)},
            }
            for slot, parent in zip(slots, parents, strict=True)
        },
    }
