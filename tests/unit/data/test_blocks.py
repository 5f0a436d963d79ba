import numpy as np
import pytest

from lora_gpt2.data.blocks import IGNORE, EncodedDocument, fit_best, open_blocks, pack_blocks, token_dtype, write_blocks

DOCUMENTS = [EncodedDocument(ids=[1, 2]), EncodedDocument(ids=[3]), EncodedDocument(ids=[4, 5, 6])]


def write(folder, documents, vocab_size=10, **options):
    write_blocks(folder, "a", documents, 9, vocab_size, **options)
    return open_blocks(folder, "a", 4, vocab_size)


def test_documents_are_joined_by_eos_and_nothing_is_lost(tmp_path):
    blocks = write(tmp_path, DOCUMENTS)
    assert list(blocks.stream) == [9, 1, 2, 9, 3, 9, 4, 5, 6, 9]
    assert (blocks.num_tokens, blocks.num_targets, blocks.num_blocks) == (9, 9, 3)
    rows = blocks.read([0, 1, 2])
    assert rows.inputs[0].tolist() == [9, 1, 2, 9]
    assert rows.targets.tolist() == [[1, 2, 9, 3], [9, 4, 5, 6], [9, IGNORE, IGNORE, IGNORE]]
    assert rows.positions is None


def test_a_prompt_carries_no_loss(tmp_path):
    blocks = write(tmp_path, [EncodedDocument(ids=[1, 2, 3], prompt=2), EncodedDocument(ids=[4])], has_prompts=True)
    assert blocks.read([0]).targets.tolist() == [[IGNORE, IGNORE, 3, 9]]
    assert blocks.read([1]).targets.tolist() == [[4, 9, IGNORE, IGNORE]]
    assert (blocks.num_tokens, blocks.num_targets) == (6, 4)


def test_packed_blocks_hold_whole_documents_that_begin_at_position_0(tmp_path):
    documents = [*DOCUMENTS, EncodedDocument(ids=[7, 7, 7, 7, 7], prompt=1)]
    write(tmp_path, documents, has_prompts=True)
    pack_blocks(tmp_path, "a", 4, 9, 10)
    blocks = open_blocks(tmp_path, "a", 4, 10)
    assert (blocks.num_tokens, blocks.num_targets, blocks.num_blocks) == (15, 14, 4)
    rows = blocks.read(range(4))
    found = sorted(zip(*(side.tolist() for side in (rows.inputs, rows.targets, rows.positions)), strict=True))
    assert found == [
        ([9, 1, 2, 0], [1, 2, 9, IGNORE], [0, 1, 2, 0]),
        ([9, 3, 7, 7], [3, 9, 7, 9], [0, 1, 0, 1]),  # [3], and the rest of the long one
        ([9, 4, 5, 6], [4, 5, 6, 9], [0, 1, 2, 3]),
        ([9, 7, 7, 7], [IGNORE, 7, 7, 7], [0, 1, 2, 3]),
    ]


def test_best_fit_takes_the_fullest_bin_that_has_room():
    assert fit_best([7, 6, 3, 3, 1], 10) == [[0, 2], [1, 3, 4]]
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(1, 101, 2000).tolist(), reverse=True)
    bins = fit_best(lengths, 100)
    assert sorted(index for members in bins for index in members) == list(range(2000))
    assert max(sum(lengths[index] for index in members) for members in bins) <= 100
    assert sum(lengths) / (100 * len(bins)) > 0.97


@pytest.mark.parametrize("layout", ["concat", "packed"])
def test_an_empty_part_has_no_blocks(tmp_path, layout):
    assert write(tmp_path, []).num_blocks == 0
    if layout == "packed":
        pack_blocks(tmp_path, "a", 4, 9, 10)
        assert open_blocks(tmp_path, "a", 4, 10).num_blocks == 0


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8192, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_ids_fit_their_type(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    write_blocks(tmp_path, "a", [EncodedDocument(ids=[vocab_size - 1])], 0, vocab_size)
    assert list(open_blocks(tmp_path, "a", 4, vocab_size).stream) == [0, vocab_size - 1, 0]
