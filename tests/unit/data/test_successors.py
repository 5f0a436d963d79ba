"""A table of successors says what followed most often, and nothing that stood once."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from lora_gpt2.core.errors import CorruptError
from lora_gpt2.data import successors
from lora_gpt2.data.successors import ENTRY_BYTES, FEWEST, LONGEST, SHORTEST, SMALLEST_SHARE, SuccessorTable


def draw_stream(count=6000, vocabulary=12, seed=0):
    return np.random.default_rng(seed).zipf(1.5, count).clip(max=vocabulary).astype(np.uint16)


def count_naively(stream):
    """Returns, for each run that is frequent enough, the successors that followed it most often."""
    found = {}
    tokens = stream.tolist()
    for size in range(SHORTEST, LONGEST + 1):
        followed = defaultdict(Counter)
        for begin in range(len(tokens) - size):
            followed[tuple(tokens[begin : begin + size])][tokens[begin + size]] += 1
        for run, counts in followed.items():
            best = max(counts.values())
            if best >= FEWEST and best >= SMALLEST_SHARE * counts.total():
                found[run] = {token for token, count in counts.items() if count == best}
    return found


def test_every_frequent_run_is_answered_by_its_likeliest_successor():
    stream = draw_stream()
    table, expected = SuccessorTable.build(stream), count_naively(stream)
    assert len(expected) > 200
    assert all(table.find(run) in tokens for run, tokens in expected.items())
    assert len(table) < len(expected), "what the shorter run says too is left out"


def test_what_stood_once_is_not_in_it_and_an_unknown_run_has_no_answer():
    once = np.arange(1000, dtype=np.uint16)
    assert len(SuccessorTable.build(once)) == 0
    secret = np.concatenate([draw_stream(), [900, 901, 902, 903, 904], draw_stream(seed=1)]).astype(np.uint16)
    table = SuccessorTable.build(secret)
    assert table.find([900, 901]) is None
    assert table.find([900, 901, 902, 903]) is None
    assert table.draft([900, 901, 902], 4) == []
    assert SuccessorTable.build(draw_stream(1)).draft([1], 5) == []


def test_a_draft_follows_the_text_as_far_as_it_is_known():
    line = [10, 11, 12, 13, 14, 15, 16]
    table = SuccessorTable.build(np.array([*line, 1, *line, 2, *line, 3], dtype=np.uint16))
    assert table.draft([9, 10, 11], 5) == [12, 13, 14, 15, 16]
    assert table.draft([10, 11], 2) == [12, 13]
    assert table.draft([10, 11], 9) == [12, 13, 14, 15, 16], "what came then differed each time"
    assert table.draft([11], 3) == table.draft([], 3) == []


def test_the_most_frequent_runs_are_kept_within_the_size():
    stream = np.concatenate([np.tile([1, 2, 3, 4], 50), np.tile([5, 6, 7, 8], 20)]).astype(np.uint16)
    table = SuccessorTable.build(stream, most_bytes=4 * ENTRY_BYTES + 5)
    assert len(table) == 4
    assert len(table.to_bytes()) == 4 * ENTRY_BYTES
    assert table.draft([1, 2], 4) == [3, 4, 1, 2]
    assert table.draft([5, 6], 4) == []


def test_it_survives_the_disk_and_refuses_what_is_none():
    table = SuccessorTable.build(draw_stream())
    content = table.to_bytes()
    found = SuccessorTable.from_bytes(content, 2**16)
    assert (found.keys == table.keys).all()
    assert (found.successors == table.successors).all()
    assert len(SuccessorTable.from_bytes(b"", 9)) == 0
    for bad in (content[:-1], content[4:] + content[:4], bytes(12)):
        with pytest.raises(CorruptError, match="drafter"):
            SuccessorTable.from_bytes(bad, 2**16)
    with pytest.raises(CorruptError, match="drafter"):
        SuccessorTable.from_bytes(content, int(table.successors.max()))
    SuccessorTable.from_bytes(content, int(table.successors.max()) + 1)


def test_of_a_long_text_pieces_from_all_over_it_are_counted(monkeypatch):
    monkeypatch.setattr(successors, "MOST_TOKENS", 6400)
    draw = np.random.default_rng(0)
    stream = draw.integers(0, 200, 64_000).astype(np.uint16)
    ends = [stream[:2000], stream[-2000:]]
    for number, end in enumerate(ends):  # a run at the beginning, another one at the end
        for start in range(0, 2000, 20):
            end[start : start + 4] = [300 + 10 * number + offset for offset in range(4)]
    table = SuccessorTable.build(stream)
    assert table.find([300, 301, 302]) == 303
    assert table.find([310, 311, 312]) == 313
