"""What ties a program to Linux is either not used or has another way; tried out in processes that lack it."""

import ast
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter
from tests.windows import MODULES, NAMES

ROOT = Path(__file__).parent.parent.parent
TREE = sorted((ROOT / "lora_gpt2").rglob("*.py"))
TINY = {
    "data.block_size": 16,
    "train.batch_tokens": 64,
    "train.steps": 3,
    "lora.rank": 2,
    "data.num_proc": 1,
    "train.dtype": "float32",
    "evaluate.dtype": "float32",
    "generate.dtype": "float32",
    "generate.max_new_tokens": 4,
}


def iter_ties(source):
    """Yields the line and name of each import and each attribute that not every system has."""
    tree = ast.parse(source)
    late = {id(node) for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name in MODULES and id(node) not in late)
            if isinstance(node, ast.ImportFrom):
                hidden = [alias.name for alias in node.names if alias.name in NAMES.get(node.module, ())]
                yield from ((node.lineno, f"{node.module}.{name}") for name in hidden)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES.get(getattr(node.value, "id", ""), ()):
            yield node.lineno, f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fcntl", ["fcntl"]),
        ("from resource import getrusage", ["resource"]),
        ("if True:\n import os, termios", ["termios"]),
        ("os.open(p, os.O_RDONLY | os.O_DIRECTORY)", ["os.O_DIRECTORY"]),
        ("def f(): return signal.SIGALRM", ["signal.SIGALRM"]),
        ("from os import fork", ["os.fork"]),
        ("def f():\n import fcntl", []),
        ("getattr(os, 'O_DIRECTORY', 0)", []),
    ],
)
def test_the_search_finds_what_ties_a_program_to_a_system(source, found):
    assert [name for _, name in iter_ties(source)] == found


def test_no_module_needs_what_only_some_systems_have():
    ties = [(str(path.relative_to(ROOT)), *tie) for path in TREE for tie in iter_ties(path.read_text(encoding="utf-8"))]
    assert not ties


def test_float64_is_not_asked_of_a_device_that_may_lack_it():
    on_the_cpu = {
        "model/merge.py",
        "merging/combine.py",
        "model/runtime.py",
        "inference/sampling.py",
    }  # adapters that came from files; as_float64; logits that the decoder brought to the CPU
    found = {str(path.relative_to(ROOT / "lora_gpt2")) for path in TREE if ".double()" in path.read_text("utf-8")}
    assert found == on_the_cpu


@pytest.fixture
def children():
    """Starts Python programs that talk over pipes; they end with the test."""
    started = []

    def start(program, *arguments):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def windows(children):
    """Runs command lines in a process where lora_gpt2 finds only what Windows has; returns stdout, or else stderr."""
    process = children("from tests.windows import main; main()")

    def begin(*arguments):
        process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        process.stdin.flush()

    def end(code=0):
        found, out, err = json.loads(process.stdout.readline())
        assert found == code, err[-3000:]
        return out if code == 0 else err

    def call(*arguments, code=0):
        begin(*arguments)
        return end(code)

    call.begin, call.end = begin, end
    return call


def settings(*names):
    return [part for name in names for part in ("--set", f"{name}={TINY[name]}")]


@pytest.fixture
def trained(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(figures={"train_tokens": 1000}))
    return store


def test_the_store_works_on_windows(windows, trained):
    assert "train" in windows("--help")
    assert json.loads(windows("recipes", "list", "--json"))["recipes"]
    windows("adapters", "copy", "law", "twin")
    windows("adapters", "copy", "code", "twin")
    windows("adapters", "rename", "twin", "other")
    windows("adapters", "remove", "other@1")
    windows("adapters", "remove", "other")
    assert {row["name"] for row in json.loads(windows("adapters", "list", "--json"))["adapters"]} == {"law", "code"}
    windows("adapters", "restore", "other")
    assert trained.read_current("other") == 2
    windows("adapters", "rollback", "other", code=4)
    assert "con" in windows("adapters", "copy", "law", "con", code=2)
    windows("adapters", "gc")
    assert not list((trained.root / ".trash").iterdir())
    windows("adapters", "export", "other", trained.root.parent / "out")
    windows("adapters", "verify", "other", "--files-only")


def test_text_is_prepared_trained_on_and_written_on_windows(windows, base_folder, text_file, tmp_path, store):
    shape = settings("data.block_size", "data.num_proc")
    report = json.loads(windows("prepare", text_file, "--base", base_folder, "--json", *shape))
    assert report["documents_kept"] > 20
    common = ["--base", base_folder, "--data", text_file, "--name", "mine", *shape]
    common += settings("train.batch_tokens", "train.steps", "lora.rank", "train.dtype")
    windows("train", *common)
    windows("train", *common, "--resume")
    windows("train", *common)
    assert store.list_versions("mine") == [1, 2]
    assert b"\r\n" not in (store.resolve("mine") / "metrics.jsonl").read_bytes()
    how = settings("generate.dtype", "generate.max_new_tokens")
    made = json.loads(windows("generate", "the cat", "--adapter", "mine", "--base", base_folder, "--json", *how))
    assert made["outputs"][0]["tokens"] == 4
    out = tmp_path / "merged"
    windows("merge", "mine:4", "--into-base", out)
    assert (out / "model.safetensors").exists()


