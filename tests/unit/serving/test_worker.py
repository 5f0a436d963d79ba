"""The engine's thread when a step fails: who waits is told, nothing stays behind, only failures in a row are fatal."""

import threading

import pytest
import torch

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.serving.worker import MAX_FAILURES, BusyError, EngineFailed, PendingRequest, Worker
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.references import label_of
from tests.builders import make_adapter

GREEDY = GenerateSettings(temperature=0)
LAW, BOTH = Mix.single("law"), Mix([("law", 0.5), ("code", 0.5)])
PATIENCE_SECONDS = 60  # for what takes milliseconds: nobody waits for it unless something is broken


class Asked:
    """A request and what became of it."""

    def __init__(self, base, mixes=(LAW,), budget=4, num_beams=1):
        settings = GREEDY.model_copy(update={"num_beams": num_beams, "logit_bias": {base.tokenizer.eos_id: -100.0}})
        self.rows = [
            SequenceState(
                index=k,
                mix=mix,
                prompt_ids=[1, 2, 3],
                max_new_tokens=budget,
                settings=settings,
                seed=k,
                tokenizer=base.tokenizer,
            )
            for k, mix in enumerate(mixes)
        ]
        self.errors, self.ended, self.over, self.begun = [], [], threading.Event(), threading.Event()
        self.request = PendingRequest(sequences=self.rows, on_output=self._grow, on_error=self._fail)

    def _grow(self, outputs):
        self.begun.set()
        self.ended += [output.index for output in outputs if output.finish_reason]
        if len(self.ended) == len(self.rows):
            self.over.set()

    def _fail(self, error):
        self.errors.append(error)
        self.over.set()

    def wait(self):
        assert self.over.wait(PATIENCE_SECONDS), "it was never told"
        return self


@pytest.fixture
def session(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin())
    return Session(base, store)


@pytest.fixture
def worker(session):
    worker = Worker(session, max_num_seqs=3, max_waiting=6)
    yield worker
    worker.close()


@pytest.fixture
def fail(monkeypatch):
    """Lets the engine's steps fail: an entry for each step to come, False for one that succeeds."""
    plan, step = [], Engine.step

    def planned(self):
        grown = step(self)  # a failure after the rows have been admitted is the one that leaves something
        if plan and plan.pop(0):
            raise RuntimeError("injected")
        return grown

    monkeypatch.setattr(Engine, "step", planned)
    return plan


def ask(worker, base, **how):
    asked = Asked(base, **how)
    worker.submit(asked.request)
    return asked.wait()


def drop_all(worker):
    """Returns which of the session's adapters could be dropped: those that nothing holds."""
    session = worker.session

    @torch.inference_mode()  # as the engine brings them in
    def drop():
        return [label_of(name) for name in session.slots.references if session.slots.evict(name)]

    return worker.call(drop).result(PATIENCE_SECONDS)


def test_a_failure_is_told_to_everybody_and_leaves_nothing_held(worker, base, fail):
    requests = [Asked(base, (LAW, BOTH)), Asked(base, (BOTH,), num_beams=2), Asked(base, (Mix(), LAW, LAW))]
    fail += [False, True]
    for asked in requests:
        worker.submit(asked.request)
    assert worker.num_admitted == 7, "num_beams count each"
    worker.start()
    for asked in requests:
        (error,) = asked.wait().errors
        assert isinstance(error, EngineFailed), "those that grew and those that waited"
    assert worker.num_admitted == 0
    assert sorted(drop_all(worker)) == ["code", "law"], "and nothing holds an adapter"
    assert ask(worker, base, mixes=(BOTH, LAW)).errors == [], "the next one finds an engine"
    assert sorted(drop_all(worker)) == ["code", "law"]
    assert worker.error is None


def test_what_follows_a_failure_is_what_it_is_alone(worker, base, fail):
    worker.start()
    wanted = ask(worker, base, mixes=(LAW, BOTH), budget=6)
    fail += [False, False, True]
    assert ask(worker, base, mixes=(BOTH, LAW, Mix()), budget=9).errors
    again = ask(worker, base, mixes=(LAW, BOTH), budget=6)
    assert [row.new_ids for row in again.rows] == [row.new_ids for row in wanted.rows]
    assert all(len(row.new_ids) == 6 for row in again.rows)


@pytest.mark.parametrize("between", [1, 3])
def test_failures_with_successes_in_between_never_end_the_worker(worker, base, fail, between):
    worker.start()
    for _ in range(3 * MAX_FAILURES):
        fail += [True] * (MAX_FAILURES - 1) + [False] * between
        for _ in range(MAX_FAILURES - 1):
            assert len(ask(worker, base).errors) == 1
        assert ask(worker, base, budget=between).errors == []
        assert fail == []
    assert worker.error is None
    worker.check_room()


def test_failures_in_a_row_end_the_worker_and_it_says_so(worker, base, fail):
    worker.start()
    fail += [True] * MAX_FAILURES
    for number in range(1, MAX_FAILURES + 1):
        assert worker.error is None, f"before failure {number}"
        assert len(ask(worker, base, mixes=(LAW, BOTH)).errors) == 1
    assert isinstance(worker.error, RuntimeError)
    assert worker.num_admitted == 0
    for refused in (worker.check_room, lambda: worker.submit(Asked(base).request), lambda: worker.call(lambda: 1)):
        with pytest.raises(EngineFailed, match="has failed"):
            refused()


