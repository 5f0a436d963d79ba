"""Ours against transformers + PEFT: logits, gradients, and adapters going both ways."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from lora_gpt2.core.console import LoggingReporter
from lora_gpt2.core.errors import CorruptError, MismatchError
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.base import load_base
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.lora import Adapter
from lora_gpt2.model.loss import fused_linear_cross_entropy
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import BLOCKS, LoraSettings
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.exchange import export_adapter, import_adapter
from lora_gpt2.store.fetch import fetch_adapter
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from lora_gpt2.store.peft.config import module_of
from lora_gpt2.store.peft.tensors import from_peft, read_peft_files
from tests.builders import make_adapter, train_and_save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

SETTINGS = {
    "all": LoraSettings(rank=4, alpha=10),
    "use_rslora": LoraSettings(rank=3, alpha=6, use_rslora=True),
    "qv": LoraSettings(rank=4, alpha=32, targets=("c_attn.q", "c_attn.v")),
    "per-target": LoraSettings(rank=2, rank_pattern={"mlp.c_fc": 5}, targets=("mlp.c_fc", "mlp.c_proj", "attn.c_proj")),
    "k-and-mlp": LoraSettings(rank=2, targets=("c_attn.k", "mlp.c_fc")),
    "head": LoraSettings(rank=3, targets=("lm_head",)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning:peft"),
]


@pytest.fixture(params=SETTINGS)
def stored(request, base, store):
    publish_adapter(store, "law", make_adapter(base.config, 1, SETTINGS[request.param]), base, Origin())
    return load_adapter(store, "law", base)[1]


@pytest.fixture
def theirs(base_folder):
    return GPT2LMHeadModel.from_pretrained(base_folder).eval()


@pytest.fixture
def tokens(base):
    return torch.randint(0, base.config.vocab_size, (3, 25), generator=torch.Generator().manual_seed(2))


def our_logits(base, adapter, tokens):
    session = Session(base)
    session.load_in_memory({"a": adapter})
    rows = session.adapters_for([Mix.single("a")] * len(tokens))
    return base.model.logits(base.model(tokens, rows), rows)


def test_a_stored_adapter_runs_in_peft_unchanged(base, store, stored, theirs, tokens):
    with torch.no_grad():
        plain = theirs(tokens).logits
        wrapped = PeftModel.from_pretrained(theirs, store.resolve("law")).eval()
        wanted = wrapped(tokens).logits
    assert (our_logits(base, stored, tokens) - wanted).abs().max() <= 2e-5
    assert (wanted - plain).abs().max() > 0.1


def test_adapter_gradients_equal_autograds_through_peft(base, store, stored, theirs, tokens):
    wrapped = PeftModel.from_pretrained(theirs, store.resolve("law"), is_trainable=True).eval()
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    bank = AdapterBank(base.config, stored.ranks, 1, "training", base.model.wte.weight)
    bank.load(0, stored)
    buffer = bank.enable_gradients()
    rows = TrainingAdapters(bank, [0])
    hidden = base.model(tokens, rows)[:, :-1].contiguous()
    targets = tokens[:, 1:].flatten()
    weights = torch.full(targets.shape, 1 / len(targets))
    fused_linear_cross_entropy(
        hidden.flatten(0, 1), base.model.head, targets, weights, 0.0, rows.low_rank_logits(hidden)
    )[0].backward()
    gradients = bank.read(0, buffer)
    found = dict(wrapped.named_parameters())
    for site, update in gradients.updates.items():
        for half, ours in Mix([("A", update.a), ("B", update.b)]):
            wanted = found[f"base_model.model.{module_of(site)}.lora_{half}.default.weight"].grad
            assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-8, (site, half)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": "all-linear", "lora_alpha": 5},
        {"target_modules": r".*\.(c_attn|c_fc)", "use_rslora": True},
        {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"mlp.c_proj": 2}, "alpha_pattern": {"c_attn": 3}},
        {"target_modules": ["c_fc"], "layers_to_transform": [1]},
        {"target_modules": r".*h\.0\.mlp\.c_fc"},
        {"target_modules": ["c_fc", "lm_head"], "rank_pattern": {"lm_head": 3}},
        {"target_modules": ["c_fc", "lm_head"], "layers_to_transform": [1]},
    ],
)
def test_an_adapter_trained_in_peft_imports_with_equal_logits_and_goes_back(
    base, store, theirs, tokens, tmp_path, options
):
    wrapped = get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True, **options))
    train_and_save(wrapped, tokens, tmp_path)
    adapter = from_peft(*read_peft_files(tmp_path), base.config, "theirs", lambda name: base.model.head)
    with torch.no_grad():
        wanted = wrapped(tokens).logits
    assert (our_logits(base, adapter, tokens) - wanted).abs().max() <= 2e-5
    publish_adapter(store, "back", adapter, base, Origin())
    with torch.no_grad():
        again = PeftModel.from_pretrained(wrapped.unload(), store.resolve("back")).eval()(tokens).logits
    assert (again - wanted).abs().max() <= 2e-5
    assert (wanted - base.model.logits(base.model(tokens), None)).abs().max() > 0.1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"alpha_pattern": {"^h.0.attn.c_attn": 64}},
        {"rank_pattern": {"^h.0.attn.c_attn": 2, r"h\.1\.mlp.*": 3}},
        {"exclude_modules": r"h\.0\..*"},
    ],
    ids=str,
)
def test_an_adapter_for_feature_extraction_imports_with_equal_hidden_states(base, theirs, tokens, tmp_path, values):
    """PEFT matches its patterns with names that have no `transformer.` before them there."""
    shape = {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"], **values}
    config = LoraConfig(task_type="FEATURE_EXTRACTION", **shape)
    wrapped = get_peft_model(theirs.transformer, config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
        wanted = wrapped(tokens).last_hidden_state
    wrapped.save_pretrained(tmp_path)
    adapter = from_peft(*read_peft_files(tmp_path), base.config, "theirs")
    session = Session(base)
    session.load_in_memory({"a": adapter})
    hidden = base.model(tokens, session.adapters_for([Mix.single("a")] * len(tokens)))
    assert (hidden - wanted).abs().max() <= 2e-5
    assert (wanted - base.model(tokens)).abs().max() > 0.1


def test_a_head_is_merged_rightly_by_us_and_in_peft_where_it_is_untied_first(base, store, theirs, tokens):
    """PEFT itself merges the head's update into the tied embeddings too (its warning, peft#2777)."""
    adapter = make_adapter(base.config, 1, LoraSettings(rank=4, alpha=8, targets=(*BLOCKS, "lm_head")))
    publish_adapter(store, "law", adapter, base, Origin())
    wanted = our_logits(base, adapter, tokens)
    tied = PeftModel.from_pretrained(theirs, store.resolve("law")).merge_and_unload().eval()
    with torch.no_grad():
        assert (tied(tokens).logits - wanted).abs().max() > 0.1, "PEFT merges a tied head rightly now: say so"
    untied = GPT2LMHeadModel.from_pretrained(base.folder).eval()
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    untied.config.tie_word_embeddings = False
    merged = PeftModel.from_pretrained(untied, store.resolve("law")).merge_and_unload().eval()
    folded = Session(base, store).merge_into_base(Mix.single("law")).base.model
    with torch.no_grad():
        assert (merged(tokens).logits - wanted).abs().max() <= 2e-5
        assert (folded.logits(folded(tokens), None) - wanted).abs().max() <= 2e-5


