"""Merges prove themselves: against the mix they replace, transformers, GGUF's own reader; and refuse what is empty."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2TokenizerFast

from lora_gpt2.core.errors import CheckFailed, ConflictError, CorruptError, MismatchError, UsageError
from lora_gpt2.data.prepared import SKETCH
from lora_gpt2.data.text_sketch import TextSketch, hash_shingles
from lora_gpt2.evaluation.held_out import read_sketch, read_sketches
from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.merging import combine, into_base
from lora_gpt2.merging.combine import MERGED, merge_adapters
from lora_gpt2.merging.into_base import merge_into_base
from lora_gpt2.merging.run import choose_weight
from lora_gpt2.merging.search import cut_text, search_weights
from lora_gpt2.merging.to_transformers import build_merged_model
from lora_gpt2.model.base import load_base
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.model.merge import MergeRule, combine_adapters, to_delta
from lora_gpt2.model.probe import build_probe, compute_logits
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import BLOCKS, EvaluateSettings, GenerateSettings, LoraSettings, MergeSettings
from lora_gpt2.store.card import build_card
from lora_gpt2.store.files import Origin, check_base, identify, load_adapter, publish_adapter
from lora_gpt2.store.references import BASE
from tests.builders import make_adapter, make_base_folder

MIX = Mix([("law", 0.7), ("code", 0.4)])
SOURCES = [
    EvaluationText(label="one", documents=["the cat and the dog run"]),
    EvaluationText(label="two", documents=["in the rain under another sun"]),
]
SETTINGS = EvaluateSettings()


@pytest.fixture
def session(base, store):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(data={"sources": [f"{name}.txt"]}))
    return Session(base, store)


def merge(session, reporter, mix=MIX, name="both", **how):
    return merge_adapters(session, mix, name, MergeSettings(**how), SOURCES, evaluate=SETTINGS, reporter=reporter)


def test_an_exact_merge_computes_what_the_mix_does_and_says_where_it_is_from(session, reporter, base, store):
    report = merge(session, reporter)
    mixed = compute_logits(base, session.select(MIX))
    merged = compute_logits(base, Session(base, store).select(Mix.single("both")))
    assert float((mixed - merged).abs().max()) < 1e-4
    assert report.max_logit_difference < 1e-4
    assert float((mixed - compute_logits(base)).abs().max()) > 0.01
    manifest = store.read_manifest("both")
    assert [(p.reference, p.weight, p.digest) for p in manifest.parents] == [
        (f"{name}@1", weight, store.read_manifest(name).digest) for name, weight in MIX
    ]
    assert manifest.provenance["by"] == "merge"
    assert manifest.data["sources"] == ["code.txt", "law.txt"]


@pytest.mark.parametrize("count", [2, 3])
def test_ties_of_equal_adapters_is_that_adapter_and_no_fraction_of_it(base, count):
    """The paper's merge is the mean of those that agree: shares of the weights would divide it again."""
    adapter = make_adapter(base.config, 3)
    mix = Mix.parse([f"a{index}" for index in range(count)], choose_weight(MergeSettings(method="ties")))
    rule = MergeRule(method="ties", density=1.0)
    merged = combine_adapters([adapter] * count, [weight for _, weight in mix], rule).adapter
    for site, update in adapter.updates.items():
        assert torch.allclose(to_delta(merged.updates[site]), to_delta(update), atol=1e-6)
    assert choose_weight(MergeSettings()) is None
    assert [weight for _, weight in Mix.parse("a:0.5+b:0.25", 1.0)] == [0.5, 0.25]


def test_a_merge_of_what_is_partly_unknown_does_not_claim_to_know_its_text(session, reporter, store, base):
    sketch = TextSketch.build([hash_shingles("a b c d e f g h i j")]).to_bytes()
    for name, seed, whole in (("known", 5, True), ("partly", 6, False)):
        data = {"sources": []} | ({} if whole else {"sketch_is_whole": False})
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(data=data, pages={SKETCH: sketch}))
    merge(session, reporter, Mix.parse("known+partly"), "some")
    assert read_sketch(store, "some").count_seen(["other words entirely, and many of them"]) is None
    rows = {"partly": ["partly"], "known": ["known"], "known+law": ["known", "law"], "law": ["law"]}
    found = read_sketches(store, rows)
    assert list(found) == ["partly", "known", "known+law"]
    assert [sketch.is_whole for sketch in found.values()] == [False, True, False]


