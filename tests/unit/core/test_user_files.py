import io
import os
import socket
from pathlib import Path

import pytest

from lora_gpt2.core.errors import DataError, NotFoundError, ResourceError, UsageError
from lora_gpt2.core.user_files import check_output, read_stdin, read_user_file, read_user_text


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "link").symlink_to("a")
    assert read_user_file(tmp_path / "link") == b"\xef\xbb\xbfone\r\ntwo"
    assert read_user_text(tmp_path / "link") == "one\ntwo"


def test_pipes_devices_folders_and_sockets_are_refused_at_once(fifo, tmp_path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for path in (fifo, Path("/dev/zero"), tmp_path, tmp_path / "socket"):
        with pytest.raises(UsageError, match="is not a regular file") as caught:
            read_user_file(path)
        assert (caught.value.exit_code, caught.value.hint) == (2, "write its content to a file, and name that")
    server.close()


@pytest.mark.parametrize("name", ["none", "a/below", "x" * 300, "loop"])
def test_what_is_not_there_is_not_found(tmp_path, name):
    (tmp_path / "a").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NotFoundError) as caught:
        read_user_file(tmp_path / name)
    assert (caught.value.exit_code, caught.value.hint) == (4, "check the path")


def test_size_and_encoding_are_checked(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="larger than 3 bytes"):
        read_user_file(tmp_path / "a", 3)
    with pytest.raises(DataError, match="byte 3 is not valid UTF-8") as caught:
        read_user_text(tmp_path / "a")
    assert "iconv" in caught.value.hint
    assert read_user_text(tmp_path / "a", "replace") == "caf\ufffd"


def test_an_output_is_a_regular_file_or_none_yet(fifo, tmp_path):
    check_output(None)
    check_output(tmp_path / "new")
    (tmp_path / "old").write_text("")
    check_output(tmp_path / "old")
    for path in (fifo, Path("/dev/full")):
        with pytest.raises(UsageError, match="is not a regular file"):
            check_output(path)
    for path in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(ResourceError, match="cannot be written"):
            check_output(path)


def test_stdin_is_read_up_to_a_limit_and_never_from_a_device(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("four"))
    assert read_stdin() == "four"
    monkeypatch.setattr("sys.stdin", io.StringIO("four"))
    with pytest.raises(UsageError, match="more than 3 characters"):
        read_stdin(3)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    with pytest.raises(DataError, match="stdin is not valid UTF-8"):
        read_stdin()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="nothing on stdin"):
        read_stdin()
    with open("/dev/zero") as zero:
        monkeypatch.setattr("sys.stdin", zero)
        with pytest.raises(UsageError, match="stdin is a device") as caught:
            read_stdin()
    assert "pipe text in" in caught.value.hint
    with open("/dev/null") as null:
        monkeypatch.setattr("sys.stdin", null)
        assert read_stdin() == ""
