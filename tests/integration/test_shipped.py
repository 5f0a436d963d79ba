"""What comes with the repository works without training: nano and two adapters for it."""

from pathlib import Path

import pytest
import torch

from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import EvaluateSettings, GenerateSettings
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.verify import CHECKS, verify_files, verify_on_base

STORE = Store(Path(__file__).parent.parent.parent / "adapters")
TEXTS = {
    "shakespeare": "ROMEO:\nWhat say you, sir? I pray thee, speak,\nFor I am bound to hear thy tongue.\n\nJULIET:\nMy",
    "cooking": "## Ingredients\n\n- 2 cups of flour\n- 1 tablespoon of butter\n- 2 eggs\n\n## Directions\n\n1. Preheat",
}


@pytest.fixture(scope="module")
def session():
    return Session(load_base("nano", choose_runtime("float32", torch.device("cpu"))), STORE)


@pytest.mark.parametrize("name", TEXTS)
def test_a_shipped_adapter_knows_its_domain_better_than_the_base_and_the_other(session, name):
    (other,) = set(TEXTS) - {name}
    mixes = {"base": Mix(), name: Mix.single(name), other: Mix.single(other)}
    found = {
        key: measure_perplexity(session.base, [TEXTS[name]], EvaluateSettings(), session.select(mix)).perplexity
        for key, mix in mixes.items()
    }
    assert found[name] < 0.8 * min(found["base"], found[other])
    (output,) = generate(session, [Request(TEXTS[name], mixes[name], 1)], GenerateSettings(max_new_tokens=10))
    assert output.tokens == 10 or output.finish_reason == "stop"


def test_they_are_sound_by_pefts_own_numbers(session):
    manifests = [verify_files(STORE, name)[1] for name in STORE.list_names()]
    for verdict in verify_on_base(STORE, manifests, session.base):
        assert (verdict.failure, tuple(verdict.passed)) == ("", CHECKS)


def test_their_manifests_hold_figures_and_no_path_of_one_machine(session):
    for name in TEXTS:
        manifest = STORE.read_manifest(name)
        assert manifest.base.fingerprint == session.base.fingerprint
        assert manifest.figures["validation_perplexity"] < manifest.figures["base_perplexity"]
        assert not any(source.startswith("/") for source in manifest.recipe["data"]["sources"])