def test_the_cells_are_those_of_evaluate(session, reporter, base, store):
    cells = {(cell.adapter, cell.source): cell.score.nll_nats for cell in merge(session, reporter).cells}
    assert {adapter for adapter, _ in cells} == {BASE, "law", "code", MERGED}
    assert {source for _, source in cells} == {"general", "one", "two"}
    fresh = Session(base, store)
    for adapter, mix in {"law": Mix.single("law"), MERGED: Mix.single("both"), BASE: Mix()}.items():
        score = measure_perplexity(base, SOURCES[0].documents, SETTINGS, fresh.select(mix))
        assert cells[adapter, "one"] == pytest.approx(score.nll_nats, rel=1e-6)


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_a_method_that_cuts_states_what_it_lost_and_less_is_lost_at_full_rank(session, reporter, method):
    low = merge(session, reporter, method=method, rank=1)
    full = merge(session, reporter, method=method, rank=64)
    assert low.largest_rank == 1
    assert 0 < full.relative_error + 1e-7 < low.relative_error < 1
    assert full.max_logit_difference < 1e-4 < low.max_logit_difference
    assert (full.version, low.version) == (2, 1)


def test_nothing_is_published_when_the_proof_fails(session, reporter, store, monkeypatch):
    def spoil(*arguments, **options):
        combined = spoil.original(*arguments, **options)
        updates = {s: LoraUpdate(u.a, u.b * 1.01, u.alpha) for s, u in combined.adapter.updates.items()}
        return replace(combined, adapter=Adapter(updates=updates))

    spoil.original = combine.combine_adapters
    monkeypatch.setattr(combine, "combine_adapters", spoil)
    with pytest.raises(CheckFailed, match="differs from the unmerged"):
        merge(session, reporter)
    assert store.list_names() == ["code", "law"]


@pytest.mark.parametrize(
    ("mix", "error", "message"),
    [
        (Mix(), UsageError, "needs an adapter"),
        (Mix([("law", 0.0), ("code", 0.0)]), UsageError, "changes nothing"),
        (Mix([("law", 1.0), ("law@1", 0.5)]), UsageError, "the same weights"),
    ],
)
def test_merges_without_sense_are_refused(session, reporter, store, mix, error, message):
    with pytest.raises(error, match=message):
        merge(session, reporter, mix)
    assert store.list_names() == ["code", "law"]


@pytest.mark.parametrize("method", ["ties", "cat"])
def test_merges_that_overflow_are_refused(session, reporter, store, base, method):
    with pytest.raises((CheckFailed, CorruptError), match="finite"):
        merge(session, reporter, Mix([("law", 1e39), ("code", 1.0)]), method=method)
    assert "both" not in store.list_names()


def test_an_adapter_of_another_base_is_refused(session, reporter, store, tmp_path):
    twin = load_base(str(make_base_folder(tmp_path / "twin", seed=3)), choose_runtime("float32", torch.device("cpu")))
    with pytest.raises(MismatchError, match="another base"):
        merge(Session(twin, store), reporter)


