"""What works on this machine: each thing is tried, not looked up.

Nothing is published, and the network is asked only where the caller wants it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from lora_gpt2 import __version__
from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.dirs import find_cache_dir, find_state_dir
from lora_gpt2.core.errors import LoraGpt2Error
from lora_gpt2.data.pipeline import count_cores
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import HUB_NAMES
from lora_gpt2.model.runtime import DTYPES, choose_device, choose_runtime
from lora_gpt2.recipe import GenerateSettings, Recipe, build_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.changes import measure_bytes
from lora_gpt2.store.verify import verify_files
from lora_gpt2.training.slot import TrainingSlot
from lora_gpt2.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "datasets",
    "evaluate",
    "huggingface-hub",
    "bitsandbytes",
    "accelerate",
    "numpy",
    "pydantic",
    "click",
)
OPTIONAL = {
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "gguf": ("gguf",),
    "languages": ("py3langid",),
    "train-extras": ("accelerate",),
    "documents": ("pypdf", "docx", "odf", "pysubs2", "defusedxml"),
    "quality": ("sacrebleu", "rouge_score"),
    "lm-eval": ("lm_eval",),
    "ray": ("ray",),
}
"""Extras of the package, and what they import."""
TRAINING, GENERATING, STORE = "train a step on nano", "generate with nano", "store"
ESSENTIAL = (TRAINING, GENERATING, STORE)
"""What must work everywhere."""
HUB_SECONDS = 5.0
MATMUL = 64


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was tried or looked at.

    Args:
        topic: heading under which it stands.
        name: what it is.
        status: `ok`, `missing` (an extra, or a device that is not there) or `failed`; "" for plain information.
        detail: what was found, or what to do.
    """

    topic: str
    name: str
    status: str
    detail: str


def examine(store: Store, with_hub: bool = False) -> Iterator[Finding]:
    """Yields what was found, topic by topic; `with_hub` asks the Hugging Face hub whether it can be reached."""
    yield from _describe_machine()
    yield from _describe_versions()
    for name in DTYPES:
        yield _attempt("dtype", name, partial(_multiply, name))
    yield _attempt("works", TRAINING, partial(_train, "none"))
    for quantize in ("int8", "nf4"):
        yield _attempt("works", f"train on an {quantize} base", partial(_train, quantize))
    yield _attempt("works", GENERATING, _generate)
    yield _attempt("works", "draw a picture", _draw)
    for extra, modules in OPTIONAL.items():
        yield _look_for(extra, modules)
    yield from _look_at_places(store)
    if with_hub:
        yield _attempt("hub", "huggingface.co", _reach_hub)
    else:
        yield Finding(topic="hub", name="huggingface.co", status="", detail="not asked; --hub does")


def _describe_machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding(topic="machine", name="system", status="", detail=f"{platform.platform()}, {platform.machine()}")
    yield Finding(
        topic="machine",
        name="Python",
        status="",
        detail=f"{platform.python_version()} ({platform.python_implementation()})",
    )
    yield Finding(
        topic="machine", name="CPU", status="", detail=f"{platform.processor() or 'unknown'}, {count_cores()} cores"
    )
    yield Finding(
        topic="machine",
        name="memory",
        status="",
        detail=f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
    )
    device = choose_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        yield Finding(topic="machine", name="GPU", status="ok", detail=f"{name}, CUDA {torch.version.cuda}")
    else:
        built = "this torch has no CUDA" if torch.version.cuda is None else "torch finds none"
        yield Finding(topic="machine", name="GPU", status="missing", detail=f"computing on {device.type}; {built}")
    runtime = choose_runtime("auto")
    yield Finding(
        topic="machine", name="default dtype", status="", detail=f"{runtime.dtype_name} on {runtime.device.type}"
    )


