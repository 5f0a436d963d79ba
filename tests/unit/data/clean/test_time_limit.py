import time
import weakref

import pytest

from lora_gpt2.data import shards
from lora_gpt2.data.clean.cleaning import CleaningReport
from lora_gpt2.data.read.records import Document


class Target:
    """Something that can be referred to weakly."""


def test_work_inside_the_parsers_own_calls_is_stopped_after_them(monkeypatch):
    """An exception inside `weakref`, which the parser calls, was a panic of its own."""
    monkeypatch.setattr(shards, "MIN_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(shards, "RETRY_SECONDS", 0.01)
    table, targets, places = weakref.WeakValueDictionary(), [Target() for _ in range(1000)], []

    def work(document, job, report):
        try:
            while True:
                for number, target in enumerate(targets):
                    table[number] = target
        except shards._TooSlowError as error:
            last = error.__traceback__
            while last.tb_next:
                last = last.tb_next
            places.append(last.tb_frame.f_back.f_code.co_filename if last.tb_frame.f_back else "")
            raise

    monkeypatch.setattr(shards, "clean_document", work)
    for _ in range(5):
        assert shards.clean_within_timeout(Document("a", "x"), None, CleaningReport()) is None
    assert places == [__file__] * 5


def test_a_second_alarm_while_the_first_is_handled_does_no_harm(monkeypatch):
    monkeypatch.setattr(shards, "MIN_TIMEOUT_SECONDS", 0.01)
    monkeypatch.setattr(shards, "RETRY_SECONDS", 0.01)

    def work(document, job, report):
        while True:
            try:
                while True:
                    pass
            except shards._TooSlowError:
                if time.monotonic() - started > 0.1:
                    raise

    started = time.monotonic()
    monkeypatch.setattr(shards, "clean_document", work)
    assert shards.clean_within_timeout(Document("a", "x"), None, CleaningReport()) is None
    time.sleep(0.05)  # no alarm is left


@pytest.mark.parametrize(("size", "seconds"), [(0, 2), (10**6, 6), (10**9, 300)])
def test_the_time_grows_with_the_text_up_to_a_limit(monkeypatch, size, seconds):
    given = []
    monkeypatch.setattr(shards, "_time_limit", lambda limit: given.append(limit) or pytest.raises(ZeroDivisionError))
    monkeypatch.setattr(shards, "clean_document", lambda *_: 1 / 0)

    class Long(str):
        def __len__(self):
            return size

    shards.clean_within_timeout(Document(Long(), "x"), None, CleaningReport())
    assert given == [seconds]
