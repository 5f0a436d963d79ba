"""Reporters: what reaches the log, and at which level."""

import errno
import io
import logging

from lora_gpt2.core.console import LoggingReporter, RichReporter


def test_python_users_find_messages_and_progress_in_the_log(caplog):
    reporter = LoggingReporter()
    with caplog.at_level(logging.INFO, logger="lora_gpt2"):
        reporter.message("base nano on cpu \x1b[31m")
        reporter.detail("only for the curious")
        with reporter.task("training", 10, "tokens") as task:
            task.advance(4)
            task.advance(6, "loss 2.50")
    lines = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"], "progress is said at its end"
    assert "\x1b" not in lines[0]
    assert lines[1].startswith("training: 10/10 tokens")
    assert lines[1].endswith("loss 2.50")
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="lora_gpt2"):
        reporter.detail("only for the curious")
    assert [(r.name, r.levelname) for r in caplog.records] == [("lora_gpt2", "DEBUG")]


class GoneTerminal(io.StringIO):
    """A terminal that was closed."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(errno.EIO, "gone")

    def flush(self):
        raise OSError(errno.EIO, "gone")


def test_a_terminal_that_closes_ends_no_work(monkeypatch):
    monkeypatch.setattr("sys.stderr", GoneTerminal())
    reporter, done = RichReporter(), 0
    with reporter.task("training", 3, "steps") as task:
        for _ in range(3):
            task.advance(1, "on")
            done += 1
    reporter.message("finished")
    assert done == 3
