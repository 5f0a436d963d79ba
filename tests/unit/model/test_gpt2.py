import pytest
import torch

from lora_gpt2.core.errors import MismatchError
from lora_gpt2.model.config import parse_config
from lora_gpt2.model.gpt2 import GPT2, KVCache

GOOD = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 20, "n_positions": 8}


def test_decoding_with_a_cache_equals_one_pass(base):
    tokens = torch.randint(0, base.config.vocab_size, (3, 20))
    whole = base.model(tokens)
    cache = KVCache(base.config, 3, 20, base.model.wte.weight)
    parts = [base.model(tokens[:, :7], cache=cache)]
    cache.lengths += 7
    for step in range(7, 20):
        parts.append(base.model(tokens[:, step : step + 1], cache=cache))
        cache.lengths += 1
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert not torch.allclose(base.model(tokens.flip(0)), whole, atol=1e-2), "the comparison can fail"


def test_rows_of_different_lengths_share_a_cache(base):
    tokens = torch.randint(0, base.config.vocab_size, (2, 12))
    lengths = torch.tensor([4, 9])
    cache = KVCache(base.config, 2, 14, base.model.wte.weight)
    padded = tokens.clone()
    padded[0, 4:] = 0
    base.model(padded[:, :9], cache=cache)
    cache.lengths += lengths
    cache.used = 9
    following = tokens[torch.arange(2), lengths][:, None]
    stepped = base.model(following, cache=cache)
    for row, length in enumerate(lengths.tolist()):
        alone = base.model(tokens[row : row + 1, : length + 1])[:, -1]
        assert torch.allclose(stepped[row], alone, atol=1e-5)


def test_positions_beyond_the_context_are_an_error(base):
    with pytest.raises(IndexError, match="context"):
        base.model(torch.zeros(1, base.config.context + 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"scale_attn_weights": False}, "unscaled"),
        ({"activation_function": "relu"}, "activation 'relu'"),
        ({"n_embd": "x"}, "expected a whole number"),
        ({"n_head": 3}, "3 heads"),
        ({"eos_token_id": 99}, "eos_token_id 99"),
    ],
)
def test_a_configuration_that_we_cannot_run_is_refused(change, message):
    with pytest.raises(MismatchError) as caught:
        parse_config({**GOOD, **change}, "config.json")
    assert message in caught.value.message
    assert "bases list" in caught.value.hint


def test_attention_may_be_scaled_by_layer():
    plain, scaled = (
        parse_config({**GOOD, "n_layer": 2, "scale_attn_by_inverse_layer_idx": s}, "c") for s in (False, True)
    )
    assert GPT2(plain).h[1].attn.scale == 2 * GPT2(scaled).h[1].attn.scale
    assert GPT2(plain).h[0].attn.scale == GPT2(scaled).h[0].attn.scale
