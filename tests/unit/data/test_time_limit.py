import time
import weakref

import pytest

from lora_gpt2.data import intake
from lora_gpt2.data.cleaning import CleaningReport
from lora_gpt2.data.records import Document


class Target:
    """Something that can be referred to weakly."""


def test_work_inside_the_parsers_own_calls_is_stopped_after_them(monkeypatch):
    """An exception inside `weakref`, which the parser calls, was a panic of its own."""
    monkeypatch.setattr(intake, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(intake, "AGAIN_SECONDS", 0.01)
    table, targets, places = weakref.WeakValueDictionary(), [Target() for _ in range(1000)], []

    def work(document, job, report):
        try:
            while True:
                for number, target in enumerate(targets):
                    table[number] = target
        except intake._TooSlowError as error:
            last = error.__traceback__
            while last.tb_next:
                last = last.tb_next
            places.append(last.tb_frame.f_back.f_code.co_filename if last.tb_frame.f_back else "")
            raise

    monkeypatch.setattr(intake, "clean_document", work)
    for _ in range(5):
        assert intake.clean_in_time(Document("a", "x"), None, CleaningReport()) is None
    assert places == [__file__] * 5


def test_a_second_alarm_while_the_first_is_handled_does_no_harm(monkeypatch):
    monkeypatch.setattr(intake, "LEAST_SECONDS", 0.01)
    monkeypatch.setattr(intake, "AGAIN_SECONDS", 0.01)

    def work(document, job, report):
        while True:
            try:
                while True:
                    pass
            except intake._TooSlowError:
                if time.monotonic() - started > 0.1:
                    raise

    started = time.monotonic()
    monkeypatch.setattr(intake, "clean_document", work)
    assert intake.clean_in_time(Document("a", "x"), None, CleaningReport()) is None
    time.sleep(0.05)  # no alarm is left


@pytest.mark.parametrize(("size", "seconds"), [(0, 2), (10**6, 6), (10**9, 300)])
def test_the_time_grows_with_the_text_up_to_a_limit(monkeypatch, size, seconds):
    given = []
    monkeypatch.setattr(intake, "_limit_seconds", lambda limit: given.append(limit) or pytest.raises(ZeroDivisionError))
    monkeypatch.setattr(intake, "clean_document", lambda *_: 1 / 0)

    class Long(str):
        def __len__(self):
            return size

    intake.clean_in_time(Document(Long(), "x"), None, CleaningReport())
    assert given == [seconds]
