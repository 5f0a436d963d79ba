import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from lora_gpt2.core.errors import CorruptError, MismatchError, NotFoundError, ResourceError, UsageError
from lora_gpt2.model import runtime
from lora_gpt2.model.base import load_base
from lora_gpt2.model.checkpoint import Checkpoint, find_base, list_bundled
from lora_gpt2.model.runtime import DTYPES, choose_runtime, measure_peak_memory
from lora_gpt2.model.stored_weights import MAPPED_BYTES, fingerprint_base
from tests.builders import make_base_folder

FLOAT32 = choose_runtime("float32", torch.device("cpu"))


def logits(folder):
    base = load_base(str(folder), FLOAT32)
    return base.model.logits(base.model(torch.arange(10)[None]), None)


def test_shards_prefixes_and_buffers_load_the_same(tmp_path, base_folder):
    for name, options in {"sharded": {"shards": 3}, "bare": {"prefix": ""}}.items():
        assert torch.equal(logits(make_base_folder(tmp_path / name, **options)), logits(base_folder))
    assert not torch.equal(logits(make_base_folder(tmp_path / "other", seed=1)), logits(base_folder))


def test_an_untied_head_is_used(tmp_path, base_folder):
    untied = make_base_folder(tmp_path / "untied", tied=False)
    head = load_file(untied / "model.safetensors")["lm_head.weight"]
    base = load_base(str(untied), FLOAT32)
    assert torch.equal(base.model.head, head)
    assert not torch.equal(logits(untied), logits(base_folder))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_of_its_own_is_used_whatever_the_configuration_says_of_ties(tmp_path, base_folder, shards):
    """As transformers reads it: only a head that equals the embeddings is a copy of them."""
    folder = make_base_folder(tmp_path / "own", tied=False, shards=shards)
    expected = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(logits(folder), expected)
    tokens = torch.arange(10)[None]
    assert torch.allclose(GPT2LMHeadModel.from_pretrained(folder).eval()(tokens).logits[0], expected, atol=1e-5)
    if shards == 1:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        save_file(tensors, folder / "model.safetensors")
        assert Checkpoint.read(folder).config.tie_word_embeddings


def test_six_layers_load(tmp_path):
    assert load_base(str(make_base_folder(tmp_path / "d", layers=6)), FLOAT32).config.n_layer == 6


def test_the_base_is_frozen(base):
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_nano_is_bundled_and_small():
    assert list_bundled() == ["nano"]
    folder = find_base("nano")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16e6
    base = load_base("nano", FLOAT32)
    assert 4e6 <= sum(p.numel() for p in base.model.parameters()) <= 8e6
    assert (base.config.n_positions, base.config.vocab_size, base.tokenizer.eos_id) == (512, 8192, 8191)


