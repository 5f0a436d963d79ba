"""Reading PEFT's format from strangers: exact round trips, and every hostile or wrong file refused quickly."""

import json
import time

import pytest
import torch
from safetensors.torch import load, save

from lora_gpt2.core.errors import CorruptError, IntegrityError, MismatchError, NotFoundError
from lora_gpt2.model.lora import Adapter
from lora_gpt2.recipe import BLOCKS, LoraSettings
from lora_gpt2.store.manifest import PEFT_CONFIG, WEIGHTS
from lora_gpt2.store.peft.tensors import from_peft, read_peft_files, to_peft
from tests.builders import make_adapter

SETTINGS = [
    LoraSettings(rank=4, alpha=10),
    LoraSettings(rank=3, alpha=7.5, use_rslora=True),
    LoraSettings(rank=4, targets=("c_attn.q", "c_attn.v"), alpha=32),
    LoraSettings(rank=2, rank_pattern={"mlp.c_fc": 5}, targets=("mlp.c_fc", "mlp.c_proj", "attn.c_proj")),
    LoraSettings(rank=2, targets=("c_attn.k", "mlp.c_fc")),
]


def read(files, config):
    return from_peft(files[WEIGHTS], files[PEFT_CONFIG], config, "somewhere")


@pytest.mark.parametrize("settings", SETTINGS)
def test_round_trips_are_exact(base, settings):
    adapter = make_adapter(base.config, 1, settings)
    again = read(to_peft(adapter, "tiny", base.config), base.config)
    assert again.ranks == adapter.ranks
    for site, update in adapter.updates.items():
        other = again.updates[site]
        assert torch.equal(update.a, other.a)
        assert torch.equal(update.b, other.b)
        assert (update.alpha, update.use_rslora, update.scaling) == (other.alpha, other.use_rslora, other.scaling)


def test_ranks_that_differ_by_layer_survive(base):
    one, two = make_adapter(base.config, 1, LoraSettings(rank=2)), make_adapter(base.config, 1, LoraSettings(rank=5))
    mixed = Adapter(updates={site: (one if site.startswith("h.0") else two).updates[site] for site in one.updates})
    assert read(to_peft(mixed, "tiny", base.config), base.config).ranks == mixed.ranks


@pytest.mark.parametrize("kept", ["h.0", "h.1", "h.1.mlp"])
def test_adapters_of_some_layers_survive(base, kept):
    whole = make_adapter(base.config)
    part = Adapter(updates={site: update for site, update in whole.updates.items() if site.startswith(kept)})
    assert read(to_peft(part, "tiny", base.config), base.config).ranks == part.ranks


def test_the_same_adapter_gives_the_same_bytes(base):
    adapter = make_adapter(base.config)
    assert to_peft(adapter, "tiny", base.config) == to_peft(adapter, "tiny", base.config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "LOHA"}, MismatchError, "peft_type"),
        ({"use_dora": True}, CorruptError, "magnitudes"),
        ({"bias": "all"}, MismatchError, "bias"),
        ({"init_lora_weights": "pissa"}, MismatchError, "init_lora_weights"),
        ({"modules_to_save": ["wte"]}, MismatchError, "modules_to_save"),
        ({"some_new_feature": 1}, MismatchError, "some_new_feature"),
        ({"trust_remote_code": "x.py"}, MismatchError, "trust_remote_code"),
        ({"r": 1e8}, CorruptError, "r is"),
        ({"r": True}, CorruptError, "r is"),
        ({"r": 5}, CorruptError, "has rank 4, its configuration says 5"),
        ({"lora_alpha": float("nan")}, CorruptError, "lora_alpha"),
        ({"lora_alpha": float("inf")}, CorruptError, "lora_alpha"),
        ({"lora_alpha": 0}, CorruptError, "lora_alpha"),
        ({"lora_alpha": "8"}, CorruptError, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 4}}, None, ""),
        ({"rank_pattern": {"c_fc": "x"}}, CorruptError, "rank_pattern"),
        ({"alpha_pattern": [1]}, CorruptError, "alpha_pattern"),
        ({"use_rslora": "false"}, CorruptError, "use_rslora"),
        ({"layers_to_transform": "1"}, CorruptError, "layers_to_transform"),
        ({"layers_to_transform": [1.5]}, CorruptError, "layers_to_transform"),
        ({"target_modules": ["attn.c_attn", "c_proj", "mlp.c_fc", "ln_1"]}, None, ""),
        ({"target_modules": ["c_attn"]}, MismatchError, "its configuration does not name it"),
        ({"layers_to_transform": [0]}, MismatchError, "its configuration does not name it"),
        ({"target_modules": "(x+x+)+y"}, MismatchError, "its configuration does not name it"),
        ({"target_modules": "all-linear"}, None, ""),
    ],
)
def test_a_configuration_is_closed_and_nothing_in_it_runs(base, change, error, message):
    plain = make_adapter(base.config, settings=LoraSettings(rank=4, alpha=8, targets=BLOCKS))
    files = to_peft(plain, "tiny", base.config)
    values = {**json.loads(files[PEFT_CONFIG]), **change}
    files[PEFT_CONFIG] = json.dumps(values).encode()
    started = time.monotonic()
    if error is None:
        read(files, base.config)
    else:
        with pytest.raises(error) as caught:
            read(files, base.config)
        assert message in caught.value.message
        assert caught.value.exit_code == 5
    assert time.monotonic() - started < 1


