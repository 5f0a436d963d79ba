"""Adapters from elsewhere: variants against PEFT itself, archives, loralib, the hub; and hostile ones of each kind."""

import errno
import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile
import time
import warnings
import zipfile
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load, save
from transformers import GPT2LMHeadModel

from lora_gpt2.core.console import LoggingReporter
from lora_gpt2.core.errors import (
    ConflictError,
    CorruptError,
    IntegrityError,
    LoraGpt2Error,
    MismatchError,
    NotFoundError,
    ResourceError,
    UsageError,
)
from lora_gpt2.data.successors import DRAFTER
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.model.probe import build_probe, compute_logits
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import LoraSettings
from lora_gpt2.store.archive import pack_archive, read_archive
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.compare import compare_adapters
from lora_gpt2.store.exchange import export_adapter, import_adapter, parse_adapter, push_adapter
from lora_gpt2.store.fetch import fetch_adapter
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import MANIFEST, PEFT_CONFIG, WEIGHTS
from lora_gpt2.store.peft.tensors import to_peft
from lora_gpt2.store.verify import CHECKS, verify_files, verify_on_base
from tests.builders import make_adapter, make_base_folder, train_and_save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, VeraConfig, get_peft_model

ORIGIN = Origin(
    data={"sources": ["a.txt"], "train_tokens": 7},
    recipe={"description": "x"},
    figures={"seconds": 1.5},
    metrics=[{"step": 1}],
)


def logits_of(base, store, name):
    return compute_logits(base, Session(base, store).select(Mix.single(name)))


def train_in_peft(base_folder, base, folder, **options):
    """Trains a few steps in PEFT, saves it, and returns PEFT's logits on the probe."""
    model = GPT2LMHeadModel.from_pretrained(base_folder).eval()
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], **options}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **options))
    tokens = build_probe(base)
    train_and_save(wrapped, tokens, folder)
    with torch.no_grad():
        return wrapped(input_ids=tokens).logits


def bring_in(source, store, base, name="in", **options):
    return import_adapter(fetch_adapter(str(source)), store, name, base, LoggingReporter(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": r".*\.h\.[01]\.(attn|mlp)\.c_[a-z]+"},
        {"target_modules": "all-linear", "exclude_modules": r".*attn\.c_proj"},
        {"rank_pattern": {r"h\.0\..*c_fc": 2}, "alpha_pattern": {r".*\.(c_fc|c_attn)": 3}},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ],
)
def test_what_peft_trained_computes_the_same_here(base, base_folder, store, tmp_path, options):
    theirs = train_in_peft(base_folder, base, tmp_path / "peft", **options)
    found = bring_in(tmp_path / "peft", store, base)
    ours = logits_of(base, store, "in")
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((theirs - compute_logits(base)).abs().max()) > 0.05
    assert (found.variant, found.relative_error) == ("pissa" if "pissa" in str(options) else "lora", 0.0)


class Said(LoggingReporter):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def test_what_dora_loses_is_said_wherever_it_is_used(base, base_folder, tmp_path):
    train_in_peft(base_folder, base, tmp_path / "peft", use_dora=True, r=2)
    said = Said()
    ranks = {
        update.rank for update in parse_adapter(fetch_adapter(str(tmp_path / "peft")), base, said).updates.values()
    }
    assert (max(ranks), said.lines) == (16, []), "the base's width makes it exact"
    source = fetch_adapter(str(tmp_path / "peft"))
    found = import_adapter(source, Store(tmp_path / "store"), "rough", base, said, rank=2)
    (line,) = said.lines
    assert f"{found.relative_error:.2%} of its update is lost" in line
    assert "--rank 16' makes it exact" in line


def test_an_adapter_that_names_another_base_is_said_to(base, base_folder, store, tmp_path):
    other = make_base_folder(tmp_path / "other", seed=5)
    copied = shutil.copytree(base_folder, tmp_path / "copied")
    same = dict.fromkeys((str(base_folder), str(copied), ""), "")
    named = {**same, str(other): "whose weights are not those of", "acme/gpt2": "cannot be checked"}
    for name, expected in named.items():
        files = to_peft(make_adapter(base.config), name, base.config)
        folder = tmp_path / "peft" / str(len(name))
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        for use in ("import", "parse"):
            said = Said()
            if use == "import":
                import_adapter(fetch_adapter(str(folder)), store, "in", base, said)
                assert store.read_manifest("in").provenance["base_named"] == name
            else:
                parse_adapter(fetch_adapter(str(folder)), base, said)
            assert len(said.lines) == bool(expected), said.lines
            assert expected in "".join(said.lines)