def test_the_fingerprint_covers_every_tensor_and_the_shape(tmp_path, base_folder):
    original = fingerprint_base(Checkpoint.read(base_folder))
    copied = shutil.copytree(base_folder, tmp_path / "copy")
    assert fingerprint_base(Checkpoint.read(copied)) == original
    assert fingerprint_base(Checkpoint.read(make_base_folder(tmp_path / "shards", shards=2))) == original
    tensors = load_file(copied / "model.safetensors")
    for name in [n for n in tensors if not n.endswith("attn.bias")]:
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[0] += 1e-3
        save_file(changed, copied / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint_base(Checkpoint.read(copied)) != original, name
    shutil.copy(base_folder / "model.safetensors", copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    assert fingerprint_base(Checkpoint.read(copied)) != original


def damage_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors")


def damage_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.zeros(5, 16)
    save_file(tensors, folder / "model.safetensors")


def damage_extra(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "transformer.h.0.crossattention.w": torch.zeros(1)}, folder / "model.safetensors")


def damage_shard_name(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def damage_vocabulary(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps({**vocab, "zz": len(vocab)}), encoding="utf-8")


def set_values(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return damage


def set_weight(name, value):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[f"transformer.{name}"].view(-1)[3] = value
        save_file(tensors, folder / "model.safetensors")

    return damage


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_missing_tensor, CorruptError, "h.1.mlp.c_fc.weight is missing"),
        (damage_shape, CorruptError, "wpe.weight has shape (5, 16), expected (48, 16)"),
        (damage_extra, MismatchError, "crossattention"),
        (damage_shard_name, CorruptError, "not in the folder"),
        (damage_vocabulary, MismatchError, "has ids up to"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), CorruptError, "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), CorruptError, "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), CorruptError, "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), CorruptError, "not a JSON object"),
        (lambda f: (f / "config.json").write_text('{"a":' * 10_000 + "1" + "}" * 10_000), CorruptError, "not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 10_000), CorruptError, "not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), CorruptError, "not JSON"),
        (lambda f: (f / "config.json").write_text(" " * 2**21), CorruptError, "not JSON"),
        (set_weight("wte.weight", NAN), CorruptError, "wte.weight holds NaN or infinity as float32"),
        (set_weight("h.1.mlp.c_proj.bias", INF), CorruptError, "h.1.mlp.c_proj.bias holds NaN or infinity"),
        (set_weight("ln_f.weight", -INF), CorruptError, "ln_f.weight holds NaN or infinity"),
        (set_values(layer_norm_epsilon=NAN), MismatchError, "layer_norm_epsilon is nan, expected a number from"),
        (set_values(layer_norm_epsilon=INF), MismatchError, "layer_norm_epsilon is inf, expected a number from"),
        (set_values(layer_norm_epsilon=-1), MismatchError, "layer_norm_epsilon is -1, expected a number from"),
        (set_values(layer_norm_epsilon=0), MismatchError, "layer_norm_epsilon is 0, expected"),
        (set_values(layer_norm_epsilon=True), MismatchError, "layer_norm_epsilon is True, expected"),
        (set_values(layer_norm_epsilon=None), MismatchError, "layer_norm_epsilon is None, expected"),
        (set_values(n_inner=-1), MismatchError, "n_inner is -1, expected a whole number from 1 to 1,048,576"),
        (set_values(n_inner=0), MismatchError, "n_inner is 0, expected"),
        (set_values(n_inner=64.0), MismatchError, "n_inner is 64.0, expected"),
        (set_values(n_inner=True), MismatchError, "n_inner is True, expected"),
        (set_values(n_layer=10**400), MismatchError, "n_layer is 1000"),
        (set_values(n_embd=[[[[[[]]]]]]), MismatchError, "n_embd is [[[[...]]]], expected"),
        (set_values(n_head=0), MismatchError, "n_head is 0, expected"),
        (set_values(tie_word_embeddings="false"), MismatchError, "tie_word_embeddings is 'false', expected true or"),
        (set_values(eos_token_id=True), MismatchError, "eos_token_id True is no token"),
        (set_values(eos_token_id=[]), MismatchError, "eos_token_id [] is no token"),
        (set_values(model_type="\x1b[31m"), MismatchError, "model_type is '\\x1b[31m', expected"),
        (lambda f: (f / "vocab.json").unlink(), NotFoundError, "no tokenizer"),
        (lambda f: (f / "vocab.json").write_text("{"), CorruptError, "tokenizer"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), NotFoundError, "pickle"),
    ],
)
def test_a_damaged_base_is_refused(tmp_path, base_folder, damage, error, message):
    folder = shutil.copytree(base_folder, tmp_path / "damaged")
    load_base(str(folder), FLOAT32)
    damage(folder)
    with pytest.raises(error) as caught:
        load_base(str(folder), FLOAT32)
    assert message in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == error.exit_code


@pytest.mark.parametrize("eos", [None, 50256])
def test_a_configuration_that_names_no_end_of_its_vocabulary_leaves_it_to_the_tokenizer(tmp_path, base_folder, eos):
    folder = shutil.copytree(base_folder, tmp_path / "other")
    wanted = load_base(str(folder), FLOAT32).tokenizer.eos_id
    set_values(eos_token_id=eos)(folder)
    assert load_base(str(folder), FLOAT32).tokenizer.eos_id == wanted
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["zz"] = vocab.pop("<|endoftext|>")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(CorruptError, match="which token ends a text"):
        load_base(str(folder), FLOAT32)


def test_a_token_that_was_added_without_resizing_the_model_is_characters(tmp_path, base_folder):
    folder = shutil.copytree(base_folder, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    base = load_base(str(folder), FLOAT32)
    plain = load_base(str(base_folder), FLOAT32)
    assert base.tokenizer.encode("a [PAD] b") == plain.tokenizer.encode("a [PAD] b")
    assert base.tokenizer.vocab_size == plain.tokenizer.vocab_size
    assert base.tokenizer.fingerprint == plain.tokenizer.fingerprint


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_all_ends_that_are_listed_end_a_text(tmp_path, base_folder, file):
    folder = shutil.copytree(base_folder, tmp_path / "other")
    eos = load_base(str(folder), FLOAT32).tokenizer.eos_id
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    for ends, wanted in (([7, eos, True, 10**6], {7, eos}), ([7, 8], {eos}), ([], {eos})):
        if file == "config.json" and not ends:
            continue
        (folder / file).write_text(json.dumps({**values, "eos_token_id": ends}))
        assert load_base(str(folder), FLOAT32).tokenizer.stop_ids == wanted
    (folder / file).write_text(json.dumps({**values, "eos_token_id": [7, eos]}))
    copied = pickle.loads(pickle.dumps(load_base(str(folder), FLOAT32).tokenizer))
    assert copied.stop_ids == {7, eos}


def test_unknown_names_and_an_unreachable_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError) as unknown:
        find_base("gpt-2")
    assert "nano, gpt2" in unknown.value.hint
    for name in ("gpt2", "someone/some-gpt2"):
        with pytest.raises(ResourceError) as offline:
            find_base(name)
        assert offline.value.exit_code == 7
        assert "--base FOLDER" in offline.value.hint