@pytest.mark.parametrize(("dtype", "limit"), [("auto", 1e-4), ("float16", 0.05), ("bfloat16", 0.4)])
def test_a_merged_base_runs_in_transformers_as_the_mix_does(session, reporter, tmp_path, base, dtype, limit):
    how = MergeSettings(dtype=dtype, max_shard_bytes=1_000_000)
    report = merge_into_base(session, MIX, tmp_path / "out", how, SOURCES, evaluate=SETTINGS, reporter=reporter)
    mixed = compute_logits(base, session.select(MIX))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(build_probe(base)).logits
    assert float((found - mixed).abs().max()) < limit
    assert report.max_logit_difference == pytest.approx(float((found - mixed).abs().max()), abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the cat")["input_ids"] == base.tokenizer.encode("the cat")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == report.dtype
    assert {cell.adapter for cell in report.cells} == {BASE, "law", "code", "law:0.7+code:0.4", MERGED}
    with pytest.raises(ConflictError, match="exists"):
        merge_into_base(session, MIX, tmp_path / "out", how, SOURCES, evaluate=SETTINGS, reporter=reporter)


def test_a_large_base_is_written_in_shards(reporter, store, tmp_path):
    folder = make_base_folder(tmp_path / "wide", width=128, heads=4, tied=False)
    wide = load_base(str(folder), choose_runtime("float32", torch.device("cpu")))
    publish_adapter(store, "law", make_adapter(wide.config), wide, Origin())
    session = Session(wide, store)
    how = MergeSettings(max_shard_bytes=1_000_000)
    report = merge_into_base(
        session, Mix.single("law"), tmp_path / "out", how, [], evaluate=SETTINGS, reporter=reporter
    )
    assert "model-00002-of-00002.safetensors" in report.files
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out")(build_probe(wide)).logits
    torch.testing.assert_close(theirs, compute_logits(wide, session.select(Mix.single("law"))), atol=1e-4, rtol=1e-4)


def test_a_failed_bake_leaves_no_folder(session, reporter, tmp_path, monkeypatch):
    combine_site = MergeRule.combine_site
    monkeypatch.setattr(into_base.MergeRule, "combine_site", lambda *rest: combine_site(*rest) * 1.1)
    with pytest.raises(CheckFailed):
        merge_into_base(session, MIX, tmp_path / "out", MergeSettings(), SOURCES, evaluate=SETTINGS, reporter=reporter)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize("with_head", [False, True])
def test_gguf_holds_the_merged_tensors_and_the_tokenizer(session, reporter, store, tmp_path, base, with_head):
    """The head is written beside the embeddings, which it differs from where the adapters change it."""
    import gguf

    if with_head:
        settings = LoraSettings(rank=4, targets=(*BLOCKS, "lm_head"))
        publish_adapter(store, "law", make_adapter(base.config, 3, settings), base, Origin())
    merge_into_base(session, MIX, tmp_path / "out", MergeSettings(gguf=True), [], evaluate=SETTINGS, reporter=reporter)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert torch.equal(found["blk.1.ffn_up.weight"], theirs["transformer.h.1.mlp.c_fc.weight"].mT)
    assert torch.equal(found["token_embd.weight"], theirs["transformer.wte.weight"])
    assert torch.equal(found["output.weight"], theirs["lm_head.weight"])
    assert torch.equal(found["output.weight"], found["token_embd.weight"]) == (not with_head)
    assert len(found) == 5 + 12 * base.config.n_layer
    expected = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2])
    known = {gguf.TENSOR_NAMES[kind].replace("{bid}", str(layer)) for kind in expected for layer in range(2)}
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in found} <= known
    read = {field.name: field.contents() for field in reader.fields.values()}
    assert read["gpt2.block_count"] == base.config.n_layer
    assert read["tokenizer.ggml.tokens"] == base.tokenizer.list_vocabulary()[0]
    assert read["tokenizer.ggml.merges"][0] == "t h"


def test_the_search_finds_the_mix_that_the_texts_came_from(session, reporter, base):
    """Both texts are sampled from one mix, so no other mix predicts them better on average."""
    rows = session.adapters_for([MIX] * 8)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((8, 1), base.config.eos_id)
    with torch.inference_mode():
        for _ in range(40):
            probabilities = base.model.logits(base.model(tokens, rows), rows)[:, -1, :200].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    texts = [base.tokenizer.decode(row[1:].tolist()).encode("ascii", "ignore").decode() for row in tokens]
    sources = [EvaluationText(label="one", documents=texts[:4]), EvaluationText(label="two", documents=texts[4:])]
    how = MergeSettings(search_steps=40)
    report = search_weights(session, Mix([("law", 1.0), ("code", 1.0)]), sources, how, SETTINGS, reporter)
    first, *_ = [c for c in report.candidates if c.weights == (1.0, 1.0) and c.method == "cat"]
    assert report.best.mean < first.mean
    assert report.best.mean < report.base.mean
    assert len({c.weights for c in report.candidates if c.method == "cat"}) <= 40
    assert {c.method for c in report.candidates} == {"cat", "ties", "dare_ties", "dare_linear", "magnitude_prune"}
    for one in report.candidates:
        beaten = any(
            other.nll != one.nll and all(a <= b for a, b in zip(other.nll, one.nll, strict=True))
            for other in report.candidates
        )
        assert beaten != (one in report.front)
    for best in report.candidates:  # each is what publishing it would give
        mix = Mix((name, weight) for name, weight in zip(("law", "code"), best.weights, strict=True) if weight)
        if best.method == "cat":
            rows = session.select(mix)
        else:
            report = merge_adapters(
                session, mix, "published", MergeSettings(method=best.method), [], evaluate=SETTINGS, reporter=reporter
            )
            rows = Session(base, session.store).select(Mix.single(f"published@{report.version}"))
        found = measure_perplexity(base, texts[:4], SETTINGS, rows)
        assert best.nll[0] == pytest.approx(found.nll_nats_per_token, rel=1e-4)