def test_a_mixed_batch_equals_pefts(base, store, theirs, tokens):
    session = Session(base, store)
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin())
    wrapped = PeftModel.from_pretrained(theirs, store.resolve("law"), adapter_name="law")
    wrapped.load_adapter(store.resolve("code"), "code")
    wrapped.eval()
    with torch.no_grad():
        wanted = wrapped(tokens, adapter_names=["law", "__base__", "code"]).logits
    rows = session.adapters_for([Mix.single("law"), Mix(), Mix.single("code")])
    assert (base.model.logits(base.model(tokens, rows), rows) - wanted).abs().max() <= 2e-5


def test_what_export_writes_loads_with_autopeft_and_stays_right_when_weights_are_tied_again(
    base, base_folder, store, tmp_path, tokens
):
    """As lm-evaluation-harness does after wrapping a model; over a wrapped head it fails (`KeyError: attribute`)."""
    publish_adapter(store, "law", make_adapter(base.config, 1, LoraSettings()), base, Origin())
    export_adapter(store, "law", tmp_path / "out")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded.tie_weights()
    loaded.base_model.model.tie_weights()
    wanted = our_logits(base, load_adapter(store, "law", base)[1], tokens)
    assert torch.allclose(loaded(tokens).logits, wanted, atol=1e-4)
    assert (loaded(tokens).logits - GPT2LMHeadModel.from_pretrained(base_folder)(tokens).logits).abs().max() > 0.1
    again = import_adapter(fetch_adapter(str(tmp_path / "out")), store, "again", base, LoggingReporter()).manifest
    assert again.digest == store.read_manifest("law").digest


