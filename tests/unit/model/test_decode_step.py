"""The kernels of a decode step in Triton's interpreter beside the plain network, kernel by kernel and in the engine.

They run in a process of their own: the interpreter is chosen when triton is imported.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.inference.decoder import Decoder
from lora_gpt2.inference.engine import Engine
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.sequence import SequenceState
from lora_gpt2.inference.session import Session
from lora_gpt2.model import decode_step
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import load_base
from lora_gpt2.model.batch_adapters import BatchAdapters
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.gpt2 import GPT2, TARGETS
from lora_gpt2.model.kv_cache import KVCache
from lora_gpt2.model.runtime import Runtime
from lora_gpt2.recipe import GenerateSettings
from tests.builders import make_adapter

WIDTH, HEADS, CONTEXT = 40, 2, 160
NUM_SLOTS, POISONED = 5, 3
CASES = {
    "two layers": {"layers": 2},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "many rows": {"rows": 17, "rank": 1},
    "one row": {"rows": 1},
    "high rank": {"rank": 19, "rows": 2},
    "exact GELU": {"gelu": "none", "inner": 100},
    "no adapters": {"rank": 0},
    "adapters at one site": {"sites": ["h.0.mlp.c_fc"]},
}
SCRIPT = """
import sys, numpy, torch
import triton.language as tl
from triton.runtime import interpreter
from lora_gpt2.model import decode_step, layer_kernels
from tests.unit.model import test_decode_step as cases

def widen(handle):  # which keeps bfloat16 as uint16, and multiplies it so
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(numpy.float32)
    return interpreter.TensorHandle(data, tl.float32)

dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
found, cpu = {}, torch.device("cpu")
with torch.inference_mode():
    for name, case in cases.CASES.items():
        model, tokens, adapters, cache = cases.make_step(**case)
        found[name] = (decode_step.compute_hidden(model, tokens, adapters, cache), cache.buffer)
found["right"] = decode_step._are_right(cpu, 64, 3, 3)
layer_kernels._kind_of = lambda prologue: 0
found["wrong"] = decode_step._are_right(cpu, 64, 3, 3)
torch.save(found, sys.argv[1])
"""
ENGINE = """
import json, sys
from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.model import decode_step
from tests.unit.model import test_decode_step as cases