def test_a_rank_or_an_alpha_of_what_has_its_own_is_refused(base, store, tmp_path):
    for name, content in to_peft(make_adapter(base.config), "tiny", base.config).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="has its own rank"):
        bring_in(tmp_path, store, base, rank=2)
    with pytest.raises(UsageError, match="has its own alpha"):
        bring_in(tmp_path, store, base, alpha=99.0)


@pytest.mark.parametrize("config", [IA3Config(), PrefixTuningConfig(num_virtual_tokens=4), VeraConfig()])
def test_another_method_than_lora_is_named(base, store, tmp_path, config):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
    config.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=f"peft_type = '{config.peft_type.value}' is not supported"):
        bring_in(tmp_path, store, base)


def test_dora_comes_in_as_its_best_approximation_with_the_error_stated(base, base_folder, store, tmp_path):
    theirs = train_in_peft(base_folder, base, tmp_path / "peft", use_dora=True)
    exact = bring_in(tmp_path / "peft", store, base, "exact", rank=64)
    assert float((logits_of(base, store, "exact") - theirs).abs().max()) < 1e-3
    assert exact.relative_error < 1e-4
    rough = bring_in(tmp_path / "peft", store, base, "rough", rank=2)
    found = float((logits_of(base, store, "rough") - theirs).abs().max())
    # the same comparison on the same probe, one side through PEFT: float32 in another order
    assert found == pytest.approx(rough.max_logit_difference, rel=0.01)
    assert 0.01 < rough.relative_error < 1
    assert store.read_manifest("rough").provenance["variant"] == "dora"
    assert store.read_manifest("rough").provenance["relative_error"] == rough.relative_error


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": "all"}, "merge_and_unload"),
        ({"modules_to_save": ["wte"]}, "merge_and_unload"),
        ({"init_lora_weights": "olora"}, "wrongly"),
        ({"init_lora_weights": "pissa_niter_4"}, "random start"),
        ({"init_lora_weights": "loftq"}, "quantised base"),
        ({"peft_type": "LOHA"}, "convert_to_lora"),
        ({"layer_replication": [[0, 1]]}, "layers"),
        ({"target_modules": r"(a+)+\1"}, "name modules plainly"),
        ({"target_modules": "((a{1000}){1000}){1000}"}, "name modules plainly"),
        ({"target_modules": "x" * 5000}, "name modules plainly"),
        ({"alpha_pattern": {"(?=x)": 4}}, "name modules plainly"),
    ],
)
def test_what_is_refused_says_why_in_less_than_a_second(base, store, tmp_path, change, reason):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    files[PEFT_CONFIG] = json.dumps({**json.loads(files[PEFT_CONFIG]), **change}).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    started = time.monotonic()
    with pytest.raises(MismatchError) as caught:
        bring_in(tmp_path, store, base)
    assert time.monotonic() - started < 1
    assert reason in caught.value.hint
    assert next(iter(change)) in caught.value.message
    assert store.list_names() == []


def test_patterns_that_hang_pythons_engine_run_here_in_linear_time(base, store, tmp_path):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    values = {**json.loads(files[PEFT_CONFIG]), "alpha_pattern": {"((transformer|h|[.0-9a-z_])+)+X": 4}}
    for name, content in {**files, PEFT_CONFIG: json.dumps(values).encode()}.items():
        (tmp_path / name).write_bytes(content)
    started = time.monotonic()
    bring_in(tmp_path, store, base)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("target", ["folder", "file.tar.gz"])