def _describe_versions() -> Iterator[Finding]:
    yield Finding(topic="versions", name="lora-gpt2", status="", detail=__version__)
    for name in LIBRARIES:
        try:
            yield Finding(topic="versions", name=name, status="", detail=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(topic="versions", name=name, status="missing", detail=f"pip install {name}")


def _attempt(topic: str, name: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding(topic=topic, name=name, status="ok", detail=work())
    except LoraGpt2Error as error:
        return Finding(topic=topic, name=name, status="failed", detail=f"{error.message}; {error.hint}")
    except Exception as error:  # noqa: BLE001 - whatever a library raises here is what the user has to know
        return Finding(topic=topic, name=name, status="failed", detail=f"{type(error).__name__}: {error}")


def _multiply(name: str) -> str:
    device, dtype = choose_device(), DTYPES[name]
    matrix = torch.eye(MATMUL, device=device, dtype=dtype)
    if not torch.equal(matrix @ matrix, matrix):
        raise ArithmeticError("the identity times itself is something else")
    slow = device.type == "cpu" and name == "float16"
    return f"on {device.type}{', but hundreds of times slower than float32' if slow else ''}"


def _train(quantize: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n\n".join(f"Sentence number {number} of the doctor's text." for number in range(400)))
        values = {
            "name": "doctor",
            "data": {"sources": [str(text)], "block_size": 64, "unit": "paragraph"},
            "lora": {"rank": 2},
            "train": {"steps": 1, "batch_tokens": 64, "quantize": quantize, "sample_tokens": 0},
        }
        recipe: Recipe = build_recipe(values, "doctor")
        base = load_base(recipe.base, choose_runtime("auto"), quantize)
        data = prepare_data(recipe.data, base.tokenizer, SilentReporter(), Path(folder))
        slot = TrainingSlot(recipe=recipe, data=data)
        Trainer(base, [slot], SilentReporter()).run_step([0])
        return f"loss {slot.records[-1]['loss']:.2f}"


def _generate() -> str:
    session = Session(load_base("nano", choose_runtime("auto")))
    output = generate(session, [Request("Once")], GenerateSettings(max_new_tokens=8, temperature=0))[0]
    return repr(output.text)


def _draw() -> str:
    from lora_gpt2.core.chart import draw_chart

    def plot(axes: Axes) -> None:
        axes.plot([0, 1])

    return f"{len(draw_chart(plot, 'png')):,} bytes"


def _look_for(extra: str, modules: tuple[str, ...]) -> Finding:
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        return Finding(
            topic="extras", name=extra, status="missing", detail=f"pip install 'lora-gpt2[{extra}]' ({error.name})"
        )
    return Finding(topic="extras", name=extra, status="ok", detail=", ".join(modules))


def _look_at_places(store: Store) -> Iterator[Finding]:
    references = [f"{name}@{version}" for name in store.list_names() for version in store.list_versions(name)]
    damaged = [
        f"{verdict.reference}: {verdict.failure}"
        for verdict, _ in (verify_files(store, each) for each in references)
        if not verdict.is_sound
    ]
    damaged += filter(None, (_find_damage(store, name) for name in store.list_names()))
    damaged += ["it is no folder"] if store.root.exists() and not store.root.is_dir() else []
    where = f"{store.root.absolute()}: {len(references)} versions of {len(store.list_names())} adapters"
    if damaged:
        yield Finding(topic="places", name=STORE, status="failed", detail=f"{where}; {damaged[0]}")
    else:
        yield Finding(topic="places", name=STORE, status="ok", detail=f"{where}, every byte as it was published")
    for name, folder in (("cache", find_cache_dir()), ("state", find_state_dir())):
        yield _attempt("places", name, partial(_write_into, folder))


def _find_damage(store: Store, name: str) -> str:
    """Returns what is wrong with what says which version of an adapter is in use, "" if nothing is."""
    try:
        store.read_manifest(name)
    except LoraGpt2Error as error:
        return f"{name}: {error.message}"
    return ""


def _write_into(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    free = psutil.disk_usage(str(folder)).free
    return f"{folder}: {measure_bytes(folder) / 1e9:.1f} GB, {free / 1e9:.1f} GB free"


def _reach_hub() -> str:
    from huggingface_hub import HfApi

    identifier = HUB_NAMES["gpt2"]
    return f"{identifier} has commit {str(HfApi().model_info(identifier, timeout=HUB_SECONDS).sha)[:7]}"
