import pytest
import torch

from lora_gpt2.core.errors import MismatchError
from lora_gpt2.model.base import load_base
from lora_gpt2.model.config import parse_config
from lora_gpt2.model.gpt2 import GPT2, KVCache
from lora_gpt2.model.runtime import Runtime

GOOD = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 20, "n_positions": 8}


def test_decoding_with_a_cache_equals_one_pass(base):
    tokens = torch.randint(0, base.config.vocab_size, (3, 20))
    whole = base.model(tokens)
    cache = KVCache(base.config, 3, 20, base.model.wte.weight)
    parts = [base.model(tokens[:, :7], cache=cache)]
    for step in range(7, 20):
        parts.append(base.model(tokens[:, step : step + 1], cache=cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert not torch.allclose(base.model(tokens.flip(0)), whole, atol=1e-2), "the comparison can fail"


def test_rows_of_different_lengths_share_a_cache(base):
    tokens = torch.randint(0, base.config.vocab_size, (2, 12))
    lengths = [4, 9]
    cache = KVCache(base.config, 2, 14, base.model.wte.weight)
    padded = tokens.clone()
    padded[0, 4:] = 0
    base.model(padded[:, :9], cache=cache, num_tokens=lengths)
    following = tokens[torch.arange(2), lengths][:, None]
    stepped = base.model(following, cache=cache)
    for row, length in enumerate(lengths):
        alone = base.model(tokens[row : row + 1, : length + 1])[:, -1]
        assert torch.allclose(stepped[row], alone, atol=1e-5)


def test_positions_beyond_the_context_are_an_error(base):
    with pytest.raises(IndexError, match="context"):
        base.model(torch.zeros(1, base.config.n_positions + 1, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_added_to_the_token_embeddings_with_its_sign(base_folder, dtype):
    model = load_base(str(base_folder), Runtime(torch.device("cpu"), dtype)).model
    tokens = torch.arange(14).view(2, 7)  # each token once, so that its embedding can carry its own noise
    embeddings = model.wte.weight.data
    noise = torch.randn(2, 7, embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    noisy = model(tokens, noise=noise)
    positions = model.wpe.weight[:7]
    embedded = (model.wte(tokens) + positions + noise.to(dtype)).float()
    plain = model(tokens)
    changed = embeddings.clone()
    changed[tokens] = (embedded - positions.float()).to(dtype)
    model.wte.weight.data = changed
    # in 16 bits the sum is rounded in another place, which moves a hidden state by a few of its last digits
    limit = 1e-5 if dtype == torch.float32 else 0.02
    wanted = model(tokens)
    assert (noisy - wanted).norm() <= limit * wanted.norm()
    assert (plain - wanted).norm() > 0.1 * wanted.norm(), "the comparison can fail"
    model.wte.weight.data = embeddings
    assert torch.equal(model(tokens, noise=torch.zeros_like(noise)), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"scale_attn_weights": False}, "unscaled"),
        ({"activation_function": "relu"}, "activation 'relu'"),
        ({"n_embd": "x"}, "n_embd is 'x', expected a whole number"),
        ({"n_head": 3}, "3 heads"),
        ({"eos_token_id": "99"}, "eos_token_id '99' is no token"),
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
