import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from lora_gpt2.core.errors import ConflictError, ResourceError, UsageError
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_lock
from lora_gpt2.core.paths import check_name, find_cache_dir, os_errors_as_ours, temporary_dir, write_atomic


@pytest.mark.parametrize("name", ["a", "legal", "a.b-c_d", "0x", "a" * 64])
def test_good_names_pass(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "A", "a/b", "../a", "a" * 65, "base", "all", "auto", "a b", "ä", "a\n"]
)
def test_bad_names_are_refused(name):
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert "1 to 64" in caught.value.hint


def test_an_atomic_write_replaces_the_whole_file_and_honours_the_umask(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old content that is longer")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    fired = []

    def fail(fd):
        fired.append(fd)
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError) as caught, os_errors_as_ours("write f"):
        write_atomic(path, b"new")
    assert fired, "the fault did not fire"
    assert "no space is left" in caught.value.message
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_temporary_dir_goes_with_an_exception(tmp_path):
    with pytest.raises(ValueError, match="x"), temporary_dir(tmp_path, "t") as work:
        (work / "a").write_text("a")
        raise ValueError("x")
    assert not list(tmp_path.iterdir())


def test_a_held_lock_is_refused_with_the_owner_and_free_afterwards(tmp_path):
    path = tmp_path / "lock"
    with hold_lock(path, "the run"), pytest.raises(ConflictError) as caught, hold_lock(path, "the run"):
        pass
    assert str(os.getpid()) in caught.value.message
    with hold_lock(path, "the run"):
        pass


def test_the_cache_has_a_place_without_a_home(monkeypatch):
    for name in ("LORA_GPT2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert find_cache_dir().name == "lora-gpt2"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_ignored_signals_stay_ignored_and_others_are_noted(name):
    number = getattr(signal, name)
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            os.kill(os.getpid(), number)
            assert stop.signal_number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, previous)


def test_a_signal_that_a_shell_ignores_for_its_background_jobs_stays_ignored():
    """As `lora-gpt2 train … &` in a script: Ctrl-C is for the script; SIGTERM still ends the work in order."""
    code = """
import os, signal
from lora_gpt2.core.interrupt import catch_signals
with catch_signals() as stop:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        print(int(stop.signal_number))
"""
    shell = ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "15"]