def test_a_search_needs_adapters_and_text(session, reporter):
    for mix, sources in ((Mix(MIX[:1]), SOURCES), (MIX, [])):
        with pytest.raises(UsageError, match="--search needs"):
            search_weights(session, mix, sources, MergeSettings(), SETTINGS, reporter)


def test_logits_that_are_not_finite_are_refused(session, reporter, store, base):
    for how in ({"method": "svd", "rank": 1}, {"method": "ties"}):
        with pytest.raises((CheckFailed, CorruptError)):
            merge(session, reporter, Mix([("code", 1e19), ("law", 1.0)]), **how)
    assert "both" not in store.list_names()


def test_a_wrongly_stated_error_is_found(session, reporter, monkeypatch):
    def understate(*arguments, **options):
        combined = understate.original(*arguments, **options)
        return replace(combined, relative_error=combined.relative_error / 2)

    understate.original = combine.combine_adapters
    monkeypatch.setattr(combine, "combine_adapters", understate)
    with pytest.raises(CheckFailed, match="reports a relative error"):
        merge(session, reporter, method="svd", rank=1)


def test_a_quantised_base_is_not_merged_into(store, reporter, base, base_folder, tmp_path):
    publish_adapter(store, "law", make_adapter(base.config), base, Origin())
    coarse = load_base(str(base_folder), choose_runtime("float32"), "int8")
    with pytest.raises(MismatchError, match="quantised"):
        merge_into_base(
            Session(coarse, store),
            Mix(MIX[:1]),
            tmp_path / "out",
            MergeSettings(),
            [],
            evaluate=SETTINGS,
            reporter=reporter,
        )


def test_a_base_that_llama_cpp_would_run_wrongly_gives_no_gguf(store, reporter, tmp_path):
    folder = make_base_folder(tmp_path / "exact")
    values = json.loads((folder / "config.json").read_text()) | {"activation_function": "gelu"}
    (folder / "config.json").write_text(json.dumps(values))
    exact = load_base(str(folder), choose_runtime("float32"))
    publish_adapter(store, "law", make_adapter(exact.config), exact, Origin())
    with pytest.raises(MismatchError, match="GELU"):
        merge_into_base(
            Session(exact, store),
            Mix(MIX[:1]),
            tmp_path / "out",
            MergeSettings(gguf=True),
            [],
            evaluate=SETTINGS,
            reporter=reporter,
        )


def test_a_base_of_chatml_stops_at_either_end_wherever_it_goes(base_folder, store, tmp_path, reporter):
    theirs = GPT2TokenizerFast.from_pretrained(base_folder)
    theirs.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    model = GPT2LMHeadModel.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(len(theirs))
    for each in (model, theirs):
        each.save_pretrained(tmp_path / "chatml")
    base = load_base(str(tmp_path / "chatml"), choose_runtime("float32"))
    publish_adapter(store, "chat", make_adapter(base.config, 1), base, Origin())
    stops = sorted(base.tokenizer.stop_ids)
    assert len(stops) == 2
    merged = build_merged_model(base, [load_adapter(store, "chat", base)[1]], [1.0])
    assert merged.generation_config.eos_token_id == stops
    session, how = Session(base, store), MergeSettings()
    merge_into_base(session, Mix.single("chat"), tmp_path / "out", how, SOURCES, evaluate=SETTINGS, reporter=reporter)
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").generation_config.eos_token_id == stops
    settings = GenerateSettings(
        json_schema={"type": "string"}, temperature=0, max_new_tokens=12, logit_bias={base.tokenizer.stop_id: 50.0}
    )
    (output,) = generate(session, [Request("a", Mix.single("chat"))], settings)
    assert "<|im_end|>" not in output.text
    assert output.finish_reason == "length" or isinstance(json.loads(output.text), str), "no text is cut by it"
    (other,) = base.tokenizer.fingerprints - {base.tokenizer.fingerprint}
    before = replace(identify(base), tokenizer_fingerprint=other)
    manifest = store.read_manifest("chat")
    check_base(replace(manifest, base=before), identify(base), base.tokenizer.fingerprints)
    with pytest.raises(MismatchError, match="another tokenizer"):
        check_base(replace(manifest, base=before), identify(base))