def test_a_failure_within_one_request_counts_once_whatever_its_rows(worker, base, fail):
    worker.start()
    fail += [True] * (MAX_FAILURES - 1)
    for _ in range(MAX_FAILURES - 1):
        assert len(ask(worker, base, mixes=(LAW,) * 3).errors) == 1, "told once"
    assert ask(worker, base, mixes=(LAW,) * 3).errors == []
    assert worker.error is None


def test_a_row_that_fails_alone_is_no_failure_of_the_engine(worker, base, monkeypatch):
    worker.start()
    broken = Asked(base, (LAW, BOTH))
    monkeypatch.setattr(broken.rows[0], "adjust_logits", lambda logits: [][0])
    for _ in range(MAX_FAILURES + 1):
        worker.submit(broken.request)
        assert broken.wait().errors == []
        broken.over.clear()
        broken.ended.clear()
        assert isinstance(broken.rows[0].error, IndexError)
        for row in broken.rows:
            row.finish_reason, row.new_ids = "", []
    assert worker.error is None
    assert sorted(drop_all(worker)) == ["code", "law"]


def test_a_request_that_is_cancelled_holds_nothing_and_the_others_go_on(worker, base):
    other = Asked(base, (Mix(),), 44)
    stopped, searching, waiting = Asked(base, (LAW,) * 2, 44), Asked(base, (BOTH,), 44, 3), Asked(base, (BOTH,) * 3, 44)
    seen = []

    def cancel_when_it_has_begun(events):
        seen.extend(events)
        for request in (stopped.request, searching.request, waiting.request):
            worker.cancel(request)

    stopped.request.on_output = cancel_when_it_has_begun
    for asked in (stopped, other, searching, waiting):
        worker.submit(asked.request)
    worker.start()
    assert other.wait().errors == []
    assert len(other.rows[0].new_ids) == 44
    assert len(seen) == 2, "one step; afterwards nobody listens"
    assert [len(row.new_ids) for row in stopped.rows] == [1, 1]
    assert [row.new_ids for row in (*searching.rows, *waiting.rows)] == [[]] * 4, "what waited never grew"
    assert drop_all(worker) == ["law"]
    assert worker.num_admitted == 0


def test_what_is_cancelled_while_it_waits_leaves_the_queue(worker, base):
    lasting = Asked(base, (LAW,) * 3, 44)
    counts = []

    def cancel_another(events):
        asked = Asked(base, (BOTH,), 44)
        worker.submit(asked.request)
        worker.cancel(asked.request)
        counts.append(worker._engine.num_waiting)
        lasting._grow(events)

    lasting.request.on_output = cancel_another
    worker.submit(lasting.request)
    worker.start()
    lasting.wait()
    assert max(counts) <= 1, "one that has just come; the earlier ones are gone"


def test_clients_are_told_of_a_failure_whose_clean_up_fails_too(worker, base, fail, monkeypatch):
    """A device that has failed fails at every later call."""
    monkeypatch.setattr(Engine, "reset", lambda self: 1 / 0)
    fail += [True]
    asked = Asked(base, (LAW,))
    worker.submit(asked.request)
    worker.start()
    (error,) = asked.wait().errors
    assert isinstance(error, EngineFailed)
    worker._thread.join(PATIENCE_SECONDS)
    assert isinstance(worker.error, ZeroDivisionError)


def test_room_is_for_what_grows_and_what_may_wait(worker, base):
    worker.submit(Asked(base, (LAW,) * 5).request)
    for too_many in (Asked(base, (LAW,), num_beams=5), Asked(base, (LAW,) * 5), Asked(base, (LAW, BOTH), num_beams=3)):
        worker.check_room()
        with pytest.raises(BusyError, match="5 sequences"):
            worker.submit(too_many.request)
    worker.submit(Asked(base, (LAW,), num_beams=4).request)
    assert worker.num_admitted == 9
    for refused in (worker.check_room, lambda: worker.submit(Asked(base).request)):
        with pytest.raises(BusyError):
            refused()
    assert worker.num_admitted == 9, "who is refused takes no room"


def test_a_request_larger_than_all_room_is_taken_by_an_idle_worker(worker, base):
    worker.start()
    assert ask(worker, base, mixes=(LAW,) * 12, budget=2).errors == []


def test_closing_tells_whoever_waits_and_nobody_comes_afterwards(worker, base):
    growing, waiting = Asked(base, (LAW,) * 3, 40), Asked(base, (BOTH,), 40)
    worker.submit(growing.request)
    worker.submit(waiting.request)
    worker.start()
    worker.close()
    for asked in (growing, waiting):
        for error in asked.wait().errors:
            assert "shut down" in str(error)
    assert waiting.errors or waiting.ended
    with pytest.raises(ResourceError, match="shutting down"):
        worker.submit(Asked(base).request)


def test_what_a_call_raises_reaches_who_asked_and_ends_nothing(worker, base):
    worker.start()
    assert worker.call(lambda: 5).result(PATIENCE_SECONDS) == 5
    for _ in range(MAX_FAILURES + 1):
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 / 0).result(PATIENCE_SECONDS)
    assert ask(worker, base).errors == []
    assert worker.error is None


def test_what_a_request_brought_into_a_slot_can_be_taken_out_between_two_steps(worker, base):
    worker.start()
    assert ask(worker, base, mixes=(LAW,)).errors == []
    (name,) = worker.call(lambda: worker.session.slots.references).result(PATIENCE_SECONDS)
    assert worker.call(lambda: worker.session.slots.evict(name)).result(PATIENCE_SECONDS)
