import numpy as np

from lora_gpt2.data.blocks import TokenBlocks
from lora_gpt2.training.block_order import BlockOrder


def make(num_blocks, rows, seed=0):
    return BlockOrder(TokenBlocks(stream=np.arange(num_blocks * 4 + 1, dtype=np.uint16), block_size=4), rows, seed)


def test_every_block_once_per_epoch_across_steps():
    order = make(10, 3)
    dealt = [index for step in range(20) for index in order.indices(step)]
    for epoch in range(6):
        assert sorted(dealt[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert dealt[:10] != dealt[10:20]


def test_order_is_a_function_of_seed_and_step():
    assert make(10, 3).indices(7) == make(10, 3).indices(7)
    assert [make(10, 3, 1).indices(s) for s in range(3)] != [make(10, 3).indices(s) for s in range(3)]


def test_a_text_smaller_than_a_batch_is_seen_once_in_a_step():
    assert sorted(make(2, 4).indices(0)) == [0, 1]
    assert make(2, 4).num_steps(3) == 3
    assert make(10, 4).num_steps(2) == 5
    assert make(1, 100).num_steps(1) == 1