def test_a_bundled_base_is_named_by_its_folder_in_an_export(store, tmp_path):
    nano = load_base("nano", choose_runtime("float32", torch.device("cpu")))
    publish_adapter(store, "law", make_adapter(nano.config, 1, LoraSettings(rank=1)), nano, Origin())
    manifest = export_adapter(store, "law", tmp_path / "out")
    assert manifest.base.name == "nano"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(40)[None]
    wanted = our_logits(nano, load_adapter(store, "law", nano)[1], tokens)
    with torch.no_grad():
        found = loaded(tokens).logits.float()
    assert (found - wanted).abs().max() < 0.1, "nano is stored, and so loaded there, in 16 bits"
    assert (found - nano.model.logits(nano.model(tokens), None)).abs().max() > 1


def test_a_change_of_the_head_is_left_out_on_request_and_the_rest_is_as_it_was(base, store, tmp_path, tokens):
    whole = make_adapter(base.config, 1, LoraSettings(rank=2, targets=(*BLOCKS, "lm_head")))
    publish_adapter(store, "law", whole, base, Origin())
    export_adapter(store, "law", tmp_path / "out", without_head=base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded.base_model.model.tie_weights()
    rest = Adapter(updates={site: update for site, update in whole.updates.items() if site != "lm_head"})
    assert torch.allclose(loaded(tokens).logits, our_logits(base, rest, tokens), atol=1e-4)
    assert "Exported without its change of the head" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "manifest.json").exists(), "it is not of these weights"


@pytest.mark.parametrize("kind", ["head", "embeddings"])
def test_saved_weights_of_the_base_are_accepted_where_they_are_the_bases_own(
    base, base_folder, theirs, tmp_path, tokens, kind
):
    config = LoraConfig(
        r=2,
        target_modules=["c_fc", "lm_head"] if kind == "head" else ["c_fc"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
    )
    wrapped = get_peft_model(theirs, config)
    train_and_save(wrapped, tokens, tmp_path)
    if kind == "embeddings":
        wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS)
    name = f"base_model.model.{'lm_head.base_layer' if kind == 'head' else 'transformer.wte'}.weight"
    assert name in tensors, "PEFT saves it"
    source = fetch_adapter(str(tmp_path))
    store = Store(tmp_path / "store")
    assert import_adapter(source, store, "same", base, LoggingReporter()).manifest.reference == "same@1"
    found = our_logits(base, load_adapter(store, "same", base)[1], tokens)
    assert torch.allclose(found, wrapped(tokens).logits, atol=1e-4)
    other = dict(tensors)
    other[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(other, tmp_path / WEIGHTS)
    with pytest.raises(MismatchError, match=f"{name} is not that of this base") as caught:
        import_adapter(fetch_adapter(str(tmp_path)), store, "other", base, LoggingReporter())
    assert caught.value.exit_code == 5
    assert "--base FOLDER" in caught.value.hint


def test_a_pickled_adapter_is_read_without_running_anything(base, theirs, tmp_path, tokens):
    wrapped = get_peft_model(
        theirs, LoraConfig(r=2, target_modules=["c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    train_and_save(wrapped, tokens, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    store = Store(tmp_path / "store")
    import_adapter(fetch_adapter(str(tmp_path)), store, "old", base, LoggingReporter())
    found = our_logits(base, load_adapter(store, "old", base)[1], tokens)
    assert torch.allclose(found, wrapped(tokens).logits, atol=1e-4)
    torch.save({**tensors, "x": Path("/")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CorruptError, match="is not a file of tensors"):
        fetch_adapter(str(tmp_path))
    torch.save({**tensors, "x": "text"}, tmp_path / "adapter_model.bin")
    with pytest.raises(CorruptError, match="holds more than tensors"):
        fetch_adapter(str(tmp_path))
