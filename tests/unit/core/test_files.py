import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.errors import ConflictError, CorruptError, ResourceError, UsageError
from lora_gpt2.core.files import read_regular, temporary_dir, wrap_os_errors, write_atomic, write_user_file
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.core.locks import hold_for_removal, hold_lock, hold_shared
from lora_gpt2.core.names import check_name


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
    with pytest.raises(ResourceError) as caught, wrap_os_errors("write f"):
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


def forbid_reading(monkeypatch):
    """Lets no byte of any file be read through `os` until it is undone."""

    def refuse(*arguments):
        raise AssertionError("it was read")

    monkeypatch.setattr(os, "read", refuse)


@pytest.mark.parametrize("limit", [0, 1, 64, 5000])
def test_a_file_is_read_up_to_its_limit_and_a_larger_one_is_refused_unread(tmp_path, monkeypatch, limit):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 20)
    os.truncate(path, limit)
    content = path.read_bytes()
    assert read_regular(path, limit) == read_regular(str(path)) == content
    assert len(content) == limit
    os.truncate(path, limit + 1)
    assert len(read_regular(path)) == limit + 1, "without a limit, all of it"
    forbid_reading(monkeypatch)
    for size in (limit + 1, 2**40):
        os.truncate(path, size)
        with pytest.raises(CorruptError) as caught:
            read_regular(path, limit)
        assert f"{size:,} bytes, expected at most {limit:,}" in caught.value.message
        assert caught.value.hint


def test_a_file_that_is_read_in_pieces_comes_whole(tmp_path, monkeypatch):
    path, real = tmp_path / "f", os.read
    path.write_bytes(bytes(range(256)))
    monkeypatch.setattr(os, "read", lambda handle, count: real(handle, min(count, 7)))
    assert read_regular(path, 256) == bytes(range(256))


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "device"])
def test_nothing_but_a_plain_file_is_read_or_waited_for(tmp_path, monkeypatch, kind):
    path, other = tmp_path / "f", tmp_path / "other"
    other.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = "/dev/zero"
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nothing")
    forbid_reading(monkeypatch)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(CorruptError, match="plain file"):
        read_regular(path, 100)
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0), "and nothing stays open"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "missing")


def is_held(folder):
    """True if somebody holds the folder against removal."""
    with hold_for_removal(folder) as is_ours:
        return not is_ours


def test_a_folder_is_held_for_exactly_as_long_as_it_is_read(tmp_path):
    folder, other = tmp_path / "1", tmp_path / "2"
    folder.mkdir()
    other.mkdir()
    with hold_shared(folder) as found:
        assert found
        assert (is_held(folder), is_held(other)) == (True, False)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as many read as wish to
        os.close(handle)
    assert not is_held(folder)
    with pytest.raises(ValueError, match="x"), hold_shared(folder):
        raise ValueError("x")
    assert not is_held(folder), "also when reading fails"
    with hold_for_removal(folder) as is_ours:
        assert is_ours
        assert is_held(folder), "one at a time removes"
    for missing in (tmp_path / "nothing", tmp_path / "nothing" / "1"):
        with hold_shared(missing) as found:
            assert found is False
    (tmp_path / "file").write_text("x")
    with hold_shared(tmp_path / "file") as found:
        assert found is False


@pytest.mark.parametrize("change", ["nothing", "removed", "replaced", "moved away", "a file"])
def test_a_folder_that_changes_while_it_is_taken_hold_of_is_not_held(tmp_path, monkeypatch, change):
    """What is held must be what has the name now: between opening a folder and locking it, it may have gone."""
    folder, lock = tmp_path / "1", fcntl.flock
    folder.mkdir()
    (folder / "old").touch()

    def change_before(handle, operation):
        if change == "removed":
            shutil.rmtree(folder)
        elif change != "nothing":
            folder.rename(tmp_path / "away")  # so that the new one cannot get the old one's inode
            if change == "replaced":
                folder.mkdir()
            elif change == "a file":
                folder.touch()
        return lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", change_before)
    with hold_shared(folder) as found:
        assert found is (change == "nothing")
    monkeypatch.undo()
    if folder.is_dir():
        assert not is_held(folder)


def test_what_a_user_names_is_replaced_as_a_whole_and_a_link_stays_one(tmp_path, monkeypatch):
    kept, link = tmp_path / "kept.html", tmp_path / "link.html"
    write_user_file(kept, "one")
    link.symlink_to(kept)
    write_user_file(link, b"two")
    assert link.is_symlink()
    assert kept.read_text() == "two"
    write_user_file(Path(os.devnull), "gone")
    assert not Path(os.devnull).is_file()
    monkeypatch.setattr(os, "write", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_user_file(kept, "three")
    monkeypatch.undo()
    assert kept.read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.html", "link.html"]


def test_a_file_system_without_locks_is_read_and_never_removed_from(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_shared(tmp_path) as found:
        assert found
    with pytest.raises(ResourceError, match="file system without locks"), hold_for_removal(tmp_path):
        pass