def test_a_merge_of_what_was_trained_on_a_text_is_marked_everywhere(session, reporter, store, base, tmp_path):
    text = " ".join(f"word{n} runs" for n in range(40))
    sketch = TextSketch.build([hash_shingles(text)]).to_bytes()
    origin = Origin(data={"sources": []}, pages={SKETCH: sketch})
    publish_adapter(store, "known", make_adapter(base.config, 5), base, origin)
    sources = [EvaluationText(label="seen", documents=[text])]
    how = {"evaluate": SETTINGS, "reporter": reporter, "searched_on": ["seen"]}
    mix = Mix.parse("known:1+law:0.5")
    report = merge_adapters(session, mix, "some", MergeSettings(), sources, **how)
    seen = {cell.adapter: cell.trained_on for cell in report.cells if cell.source == "seen"}
    assert seen == {BASE: None, "known": 1, "law": None, MERGED: 1}
    manifest = store.read_manifest("some")
    assert manifest.figures["documents_trained_on"] == {"seen": 1}
    assert manifest.data["sketch_is_whole"] is False, "nothing is known of the other"
    assert read_sketch(store, "some").count_seen([text]) == 1
    card = build_card(manifest)
    figures = [manifest.figures[key]["seen"] for key in ("perplexity", "base_perplexities")]
    shown = " | ".join(f"{value:,.2f}" for value in figures)
    assert f"| perplexity on seen (trained on 1 of its documents) | {shown} |" in card
    assert "searched_on seen" in card
    assert "base_perplexities" not in card
    out = tmp_path / "merged"
    written = merge_into_base(session, mix, out, MergeSettings(), sources, **how)
    seen = {cell.adapter: cell.trained_on for cell in written.cells if cell.source == "seen"}
    assert (seen[str(mix)], seen[MERGED]) == (1, 1)
    card = (out / "README.md").read_text()
    assert f"| {MERGED} | seen (trained on 1 of 1 documents) |" in card
    assert "chosen on these texts: seen" in card


def test_weights_of_close_adapters_that_nearly_cancel_are_no_bug(session, reporter, store, base):
    adapter = make_adapter(base.config, 5)
    near = {site: replace(u, a=u.a * (1 + 1e-3)) for site, u in adapter.updates.items()}
    for name, each in (("one", adapter), ("two", replace(adapter, updates=near))):
        publish_adapter(store, name, each, base, Origin())
    assert merge(session, reporter, Mix([("one", 1.0), ("two", -1.0)]), "delta").relative_error < 1e-3


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties", "dare_linear", "task_arithmetic"])
def test_weights_may_be_whole_numbers(session, reporter, method):
    whole = merge(session, reporter, Mix([("law", 1), ("code", 2)]), "whole", method=method)
    same = merge(session, reporter, Mix([("law", 1.0), ("code", 2.0)]), "same", method=method)
    assert [c.score.nll_nats for c in whole.cells] == [c.score.nll_nats for c in same.cells]


def test_a_search_reads_all_over_a_text_and_leaves_its_order_alone(base):
    words = ["the cat", "and rain", "under the sun", "dog"] * 20
    text = EvaluationText(label="x", documents=[f"{word} {n}" for n, word in enumerate(words)])
    total = sum(len(base.tokenizer.encode(document)) for document in text.documents)
    numbers = [int(document.text.split()[-1]) for document in cut_text(base, text, total // 4)[:-1]]
    assert numbers == sorted(numbers)
    assert min(numbers) < 20
    assert max(numbers) > 60
    assert len(cut_text(base, text, total)) == len(words)


def test_methods_that_take_a_mean_are_tried_with_the_sum_s_strength(session, reporter, base):
    """Adapters that agree keep their sum: a mean of their shares would be half of it."""
    found = search_weights(session, MIX, SOURCES, MergeSettings(search_steps=4, density=1.0), SETTINGS, reporter)
    best = min((c for c in found.candidates if c.method == "cat"), key=lambda candidate: candidate.mean)
    kept = sum(map(bool, best.weights))
    tried = {candidate.method: candidate.weights for candidate in found.candidates if candidate.method != "cat"}
    assert tried["ties"] == tried["dare_ties"] == tuple(kept * weight for weight in best.weights)
    assert tried["magnitude_prune"] == best.weights
