"""One frozen GPT-2, many small adapters: train, keep, swap, mix and measure them.

    import lora_gpt2 as lg

    law = lg.train(texts, name="law", epochs=3)
    model = lg.load("nano", adapters=["law"])
    print(model.generate("The tenant", adapter="law"))

Nothing is imported before it is used, so that importing the package costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_gpt2.api.evaluation import evaluate
    from lora_gpt2.api.loading import load
    from lora_gpt2.api.merging import merge
    from lora_gpt2.api.model import Model
    from lora_gpt2.api.preferences import train_preferences
    from lora_gpt2.api.training import prepare, train, train_together, tune
    from lora_gpt2.core.errors import LoraGpt2Error
    from lora_gpt2.evaluation.run import Evaluation
    from lora_gpt2.inference.generate import Output
    from lora_gpt2.inference.mix import Mix
    from lora_gpt2.recipe import Recipe
    from lora_gpt2.store.catalog import Store
    from lora_gpt2.training.events import TrainingEvent
    from lora_gpt2.training.publish import AdapterReport
    from lora_gpt2.training.publish_preferences import PreferenceReport
    from lora_gpt2.training.tune import TuneReport

_MODULES = {
    "AdapterReport": "training.publish",
    "Evaluation": "evaluation.run",
    "LoraGpt2Error": "core.errors",
    "Mix": "inference.mix",
    "Model": "api.model",
    "Output": "inference.generate",
    "PreferenceReport": "training.publish_preferences",
    "Recipe": "recipe",
    "Store": "store.catalog",
    "TrainingEvent": "training.events",
    "TuneReport": "training.tune",
    "evaluate": "api.evaluation",
    "load": "api.loading",
    "merge": "api.merging",
    "prepare": "api.training",
    "train": "api.training",
    "train_preferences": "api.preferences",
    "train_together": "api.training",
    "tune": "api.training",
}
__all__ = [
    "AdapterReport",
    "Evaluation",
    "LoraGpt2Error",
    "Mix",
    "Model",
    "Output",
    "PreferenceReport",
    "Recipe",
    "Store",
    "TrainingEvent",
    "TuneReport",
    "__version__",
    "evaluate",
    "load",
    "merge",
    "prepare",
    "train",
    "train_preferences",
    "train_together",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