decode_step.can_use_kernels = lambda model, num_rows: True
print(json.dumps(cases.write_rows(sys.argv[1], CudaGraphDecoder)))
"""


def make_step(dtype=torch.float32, layers=1, rows=4, rank=3, gelu="tanh", inner=3 * WIDTH, sites=None):
    """A base, a token for each row, adapters, and a cache in which rows have different lengths."""
    draw = torch.Generator().manual_seed(0)
    config = GPT2Config(
        vocab_size=100,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=layers,
        n_head=HEADS,
        n_inner=inner,
        layer_norm_epsilon=1e-5,
        gelu_approximate=gelu,
        tie_word_embeddings=True,
        scale_attn_by_inverse_layer_idx=True,
        eos_id=0,
    )
    model = GPT2(config).to(dtype)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.2).to(dtype)
    adapters = None
    if rank:
        every = [f"h.{k}.{site}" for k in range(layers) for site in TARGETS]
        bank = AdapterBank(config, dict.fromkeys(sites or every, rank), NUM_SLOTS, "inference", model.wte.weight)
        bank.flat.copy_(torch.randn(bank.flat.shape, generator=draw) * 0.2)
        bank.scalings.copy_(torch.rand(bank.scalings.shape, generator=draw) + 0.5)
        for views in bank.sites.values():  # a slot that no row uses
            views.lora_a[POISONED], views.lora_b_t[POISONED] = torch.inf, torch.nan
        weights = torch.zeros(rows, NUM_SLOTS)
        for row in range(1, rows):
            weights[row, (0, 1, 2, 4)[row % 4]] = 1.0
        weights[-1, [0, 4]] = torch.tensor([0.25, -0.5])
        adapters = BatchAdapters(bank, weights, slice(0, NUM_SLOTS))
    cache = KVCache(config, rows + 1, CONTEXT, model.wte.weight).view(0, rows, fixed_keys=CONTEXT)
    for row in range(rows):
        length = (0, 150, 17, 128, 1)[(row + rows) % 5]
        cache.buffer[:, :, row, :, :length] = torch.randn(layers, 2, HEADS, length, WIDTH // HEADS, generator=draw)
        cache.lengths[row] = length
    return model, torch.randint(100, (rows, 1), generator=draw), adapters, cache


def write_rows(folder, decoder):
    """What six rows write that come and go, with a batch of up to three: one is padded to four."""
    base, draw = load_base(str(folder), Runtime(torch.device("cpu"), torch.float32)), random.Random(0)
    session, names = Session(base), ("one", "two")
    session.load_in_memory({name: make_adapter(base.config, seed) for seed, name in enumerate(names)})
    mixes = [Mix(), *map(Mix.single, names), Mix([("one", 0.5), ("two", 0.5)])]
    engine = Engine(session, 3, 48)
    engine.decoder = decoder(session, engine.cache)
    rows = [
        SequenceState(
            index=k,
            mix=mixes[k % 4],
            prompt_ids=[draw.randrange(200) for _ in range(3 + k)],
            max_new_tokens=2 + k % 3,
            settings=GenerateSettings(temperature=1.0),
            seed=k,
            tokenizer=base.tokenizer,
        )
        for k in range(6)
    ]
    for row in rows:
        engine.submit(row)
    while engine.is_busy:
        engine.step()
    assert not engine.cache.buffer.any(), "a cache without sequences holds nothing"
    return [row.new_ids for row in rows]


def run(script, *args):
    """Runs a script in the interpreter, from the repository, and returns what it prints."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "found.pt"
    run(SCRIPT, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_cache_are_those_of_the_network(found, name):
    case = CASES[name]
    model, tokens, adapters, cache = make_step(**case)
    with torch.inference_mode():  # the same numbers in float32, which keeps every one of them
        if adapters is not None:
            exact = AdapterBank(model.config, adapters.bank.ranks, NUM_SLOTS, "inference", torch.zeros(1))
            exact.flat.copy_(adapters.bank.flat)
            exact.flat[~exact.flat.isfinite()] = 0  # plain products mask what they compute of an unused slot
            exact.scalings.copy_(adapters.bank.scalings)
            adapters = BatchAdapters(exact, adapters.weights, slice(0, NUM_SLOTS))
        stored, cache.buffer = cache.buffer, cache.buffer.float()
        expected = model.float()(tokens, adapters, cache)
    hidden, buffer = found[name]
    resolution = 8 * torch.finfo(case.get("dtype", torch.float32)).eps
    assert (hidden.float() - expected).norm() <= max(resolution, 1e-5) * expected.norm()
    assert torch.allclose(buffer[:, :, : len(tokens)].float(), cache.buffer, rtol=10 * resolution, atol=10 * resolution)
    is_new = (buffer[:, :, : len(tokens)] != stored).any(-1).any(0).any(0).any(1)
    positions = torch.arange(CONTEXT)
    assert torch.equal(is_new, positions == cache.lengths[:, None] - 1), "each row writes one position, its own"


def test_rows_written_with_the_kernels_are_the_same(tmp_path, base_folder):
    expected = write_rows(base_folder, Decoder)
    assert write_rows(base_folder, CudaGraphDecoder) == expected
    assert json.loads(run(ENGINE, base_folder)) == expected


def test_kernels_that_compute_other_numbers_are_not_used(found, monkeypatch, caplog):
    assert found["right"]
    assert not found["wrong"]
    monkeypatch.setattr(decode_step, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    decode_step.has_layer_kernels.cache_clear()
    assert not decode_step.has_layer_kernels()
    assert not caplog.text, "an older GPU is no fault"
    decode_step.has_layer_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not decode_step.has_layer_kernels()
    assert "kernels of the decode step cannot be used, which costs time" in caplog.text
    decode_step.has_layer_kernels.cache_clear()