def drop(name):
    return lambda tensors: tensors.pop(name)


PREFIX = "base_model.model.transformer.h."


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop(f"{PREFIX}0.mlp.c_fc.lora_B.weight"), CorruptError, "lora_B of h.0.mlp.c_fc is missing"),
        (
            lambda t: [t.pop(k) for k in list(t) if "1.mlp.c_fc" in k],
            CorruptError,
            "tensors of h.1.mlp.c_fc are missing",
        ),
        (lambda t: t.clear(), CorruptError, "holds no adapter"),
        (
            lambda t: t.update({f"base_model.model.lm_head.lora_{half}.weight": torch.zeros(1) for half in "AB"}),
            MismatchError,
            "lm_head",
        ),
        (lambda t: t.update({f"{PREFIX}7.mlp.c_fc.lora_A.weight": torch.zeros(4, 16)}), MismatchError, "h.7.mlp.c_fc"),
        (
            lambda t: t.update({f"{PREFIX}0.mlp.c_fc.lora_A.weight": torch.zeros(4, 17)}),
            MismatchError,
            "needs A [rank, 16]",
        ),
        (
            lambda t: t.update({f"{PREFIX}0.mlp.c_fc.lora_A.weight": torch.zeros(4, 16, 1)}),
            MismatchError,
            "A (4, 16, 1)",
        ),
        (lambda t: t[f"{PREFIX}0.mlp.c_fc.lora_A.weight"].fill_(torch.nan), CorruptError, "NaN"),
        (lambda t: t[f"{PREFIX}0.mlp.c_fc.lora_B.weight"][0].fill_(torch.inf), CorruptError, "infinity"),
        (lambda t: t.update({f"{PREFIX}0.mlp.c_fc.lora_A.weight": torch.zeros(4, 16).int()}), CorruptError, "lora_A"),
    ],
)
def test_damaged_tensors_are_refused_by_name(base, damage, error, message):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    tensors = load(files[WEIGHTS])
    damage(tensors)
    files[WEIGHTS] = save(tensors)
    with pytest.raises(error) as caught:
        read(files, base.config)
    assert message in caught.value.message


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}", b"\x80\x04."])
def test_files_that_are_not_safetensors_are_refused(base, content):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    files[WEIGHTS] = content
    with pytest.raises(CorruptError, match="damaged"):
        read(files, base.config)
    for text in (b"", b"[1]", b"{" * 100_000, b"\xff"):
        with pytest.raises(IntegrityError):
            read({**to_peft(make_adapter(base.config), "tiny", base.config), PEFT_CONFIG: text}, base.config)


def test_an_adapter_of_a_shallower_base_is_refused(tmp_path):
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime
    from tests.builders import make_base_folder

    runtime = choose_runtime("float32", torch.device("cpu"))
    deep, shallow = (load_base(str(make_base_folder(tmp_path / str(n), layers=n)), runtime).config for n in (3, 2))
    with pytest.raises(MismatchError, match=r"h\.2\."):
        read(to_peft(make_adapter(deep), "deep", deep), shallow)
    with pytest.raises(CorruptError, match=r"h\.2\..* missing"):
        read(to_peft(make_adapter(shallow), "shallow", shallow), deep)


def test_a_folder_without_weights_or_configuration_is_not_found(tmp_path, base):
    with pytest.raises(NotFoundError, match=r"has no adapter_model\.safetensors"):
        read_peft_files(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(NotFoundError, match=r"has no adapter_config\.json"):
        read_peft_files(tmp_path)
    (tmp_path / PEFT_CONFIG).write_bytes(b"{}")
    with pytest.raises(CorruptError, match="is not a file of tensors"):
        read_peft_files(tmp_path)
