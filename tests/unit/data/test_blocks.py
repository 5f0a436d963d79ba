import numpy as np
import pytest

from lora_gpt2.data.blocks import IGNORE, TokenBlocks, open_stream, token_dtype, write_stream


def test_documents_are_joined_by_eos_and_nothing_is_lost(tmp_path):
    count = write_stream(tmp_path / "s", [[1, 2], [3], [4, 5, 6]], eos_id=9, vocab_size=10)
    blocks = TokenBlocks(open_stream(tmp_path / "s", 10), 4)
    assert list(blocks.stream) == [9, 1, 2, 9, 3, 9, 4, 5, 6, 9]
    assert (count, blocks.num_tokens, blocks.num_blocks) == (9, 9, 3)
    inputs, targets = blocks.read([0, 1, 2])
    assert inputs[0].tolist() == [9, 1, 2, 9]
    assert targets.tolist() == [[1, 2, 9, 3], [9, 4, 5, 6], [9, IGNORE, IGNORE, IGNORE]]


def test_an_empty_stream_has_no_blocks(tmp_path):
    assert write_stream(tmp_path / "s", [], 9, 10) == 0
    assert TokenBlocks(open_stream(tmp_path / "s", 10), 4).num_blocks == 0


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8192, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_ids_fit_their_type(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    write_stream(tmp_path / "s", [[vocab_size - 1]], 0, vocab_size)
    assert list(open_stream(tmp_path / "s", vocab_size)) == [0, vocab_size - 1, 0]
