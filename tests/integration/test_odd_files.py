"""Pipes, devices and empty names where a file is expected: refused at once, never waited for or read for ever."""

import os

import pytest

SECONDS = 20


@pytest.fixture(params=["fifo", "/dev/zero"])
def odd(request, tmp_path):
    if request.param == "fifo":
        os.mkfifo(tmp_path / "fifo")
        return tmp_path / "fifo"
    return request.param


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the\n")
    return path


@pytest.fixture(autouse=True)
def watched():
    """Ends a test that waits, as the old code did."""
    import signal

    def give_up(*_):
        raise TimeoutError(f"it waited for more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_where_a_file_is_read(run, odd, prompts, base_folder, tmp_path):
    for command in (
        ["recipes", "check", odd],
        ["train", odd],
        ["generate", "--prompts", odd, "--out", tmp_path / "out"],
        ["rate", "--adapter", "a", "--adapter", "base", "--prompts", odd, "--out", tmp_path / "round"],
        ["evaluate", prompts, "--baseline", odd],
        ["audit", "memorization", "mine", "--canaries", odd],
        ["audit", "watermark", odd],
    ):
        code, _, err = run(*command)
        assert code == (3 if command[0] == "train" else 2), command
        assert f"error: {odd} is not a regular file\n" in err
        assert "write its content to a file" in err or "a recipe is a YAML file" in err


def test_where_a_file_is_written(run, odd, prompts, tmp_path):
    for command in (
        ["generate", "--prompts", prompts, "--out", odd],
        ["evaluate", prompts, "--html", odd],
        ["prepare", prompts, "--html", odd],
        ["audit", "canaries", odd],
        ["rate", "--export", odd],
        ["adapters", "card", "mine", "--out", odd],
    ):
        code, _, err = run(*command)
        assert code == 2, command
        assert err.endswith(f"error: {odd} is not a regular file\n  name a file that may be written\n")


def test_sources_and_bases(run, odd, tmp_path, base_folder):
    code, _, err = run("prepare", odd)
    assert (code, "is not a regular file" in err) == (3, True)
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    code, _, err = run("audit", "watermark", tmp_path / "config.json", "--base", tmp_path)
    assert (code, "has no tokenizer" in err) == (4, True)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["prepare", ""], 2),
        (["train", "--data", ""], 2),
        (["prepare", " "], 2),
        (["audit", "data", ""], 2),
        (["evaluate", ""], 2),
        (["evaluate", "label="], 2),
        (["generate", "x", "--base", ""], 4),
        (["adapters", "import", "", "--name", "x"], 4),
    ],
)
def test_an_empty_name_is_not_the_current_folder(run, command, code, tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)  # which holds text
    found, _, err = run(*command)
    assert found == code, err
    assert "no name" in err or "at least 1 character" in err


def test_prompts_in_another_encoding_are_named(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    code, _, err = run("generate", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert code == 3
    assert "prompts.txt: byte 3 is not valid UTF-8\n  convert it" in err
