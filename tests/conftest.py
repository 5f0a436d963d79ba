"""Tiny stand-ins for everything large: a base of two layers, a store, text. Unit tests check the shapes of tensors."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start: with more threads than cores, each waits for all
os.environ.setdefault("LORA_GPT2_CPU_DTYPE", "float32")  # or tests, and what they start, would differ between CPUs
MEMORY_DISK = Path("/dev/shm")
if MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; the children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from jaxtyping import config, install_import_hook

SHAPED = ["lora_gpt2.model", "lora_gpt2.inference", "lora_gpt2.evaluation", "lora_gpt2.training.optimizer"]
install_import_hook(SHAPED, "beartype.beartype")
OF_TRAINING = ("joint", "micro_batches", "optimizer", "preferences", "step", "trainer")
SHAPE_TESTS = ("model", "inference", "evaluation", "merging", *(f"training/test_{name}.py" for name in OF_TRAINING))

import hypothesis
import pytest
import torch

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.evaluation import general
from lora_gpt2.model.base import Base, load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.store.catalog import Store
from tests.builders import make_base_folder, make_text

hypothesis.settings.register_profile("no files", database=None)  # which would go into the current folder
hypothesis.settings.load_profile("no files")
SHARED = Path(os.environ.get("LORA_GPT2_SHARED", "../shared"))


@pytest.fixture(scope="session")
def short_general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("general") / "general.txt"
    path.write_text(f"She opened the door.{general.SEPARATOR}The king of the country.", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def shapes(request: pytest.FixtureRequest) -> None:
    """Shapes are checked where tests are about them; elsewhere the same functions run, in half the time."""
    is_checked = any(request.path.is_relative_to(Path(__file__).parent / "unit" / path) for path in SHAPE_TESTS)
    config.update("jaxtyping_disable", not is_checked or os.environ.get("JAXTYPING_DISABLE") == "1")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_general: Path) -> None:
    """Caches and stores of a test are its own; of the hub it has nothing, whatever this machine has fetched."""
    monkeypatch.setenv("LORA_GPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # for processes that a test starts
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))  # read at its import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LORA_GPT2_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(general, "TEXT", short_general)  # the real one takes a second per adapter
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_folder(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def base(base_folder: Path) -> Base:
    return load_base(str(base_folder), choose_runtime("float32", torch.device("cpu")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def reporter() -> SilentReporter:
    return SilentReporter()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(make_text(80), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data at {SHARED}: set LORA_GPT2_SHARED")
    return SHARED / "data"