def test_what_goes_out_comes_back_exactly_with_its_origin(base, store, tmp_path, target):
    settings = LoraSettings(rank=3, use_rslora=True, targets=("c_attn.q", "mlp.c_fc"))
    old = publish_adapter(store, "law", make_adapter(base.config, 1, settings), base, ORIGIN)
    export_adapter(store, "law", tmp_path / target)
    new = bring_in(tmp_path / target, other := Store(tmp_path / "other"), base, "back").manifest
    assert (new.digest, new.data, new.recipe, new.figures) == (old.digest, old.data, old.recipe, old.figures)
    assert new.provenance == {"by": "train", "imported_from": "law@1"}
    assert new.parents == ()
    one, two = load_adapter(store, "law", base)[1], load_adapter(other, "back", base)[1]
    assert all(
        torch.equal(u.a, two.updates[s].a) and torch.equal(u.b, two.updates[s].b) for s, u in one.updates.items()
    )
    assert compare_adapters(one, two, base.config)[-1].difference == 0
    with pytest.raises(ConflictError):
        export_adapter(store, "law", tmp_path / target)


def test_archives_have_the_same_bytes_each_time(base, store, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    for name in ("one.tar.gz", "two.tar.gz"):
        export_adapter(store, "law", tmp_path / name)
        time.sleep(1.1)
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()


def test_an_export_is_refused_on_another_base(base, store, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    export_adapter(store, "law", tmp_path / "law.tgz")
    twin = load_base(str(make_base_folder(tmp_path / "twin", seed=3)), choose_runtime("float32"))
    with pytest.raises(MismatchError, match="another base"):
        bring_in(tmp_path / "law.tgz", Store(tmp_path / "other"), twin)


def make_tar(members, fill=b"x"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(fill) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(fill) if member.size else None)
    return packed.getvalue()


HOSTILE = {
    "parent": lambda: make_tar([("../adapter_config.json", tarfile.REGTYPE)]),
    "absolute": lambda: make_tar([("/etc/cron.d/x", tarfile.REGTYPE)]),
    "deep": lambda: make_tar([("a/b/c", tarfile.REGTYPE)]),
    "hidden": lambda: make_tar([("law/.bashrc", tarfile.REGTYPE)]),
    "symlink": lambda: make_tar([("law/adapter_model.safetensors", tarfile.SYMTYPE)]),
    "hard link": lambda: make_tar([("law/adapter_model.safetensors", tarfile.LNKTYPE)]),
    "device": lambda: make_tar([("law/null", tarfile.CHRTYPE)]),
    "pipe": lambda: make_tar([("law/pipe", tarfile.FIFOTYPE)]),
    "sparse": lambda: make_tar([("law/x", tarfile.GNUTYPE_SPARSE)]),
    "twice": lambda: make_tar([("law/x", tarfile.REGTYPE), ("x", tarfile.REGTYPE)]),
    "many": lambda: make_tar([(f"law/{n}", tarfile.REGTYPE) for n in range(70)]),
    "bomb": lambda: gzip.compress(bytes(300_000_000), 1),
    "cut": lambda: make_tar([("law/x", tarfile.REGTYPE)])[:-20],
    "no archive": lambda: b"\x80\x04.",
    "no adapter": lambda: make_tar([("law/x", tarfile.REGTYPE)]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_at_once_and_write_nothing(base, store, tmp_path, kind):
    path = tmp_path / "law.tar.gz"
    path.write_bytes(HOSTILE[kind]())
    before = sorted(tmp_path.rglob("*"))
    started = time.monotonic()
    with pytest.raises(CorruptError):
        bring_in(path, store, base)
    assert time.monotonic() - started < 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_chain_of_headers_is_refused(shared, tmp_path):
    chain = io.BytesIO()
    for _ in range(3000):  # long names of long names, each of one block
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2
        chain.write(member.tobuf(tarfile.USTAR_FORMAT) + b"x\0".ljust(512, b"\0"))
    (tmp_path / "chain.tar.gz").write_bytes(gzip.compress(chain.getvalue()))
    for path in (tmp_path / "chain.tar.gz", shared / "cases" / "hostile" / "tar-chain.tar.gz"):
        with pytest.raises(CorruptError, match="damaged: headers of headers") as caught:
            read_archive(path)
        assert (caught.value.exit_code, caught.value.hint) == (5, "fetch it again")


def test_random_bytes_in_an_archive_are_never_a_crash(base, store, tmp_path):
    whole = bytearray(pack_archive({"a": b"1" * 1000, "b": b"2"}, "law"))
    path = tmp_path / "x.tgz"
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            read_archive(path)
        except CorruptError:
            continue
    path.write_bytes(whole)
    assert read_archive(path) == {"a": b"1" * 1000, "b": b"2"}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def merged_linear(x, a, b, scaling, enabled, d):
    """loralib's MergedLinear update as its source computes it (a grouped convolution)."""
    after_a = torch.nn.functional.linear(x, a)
    delta = torch.nn.functional.conv1d(after_a.mT, b.unsqueeze(-1), groups=len(enabled)).mT
    whole = torch.zeros(*x.shape[:-1], 3 * d)
    for place, index in enumerate(enabled):
        whole[..., index * d : (index + 1) * d] = delta[..., place * d : (place + 1) * d]
    return whole * scaling


@pytest.mark.parametrize("enabled", [(0, 2), (0, 1, 2)])
@pytest.mark.parametrize("wrap", [True, False])
def test_loralib_files_give_what_loralib_computes(base, store, tmp_path, enabled, wrap):
    d, rank, generator = base.config.n_embd, 4, torch.Generator().manual_seed(0)
    state = {}
    for layer in range(base.config.n_layer):
        shapes = {"A": (len(enabled) * rank, d), "B": (len(enabled) * d, rank)}
        for half, shape in shapes.items():
            state[f"module.transformer.h.{layer}.attn.c_attn.lora_{half}"] = torch.randn(shape, generator=generator)
    torch.save({"model_state_dict": state} if wrap else state, tmp_path / "e2e.pt")
    bring_in(tmp_path / "e2e.pt", store, base, alpha=32.0)
    update = load_adapter(store, "in", base)[1].updates["h.1.attn.c_attn"]
    x = torch.randn(2, 5, d, generator=generator)
    a, b = (state[f"module.transformer.h.1.attn.c_attn.lora_{half}"] for half in "AB")
    expected = merged_linear(x, a, b, 32 / rank, enabled, d)
    # the factors are of order 1 and scaled by 32 / rank: values of some hundred in float32
    torch.testing.assert_close(x @ update.a.mT @ update.b.mT * update.scaling, expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(UsageError, match="alpha"):
        bring_in(tmp_path / "e2e.pt", store, base)


def test_pickles_that_run_code_do_not(base, store, tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    for content in (pickle.dumps(Evil(trace)), pickle.dumps({"x": Evil(trace)}, protocol=2), b"", b"\x80\x05."):
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            bring_in(path, store, base, alpha=1.0)
    torch.save({"x": Evil(trace)}, path)
    with pytest.raises(IntegrityError):
        bring_in(path, store, base, alpha=1.0)
    assert not trace.exists()


def test_loralib_files_of_another_kind_are_refused(base, store, tmp_path):
    path, key = tmp_path / "x.pt", "h.0.attn.c_attn.lora_"
    for state in (
        {"wte.weight": torch.zeros(2)},
        {key + "A": torch.zeros(4, 16)},
        {key + "A": torch.zeros(4, 17), key + "B": torch.zeros(32, 2)},
        {key + "A": torch.full((4, 16), torch.nan), key + "B": torch.zeros(32, 2)},
        {"h.9.attn.c_attn.lora_A": torch.zeros(4, 16), "h.9.attn.c_attn.lora_B": torch.zeros(32, 2)},
        {},
        [1, 2],
    ):
        torch.save(state, path)
        with pytest.raises(IntegrityError):
            bring_in(path, store, base, alpha=1.0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 5_000_000)
    with pytest.raises(IntegrityError):
        bring_in(path, store, base, alpha=1.0)


def test_sources_that_are_nothing_say_what_would_be(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"x")
    (tmp_path / "out" / "law").mkdir(parents=True)
    (tmp_path / "out" / "law" / PEFT_CONFIG).write_text("{}")
    with pytest.raises(NotFoundError) as caught:
        fetch_adapter(str(tmp_path / "out"))
    assert caught.value.hint == f"adapters are in {tmp_path / 'out' / 'law'}"
    for source, error in (
        (tmp_path / "no", NotFoundError),
        (tmp_path / "x.zip", UsageError),
        (tmp_path, NotFoundError),
    ):
        with pytest.raises(error) as caught:
            fetch_adapter(str(source))
        assert caught.value.hint


def test_an_unreachable_hub_loses_nothing_and_says_what_to_do(base, store):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    for work in (lambda: push_adapter(store, "law", "me/law", private=True), lambda: fetch_adapter("me/law")):
        with pytest.raises(ResourceError) as caught:
            work()
        assert caught.value.exit_code == 7
        assert "export" in caught.value.hint or "copy" in caught.value.hint
    load_adapter(store, "law", base)
    with pytest.raises(UsageError, match="not a hub repository"):
        push_adapter(store, "law", "no slash", private=False)


def test_a_push_uploads_every_file_with_the_card(base, store, monkeypatch):
    import huggingface_hub

    sent = {}

    class Api:
        def create_repo(self, repository, private, exist_ok):
            sent["repository"] = (repository, private, exist_ok)

        def list_repo_files(self, repository):
            return [".gitattributes", "notes.md", "README.md", WEIGHTS, "drafter.bin"]

        def create_commit(self, repository, operations, commit_message):
            added = [each for each in operations if isinstance(each, huggingface_hub.CommitOperationAdd)]
            sent["files"] = {operation.path_in_repo: operation.path_or_fileobj for operation in added}
            sent["deleted"] = [each.path_in_repo for each in operations if each not in added]
            return type("Commit", (), {"commit_url": f"https://hub/{repository}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    assert push_adapter(store, "law", "me/law", private=True) == "https://hub/me/law"
    assert sent["repository"] == ("me/law", True, True)
    folder = store.resolve("law")
    assert sent["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"base_model:" not in sent["files"]["README.md"], "a path of this machine"
    assert sent["deleted"] == [DRAFTER], "what an earlier version had of its text, and nothing of others"


def test_a_pull_comes_from_the_hubs_cache_without_a_network(base, store, tmp_path, monkeypatch):
    import huggingface_hub

    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *rest, **more: str(store.resolve("law")))
    found = bring_in("me/law", Store(tmp_path / "other"), base, "law")
    assert found.manifest.digest == store.read_manifest("law").digest


def test_what_the_hub_refuses_is_said(base, store, monkeypatch):
    import huggingface_hub

    class Api:
        def create_repo(self, repository, private, exist_ok):
            raise ValueError("Invalid metadata in README.md: base_model")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    with pytest.raises(ResourceError, match="the hub refuses to push law: Invalid metadata"):
        push_adapter(store, "law", "me/law", private=True)


def test_an_old_adapter_of_the_hub_comes_as_one_in_a_folder(base, store, tmp_path, monkeypatch):
    """PEFT once saved a pickle alone."""
    import huggingface_hub

    files = to_peft(make_adapter(base.config, 5), "tiny", base.config)
    hub = tmp_path / "snapshot"

    def download(identifier, allow_patterns, local_files_only=False):
        hub.mkdir(exist_ok=True)
        (hub / PEFT_CONFIG).write_bytes(files[PEFT_CONFIG])
        if "adapter_model.bin" in allow_patterns:
            torch.save(load(files[WEIGHTS]), hub / "adapter_model.bin")
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = bring_in("me/law", store, base, "law")
    assert found.manifest.digest == hashlib.sha256(files[WEIGHTS]).hexdigest()


def test_an_export_without_the_head_says_nothing_of_the_whole(base, store, tmp_path):
    whole = make_adapter(base.config, 1, LoraSettings(rank=2, targets=("c_attn", "lm_head")))
    origin = Origin(figures={"validation_perplexity": 12.34, "trained_parameters": 99})
    publish_adapter(store, "law", whole, base, origin)
    said = export_adapter(store, "law", tmp_path / "out", base)
    tensors = load((tmp_path / "out" / WEIGHTS).read_bytes())
    assert said.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert said.size_bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "12.34" not in card
    assert "without its change of the head" in card


def test_verification_passes_sound_adapters_by_pefts_own_numbers(base, store):
    for seed, settings in enumerate(
        (LoraSettings(rank=3), LoraSettings(rank=2, use_rslora=True, targets=("c_attn.v",)))
    ):
        publish_adapter(store, f"a{seed}", make_adapter(base.config, seed, settings), base, ORIGIN)
    manifests = [verify_files(store, name)[1] for name in store.list_names()]
    for verdict in verify_on_base(store, manifests, base):
        assert verdict.is_sound, verdict.failure
        assert tuple(verdict.passed) == CHECKS
        assert verdict.max_logit_difference < 1e-4 < 0.01 < verdict.effect


def test_verification_finds_each_kind_of_fault(base, store, tmp_path, monkeypatch):
    idle = Adapter(updates={s: LoraUpdate(u.a, u.b * 0, u.alpha) for s, u in make_adapter(base.config).updates.items()})
    publish_adapter(store, "idle", idle, base, ORIGIN)
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    (idle_verdict,) = verify_on_base(store, [store.read_manifest("idle")], base)
    assert idle_verdict.failure == "effect: it changes nothing"
    twin = load_base(str(make_base_folder(tmp_path / "twin", seed=3)), choose_runtime("float32"))
    (verdict,) = verify_on_base(store, [store.read_manifest("law")], twin)
    assert "another base" in verdict.failure
    monkeypatch.setattr(
        "lora_gpt2.model.lora.LoraUpdate.scaling", property(lambda update: 1.01 * update.alpha / update.rank)
    )
    (verdict,) = verify_on_base(store, [store.read_manifest("law")], base)
    assert verdict.failure.startswith("logits: they differ")
    monkeypatch.undo()
    (store.resolve("law") / "README.md").write_text("changed")
    verdict, manifest = verify_files(store, "law")
    assert manifest is None
    assert "README.md is not the file" in verdict.failure
    assert not verify_files(store, "nothing")[0].is_sound


def test_distances_are_those_of_the_dense_updates(base):
    one = make_adapter(base.config, 1, LoraSettings(rank=3, targets=("mlp.c_fc",)))
    other = make_adapter(base.config, 2, LoraSettings(rank=5, targets=("mlp.c_fc", "mlp.c_proj")))
    rows = {row.site: row for row in compare_adapters(one, other, base.config)}
    site = "h.1.mlp.c_fc"
    left, right = (a.updates[site].b @ a.updates[site].a * a.updates[site].scaling for a in (one, other))
    assert rows[site].norm == pytest.approx(float(left.norm()), rel=1e-5)
    assert rows[site].difference == pytest.approx(float((left - right).norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0)
    assert rows[site].cosine == pytest.approx(float(cosine), abs=1e-5)
    assert (rows["h.0.mlp.c_proj"].norm, rows["h.0.mlp.c_proj"].cosine) == (0, 0)
    whole = sum(rows[f"h.{layer}.mlp.c_fc"].norm ** 2 for layer in range(2)) ** 0.5
    assert rows["all"].norm == pytest.approx(whole)


def test_a_hostile_store_version_cannot_hang_verification(base, store):
    """Someone publishes a version whose hashes are right and whose patterns would hang Python's engine."""
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    folder = store.resolve("law")
    values = {
        **json.loads((folder / PEFT_CONFIG).read_bytes()),
        "target_modules": r"((transformer|h|[.0-9a-z_])+)+(c_attn|c_proj|c_fc)",
    }
    content = json.dumps(values).encode()
    (folder / PEFT_CONFIG).write_bytes(content)

    manifest = store.read_manifest("law")
    changed = replace(manifest, files={**manifest.files, PEFT_CONFIG: hashlib.sha256(content).hexdigest()})
    (folder / MANIFEST).write_bytes(changed.to_bytes())
    started = time.monotonic()
    (verdict,) = verify_on_base(store, [store.read_manifest("law")], base)
    assert "expressions" in verdict.failure
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("size", [2**63, 2**40, 2**27])
def test_header_bombs_are_refused_at_once(base, store, tmp_path, size):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    (tmp_path / PEFT_CONFIG).write_bytes(files[PEFT_CONFIG])
    (tmp_path / WEIGHTS).write_bytes(size.to_bytes(8, "little") + b"{" * 100)
    started = time.monotonic()
    with pytest.raises(LoraGpt2Error):
        bring_in(tmp_path, store, base)
    huge = {"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    header = json.dumps(huge).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CorruptError):
        bring_in(tmp_path, store, base)
    assert time.monotonic() - started < 1


def test_half_precision_files_come_in(base, store, tmp_path):
    files = to_peft(make_adapter(base.config), "tiny", base.config)
    half = {name: tensor.half() for name, tensor in load(files[WEIGHTS]).items()}
    (tmp_path / PEFT_CONFIG).write_bytes(files[PEFT_CONFIG])
    (tmp_path / WEIGHTS).write_bytes(save(half))
    bring_in(tmp_path, store, base)
    update = load_adapter(store, "in", base)[1].updates["h.0.mlp.c_fc"]
    assert torch.equal(update.a, half["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"].float())


def test_tensors_that_claim_more_than_the_file_holds_are_refused(base, store, tmp_path):
    key = "h.0.attn.c_attn.lora_"
    huge = {key + "A": torch.zeros(1).expand(2 * 10**7, 16), key + "B": torch.zeros(1).expand(32, 10**7)}
    torch.save(huge, tmp_path / "x.pt")
    started = time.monotonic()
    with pytest.raises(CorruptError, match="rank"):
        bring_in(tmp_path / "x.pt", store, base, alpha=1.0)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("status", [401, 403, None])
def test_every_failure_of_the_hub_is_ours(base, store, monkeypatch, status):
    import huggingface_hub

    class Refused(Exception):
        response = type("Response", (), {"status_code": status})

    class Api:
        def create_repo(self, *rest, **more):
            raise Refused

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    with pytest.raises(ResourceError, match="does not let you" if status else "cannot be reached"):
        push_adapter(store, "law", "me/law", private=True)


def test_a_pull_asks_the_hub_first_and_the_cache_where_it_is_away(base, store, tmp_path, monkeypatch):
    import huggingface_hub

    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    asked = []

    def download(*rest, local_files_only=False, **more):
        asked.append(local_files_only)
        if not local_files_only and len(asked) > 1:
            raise OSError("no network")
        return str(store.resolve("law"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetch_adapter("me/law")
    assert asked == [False]
    fetch_adapter("me/law")
    assert asked == [False, False, True]


def test_a_card_edited_on_the_way_is_no_damage_and_a_foreign_manifest_none_of_ours(base, store, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)
    export_adapter(store, "law", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    assert bring_in(tmp_path / "out", store, base).manifest.figures == {"seconds": 1.5}
    (tmp_path / "out" / MANIFEST).write_text('{"name": "an app"}')
    assert bring_in(tmp_path / "out", store, base).manifest.figures == {}


def test_a_pattern_hidden_in_layers_pattern_does_not_reach_peft():
    from lora_gpt2.store.peft.config import parse_peft_config

    content = {"r": 4, "target_modules": ["c_fc"], "layers_to_transform": [0], "layers_pattern": ["((h|.)+)+X"]}
    assert not parse_peft_config(json.dumps(content).encode(), "x").is_plain
    assert parse_peft_config(json.dumps({**content, "layers_pattern": ["h"]}).encode(), "x").is_plain


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', '{"model_type": "gpt2"}', "no JSON"])
def test_a_folder_that_happens_to_have_the_bases_name_keeps_no_adapter_out(
    base, base_folder, store, tmp_path, monkeypatch, config, caplog
):
    theirs = train_in_peft(base_folder, base, tmp_path / "peft")
    path = tmp_path / "peft" / PEFT_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "mybase"}))
    (tmp_path / "mybase").mkdir()
    (tmp_path / "mybase" / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        bring_in("peft/", store, base)
    assert float((logits_of(base, store, "in") - theirs).abs().max()) < 1e-4
    assert "names the base 'mybase'" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "space"),
        (LocalTokenNotFoundError("log in"), "does not let you"),
    ],
)
def test_what_keeps_a_pull_from_working_is_not_hidden_by_what_is_cached(base, store, monkeypatch, error, message):
    import huggingface_hub

    publish_adapter(store, "law", make_adapter(base.config), base, ORIGIN)

    def download(*rest, local_files_only=False, **more):
        if not local_files_only:
            raise error
        return str(store.resolve("law"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ResourceError, match=message):
        fetch_adapter("me/law")
