"""A store written in format 1, kept as it was: it must always load and give the same logits."""

import json
from pathlib import Path

import pytest
import torch

from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.store.catalog import Store

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())


def test_the_golden_adapter_loads_with_its_logits():
    base = load_base(str(HERE / "base"), choose_runtime("float32", torch.device("cpu")))
    assert base.fingerprint == EXPECTED["base_fingerprint"]
    session = Session(base, Store(HERE / "store"))
    tokens = torch.tensor([EXPECTED["tokens"]])
    adapters = session.adapters_for([Mix.single("golden")])
    logits = base.model.logits(base.model(tokens, adapters), adapters)[0, -1, :8]
    assert logits.tolist() == pytest.approx(EXPECTED["last_logits"], abs=1e-4)
    plain = base.model.logits(base.model(tokens), None)[0, -1, :8]
    assert not torch.allclose(plain, logits, atol=0.01)


def test_the_golden_manifest_reads_as_it_was_written():
    manifest = Store(HERE / "store").read_manifest("golden@1")
    assert (manifest.reference, manifest.figures["validation_perplexity"]) == ("golden@1", 100.25)
    assert manifest.data["sources"] == ["text.txt"]