def test_precision_follows_what_the_cpu_really_has(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("LORA_GPT2_CPU_DTYPE")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime, "has_native_bfloat16", lambda native=native: native)
        assert choose_runtime("auto", cpu).dtype == dtype
        for name in DTYPES:
            monkeypatch.setenv("LORA_GPT2_CPU_DTYPE", name)
            if name == "float16":
                with pytest.raises(UsageError, match="LORA_GPT2_CPU_DTYPE is 'float16'"):
                    choose_runtime("auto", cpu)
            else:
                assert choose_runtime("auto", cpu).dtype_name == name
                assert choose_runtime("float32", cpu).dtype == torch.float32, "what a recipe says goes before it"
        monkeypatch.delenv("LORA_GPT2_CPU_DTYPE")
    with pytest.raises(UsageError, match="float16"):
        choose_runtime("float16", cpu)
    cuda = torch.device("cuda")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, supported=supported: supported)
        assert choose_runtime("auto", cuda).dtype == dtype
    assert choose_runtime("float16", cuda).dtype == torch.float16
    assert measure_peak_memory(cpu) > 50e6


def test_the_fastest_device_is_chosen_and_apples_computes_in_float32(monkeypatch):
    has = {"cuda": False, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has["mps"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    monkeypatch.setattr(runtime, "has_native_bfloat16", lambda: True)
    monkeypatch.delenv("LORA_GPT2_CPU_DTYPE")
    mps, cpu = torch.device("mps"), torch.device("cpu")
    assert choose_runtime("auto") == runtime.Runtime(mps, torch.float32)
    for name in ("float32", "bfloat16", "float16"):
        assert choose_runtime(name) == runtime.Runtime(mps, getattr(torch, name))
    assert runtime.choose_float64_device(mps) == cpu
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 123)
    assert measure_peak_memory(mps) == 123
    has["mps"] = False
    assert choose_runtime("auto") == runtime.Runtime(cpu, torch.bfloat16)
    has.update(cuda=True, mps=True)
    assert choose_runtime("auto").device == torch.device("cuda") == runtime.choose_float64_device(torch.device("cuda"))


def test_sums_in_float64_stay_on_their_device():
    values = torch.tensor([1.0, 2.0**-40])
    assert runtime.as_float64(values).sum().item() == 1 + 2.0**-40
    assert runtime.as_float64(values).device == values.device


def test_bfloat16_is_found_without_proc(monkeypatch, tmp_path):
    wanted = runtime.has_native_bfloat16()
    monkeypatch.setattr(runtime, "CPU_FLAGS", tmp_path / "missing")
    assert runtime.has_native_bfloat16() == wanted
    for flag, expected in (("bf16", True), ("avx512_bf16", True), ("avx2", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        assert runtime.has_native_bfloat16() == expected


LOAD = """
import sys, torch
from pathlib import Path
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import Runtime
def read_kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
load_base(sys.argv[2], Runtime(torch.device("cpu"), torch.float32))  # what the libraries take at the first time
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = read_kilobytes("VmRSS:")
base = load_base(sys.argv[1], Runtime(torch.device("cpu"), torch.bfloat16))
sizes = [parameter.nbytes for parameter in base.model.parameters()]
print(1024 * (read_kilobytes("VmHWM:") - before), sum(sizes), max(sizes))
"""


def test_loading_takes_the_weights_and_one_tensor_more(tmp_path, base_folder):
    if sys.platform != "linux":
        pytest.skip("other systems count the memory of a process differently")
    folder = make_base_folder(tmp_path / "wide", layers=12, width=512, heads=8, context=64)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(base_folder)], capture_output=True, text=True, check=True
    )
    peak, weights, largest = map(int, done.stdout.split())
    assert weights > 7e7
    few = 8 * largest  # in float32 in the file and as two copies, and what a mapping has beyond its bound
    assert peak <= 1.1 * weights + few + MAPPED_BYTES


PEAK = "import torch; from lora_gpt2.model.runtime import measure_peak_memory as f; print(f(torch.device('cpu')))"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process begins at the peak of another")
def test_the_peak_is_this_processs_and_not_that_of_the_one_which_started_it():
    """Linux' `ru_maxrss` survives exec: a command that a large process starts would report that process's peak."""
    large = f"import subprocess, sys; block = bytearray(12 * 10**8); subprocess.run([sys.executable, '-c', {PEAK!r}])"
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 9e8