HOLD = """
import os, sys, time
from pathlib import Path
from tests.windows import install
install()
from lora_gpt2.core import errors, locks
folder = Path(sys.argv[2])
try:
    with getattr(locks, sys.argv[1])(folder, *(["the run"] if sys.argv[1] == "hold_lock" else [])):
        print(os.getpid(), flush=True)
        sys.stdin.readline()
except errors.ConflictError as error:
    print(error.message)
"""


@pytest.fixture
def hold(children):
    """Starts a process that holds something until it reads a line; returns it with the first line that it writes."""

    def call(how, path):
        process = children(HOLD, how, path)
        return process, process.stdout.readline().strip()

    return call


def test_a_lock_without_flock_names_its_owner_and_is_free_when_that_dies(hold, tmp_path):
    path = tmp_path / "locks" / "law"
    owner, pid = hold("hold_lock", path)
    assert pid == str(owner.pid)
    assert hold("hold_lock", path)[1] == f"the run is in use by process {pid}"
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    second, pid = hold("hold_lock", path)
    assert pid == str(second.pid)
    assert hold("hold_lock", path)[1] == f"the run is in use by process {pid}"


def test_unfinished_work_without_flock_waits_for_its_owner(hold, children, tmp_path):
    owner, _ = hold("hold_new_folder", tmp_path / "work")
    waiting = children(HOLD, "hold_new_folder", tmp_path / "work")
    assert not select.select([waiting.stdout], [], [], 2)[0]
    os.kill(owner.pid, signal.SIGKILL)
    assert waiting.stdout.readline().strip() == str(waiting.pid)


def test_a_folder_that_is_read_is_not_removed_on_windows(hold, windows, trained):
    windows("adapters", "copy", "law", "code")
    reader, _ = hold("hold_shared", trained.resolve("code@1"))
    said = windows("adapters", "remove", "code@1", code=6)
    assert "code@1 is being read by another process" in said
    windows("adapters", "remove", "code", code=6)
    assert "code is being read" in windows("adapters", "rename", "code", "new", code=6)
    assert "code@1" in windows("adapters", "gc", "--keep", "1", "--json")
    assert trained.list_versions("code") == [1, 2]
    assert trained.list_names() == ["code", "law"]
    reader.communicate("\n")
    windows("adapters", "remove", "code@1")
    assert trained.list_versions("code") == [2]


def test_a_file_that_is_read_is_replaced_when_the_reader_is_done(windows, trained):
    with (trained.root / "law" / "CURRENT").open("rb"):
        assert "permission is denied" in windows("adapters", "copy", "code", "law", code=7)
        windows.begin("adapters", "copy", "code", "law")
        time.sleep(0.3)
        assert Store(trained.root).read_current("law") == 1
    windows.end()
    assert Store(trained.root).read_current("law") == 3


CONTROL = """
import mmap, os
from pathlib import Path
from tests.windows import install
install()
Path("folder").mkdir()
(Path("folder") / "file").write_text("x")
(Path("folder") / "mapped").write_text("x")
with open("folder/mapped", "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
held = open("folder/file")
for work in (
    lambda: os.rename("folder", "other"), lambda: os.rename("folder/file", "other"), lambda: os.unlink("folder/file"),
    lambda: os.replace("folder/mapped", "other"), lambda: __import__("shutil").rmtree("folder"),
):
    try:
        work()
        print("done")
    except PermissionError:
        print("refused")
held.close()
mapped.close()
os.rename("folder", "other")
print(sorted(os.listdir("other")))
"""


def run_program(program, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_stand_in_for_windows_refuses_what_windows_refuses(tmp_path):
    assert run_program(CONTROL, tmp_path) == [*["refused"] * 5, "['file', 'mapped']"]


LIMIT = """
from tests.windows import install
install()
import time
from lora_gpt2.data import shards
for seconds in (9, 0.01):
    try:
        with shards._time_limit(seconds):
            time.sleep(0.1)
        print("in time")
    except shards._TooSlowError:
        print("too slow")
from pathlib import Path
from lora_gpt2.core import errors, files, interrupt, user_files
print([each.name for each in interrupt.SIGNALS])
Path("target").write_text("x")
Path("link").symlink_to("target")
try:
    files.read_regular("link")
except errors.CorruptError as error:
    print(error.message)
try:
    user_files.read_user_file(Path("."))
except errors.UsageError as error:
    print(error.message)
"""


def test_what_replaces_alarms_and_refused_links(tmp_path):
    lines = run_program(LIMIT, tmp_path)
    assert lines[:3] == ["in time", "too slow", "['SIGINT', 'SIGTERM']"]
    assert lines[3:] == ["link is a link, expected a plain file", ". is not a regular file"]
