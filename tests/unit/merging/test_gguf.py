"""An adapter as llama.cpp reads it: names, shapes and the sum that it adds to each weight."""

import warnings

import numpy as np
import pytest
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from lora_gpt2.core.errors import ConflictError
from lora_gpt2.merging.gguf import build_modelfile, export_base_gguf, export_gguf, name_tensor
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.merge import to_delta
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings, LoraSettings
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter

TARGETS = ("c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")


@pytest.fixture
def adapter(base, store) -> Adapter:
    made = make_adapter(base.config, 3, LoraSettings(rank=2, targets=TARGETS))
    publish_adapter(store, "law", made, base, Origin())
    return made


def test_llama_cpp_adds_the_update_to_tensors_that_the_base_has(base, store, adapter, tmp_path):
    """llama.cpp computes W x + scale * B (A x), scale 1 where alpha is 0, with the matrices that GGUF holds."""
    import gguf

    export_gguf(store, "law", tmp_path / "law.gguf", base, GenerateSettings())
    export_base_gguf(tmp_path / "base.gguf", base)
    found = gguf.GGUFReader(tmp_path / "law.gguf")
    tensors = {tensor.name: tensor.data for tensor in found.tensors}
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    assert found.fields["general.type"].contents() == "adapter"
    assert found.fields["adapter.type"].contents() == "lora"
    assert found.fields["adapter.lora.alpha"].contents() == 0
    assert len(tensors) == 2 * len(adapter.updates)
    for site, update in adapter.updates.items():
        name = name_tensor("lm_head.weight" if site == "lm_head" else f"transformer.{site}.weight")
        delta = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        np.testing.assert_allclose(delta, to_delta(update).numpy(), rtol=1e-5, atol=1e-7)
        assert weights[name].shape == delta.shape
    assert not np.shares_memory(weights["output.weight"], weights["token_embd.weight"])


def test_a_modelfile_stands_beside_it_and_nothing_is_overwritten(base, store, adapter, tmp_path):
    target = tmp_path / "law.gguf"
    export_gguf(store, "law", target, base, GenerateSettings(temperature=0.5))
    lines = (tmp_path / "law.Modelfile").read_text().splitlines()
    assert lines == build_modelfile(base, "law.gguf", GenerateSettings(temperature=0.5)).splitlines()
    assert "ADAPTER ./law.gguf" in lines
    assert "PARAMETER temperature 0.5" in lines
    before = target.read_bytes()
    target.unlink()
    with pytest.raises(ConflictError, match=r"law\.Modelfile exists"):
        export_gguf(store, "law", target, base, GenerateSettings())
    assert not target.exists()
    (tmp_path / "law.Modelfile").unlink()
    export_gguf(store, "law", target, base, GenerateSettings())
    assert target.read_bytes() == before


def test_tokens_that_were_added_are_tokens_in_llama_cpp_too(base_folder, tmp_path):
    import gguf

    theirs = GPT2TokenizerFast.from_pretrained(base_folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"], "eos_token": "<end>"})
    model = GPT2LMHeadModel.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(len(theirs))
    for each in (model, theirs):
        each.save_pretrained(tmp_path / "grown")
    export_base_gguf(tmp_path / "grown.gguf", load_base(str(tmp_path / "grown"), choose_runtime("float32")))
    fields = gguf.GGUFReader(tmp_path / "grown.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    found = dict(zip(tokens, kinds, strict=True))
    assert (found["<|user|>"], found["<end>"]) == (gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokens.index("<end>") == theirs.eos_token_id
