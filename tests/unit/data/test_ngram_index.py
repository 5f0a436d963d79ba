"""Runs of tokens that stand in another text, against a search without hashes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gpt2.data.ngram_index import NgramIndex, hash_windows

TOKENS = st.lists(st.integers(0, 3), min_size=0, max_size=40)


def search(stream, run):
    places = [p for p in range(len(stream) - len(run) + 1) if stream[p : p + len(run)] == run]
    return places[0] if places else -1


@given(stream=TOKENS, tokens=TOKENS, size=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_it_finds_what_a_plain_search_finds(stream, tokens, size):
    index = NgramIndex(np.array(stream, dtype=np.uint16), size)
    wanted = [search(stream, tokens[p : p + size]) for p in range(max(0, len(tokens) - size + 1))]
    assert index.find(tokens).tolist() == wanted
    tail = tokens[-size:]
    followers = {stream[p + size] for p in range(len(stream) - size) if stream[p : p + size] == tail}
    assert index.find_followers(tokens) == (sorted(followers) if len(tokens) >= size else [])


def test_a_collision_is_no_copy(monkeypatch):
    monkeypatch.setattr(
        "lora_gpt2.data.ngram_index.hash_windows", lambda t, size: np.zeros(max(0, len(t) - size + 1), dtype=np.uint64)
    )
    index = NgramIndex(np.arange(10), 3)
    assert index.find([4, 5, 6, 9]).tolist() == [4, -1]
    assert index.find_followers([1, 2, 3]) == [4]


def test_equal_windows_have_equal_hashes_wherever_they_stand():
    hashes = hash_windows([9, 1, 2, 3, 4, 5, 1, 2, 3], 3)
    assert hashes[1] == hashes[6]
    assert len(set(hashes.tolist())) == len(hashes) - 1


@given(stream=TOKENS, tokens=TOKENS, size=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_the_longest_copy_is_the_longest_common_run(stream, tokens, size):
    runs = [tokens[a:b] for a in range(len(tokens)) for b in range(a + size, len(tokens) + 1)]
    longest = max((len(run) for run in runs if search(stream, run) >= 0), default=0)
    length, place = NgramIndex(np.array(stream, dtype=np.uint16), size).find_longest(tokens)
    assert length == longest
    if length:
        copy = stream[place : place + length]
        assert any(tokens[a : a + length] == copy for a in range(len(tokens)))
