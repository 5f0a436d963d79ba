"""What `lora_gpt2` exports: little, complete, documented, typed, and free until it is used."""

import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lora_gpt2

ROOT = Path(__file__).parent.parent.parent
MAX_NAMES = 20


def test_all_is_importable_documented_and_short():
    names = lora_gpt2.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names) <= MAX_NAMES
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    for name in names:
        value = getattr(lora_gpt2, name)
        assert name in dir(lora_gpt2)
        if name != "__version__":
            assert inspect.getdoc(value), name
            assert f"### {name}\n" in page, f"docs/reference/python.md has no {name}"
    assert set(lora_gpt2._MODULES) | {"__version__"} == set(names)
    assert not hasattr(lora_gpt2, "no_such_name")


@pytest.mark.slow  # a minute where nothing of the package was checked before
def test_a_type_checker_sees_what_is_exported(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(
        "import lora_gpt2 as lg\n"
        "law: lg.AdapterReport = lg.train(['a'], name='law', epochs=3, callbacks=[print])\n"
        "model: lg.Model = lg.load('nano', adapters=['law'])\n"
        "text: str = model.generate('x', adapter=law, seed=1).text\n"
        "pieces: list[str] = list(model.stream('x'))\n"
        "low: float | None = model.perplexity(['a'], adapter='law').low\n"
        "lg.evaluate({'law': ['a']}, adapters='all').to_pandas()\n"
        "lg.train(['a'], epoch=3)  # type: ignore[call-arg]\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--warn-unused-ignores",
            "--config-file",
            ROOT / "pyproject.toml",
            script,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert (ROOT / "lora_gpt2" / "py.typed").is_file()


def test_importing_costs_nothing():
    code = (
        "import sys, lora_gpt2; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')))"
    )
    best = 9.0
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - started)
        assert done.stdout == "[]\n"
    assert best < 0.5
