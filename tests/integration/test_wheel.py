"""The wheel, installed in an environment with nothing else, gives the demo in an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MINUTES = 60


def run(*command, cwd, minutes=10, **more):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, timeout=minutes * MINUTES, **more
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_has_what_the_program_needs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "lora_gpt2/py.typed",
        "lora_gpt2/bases/nano/model.safetensors",
        "lora_gpt2/_recipes/prose.yaml",
        "lora_gpt2/serving/page/app.js",
        "lora_gpt2/core/pages/layout.html",
        "lora_gpt2/evaluation/general.txt",
    ):
        assert needed in names
    tops = {name.partition("/")[0] for name in names}
    assert all(top == "lora_gpt2" or top.endswith(".dist-info") for top in tops), tops


@pytest.mark.slow
def test_a_clean_environment_runs_the_demo(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    pip = [binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path, minutes=20)
    work = tmp_path / "work"
    work.mkdir()
    keep = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "LORA_GPT2_CACHE": f"{tmp_path}/c",
    }
    shown = run(binaries / "lora-gpt2", "demo", cwd=work, minutes=8, env=keep)
    assert "demo-code" in shown
    assert sorted(path.name for path in (work / "adapters").iterdir() if not path.name.startswith(".")) == [
        "demo-code",
        "demo-licences",
        "demo-reference",
    ]
    said = run(binaries / "lora-gpt2", "doctor", cwd=work, env=keep)
    assert "ok train a step on nano" in said
    assert "-- documents" in said, "an extra that is not there is named, and nothing fails"
