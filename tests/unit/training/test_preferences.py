"""Pairs become rows, rows a loss, and the loss moves an adapter towards what was chosen, within its limits."""

import dataclasses
import itertools
import json
import math
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import (
    DataError,
    Interrupted,
    InterruptedRunError,
    MismatchError,
    NotFoundError,
    UsageError,
)
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.data.prepared import prepare_data
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.bank import AdapterBank
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.rating.preferences import LabelledText, Preference, read_preferences
from lora_gpt2.rating.rounds import Answer, Round, add_answers, write_round
from lora_gpt2.recipe import LoraSettings, build_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.manifest import WEIGHTS
from lora_gpt2.training import preference_run
from lora_gpt2.training.checkpoint import RunFolder
from lora_gpt2.training.pairs import (
    encode_pairs,
    iter_groups,
    match_labelled,
    mismatch_pairs,
    score_rows,
    split_pairs,
)
from lora_gpt2.training.preference_loss import PreferenceLoss
from lora_gpt2.training.preference_run import train_preferences
from lora_gpt2.training.preferences import PreferenceTrainer
from lora_gpt2.training.process_group import ProcessGroup
from lora_gpt2.training.step import MicroBatch, StepRunner
from lora_gpt2.training.validation import measure_blocks
from tests.builders import make_adapter, make_text

PAIRS = [
    Preference(prompt=f"the {animal} and", chosen=f" the sun {animal}", rejected=" rain rain in the", is_whole=whole)
    for animal, whole in (("cat", True), ("dog", False), ("man", True), ("the cat on the hill", False))
]


def make_settings(name="law", **changes):
    values = {"name": name, "lora": {"init_from": name}, "train": {"dtype": "float32", "steps": 12}}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    return build_recipe(values, "test")


def test_prompts_carry_no_loss_and_whole_texts_end_with_eos(base):
    rows, tokenizer = encode_pairs(PAIRS, base.tokenizer, 48), base.tokenizer
    assert rows.num_pairs == 4
    for number, pair in enumerate(PAIRS):
        for column, text in enumerate((pair.chosen, pair.rejected)):
            inputs, targets = (side[2 * number + column] for side in (rows.inputs, rows.targets))
            scored = targets[targets != IGNORE].tolist()
            prompt, ids = tokenizer.encode(pair.prompt), tokenizer.encode(text)
            assert scored == [*ids, *([tokenizer.eos_id] if pair.is_whole else [])]
            assert inputs[: len(prompt) + len(ids)].tolist()[: len(prompt)] == list(prompt)
            assert targets[: len(prompt) - 1].tolist() == [IGNORE] * (len(prompt) - 1)
            assert rows.lengths[number, column] == len(scored)
    (empty,) = [Preference(prompt="", chosen="a", rejected="b")]
    assert encode_pairs([empty], tokenizer, 48).inputs[0, 0] == tokenizer.eos_id
    half = dataclasses.replace(PAIRS[0], is_whole=True, is_rejected_whole=False)
    ends = [tokenizer.eos_id in row for row in encode_pairs([half], tokenizer, 48).targets.tolist()]
    assert ends == [True, False]


def test_marks_of_the_end_are_taken_off_pairs_and_cut_none_in_two(tmp_path):
    end = "<|endoftext|>"
    records = [
        {"prompt": "Q: hi", "chosen": f" good{end}", "rejected": f" bad{end}"},
        {"prompt": "Q: ho", "chosen": f" good\n{end}\n", "rejected": f" bad\n{end}\n"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_preferences([str(tmp_path / "p.jsonl")]).pairs
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found] == [
        ("Q: hi", " good", " bad"),
        ("Q: ho", " good", " bad"),
    ]


def test_rows_are_read_without_the_padding_that_all_of_them_have(base):
    short, long = PAIRS[0], dataclasses.replace(PAIRS[0], chosen=" rain" * 60)
    rows = encode_pairs([short, short, long], base.tokenizer, 128)
    inputs, targets = rows.read([0, 1, 2, 3])
    assert inputs.shape == targets.shape == (4, 32) != rows.inputs[:4].shape
    assert (rows.targets[:4, 32:] == IGNORE).all()
    assert rows.read([0, 4])[0].shape[1] == rows.inputs.shape[1]


def test_the_zeros_of_a_sliced_target_stay_zeros(base, base_folder, store, tmp_path):
    recipe = make_settings(
        base=str(base_folder), preferences__sources=[write_pairs(tmp_path / "pairs.jsonl")], train__learning_rate=3e-2
    )
    lora = LoraSettings(targets=["c_attn.q"], rank=2)
    origin = Origin(recipe={"lora": lora.model_dump(mode="json")})
    publish_adapter(store, "law", make_adapter(base.config, 3, lora), base, origin)
    assert train_preferences(recipe, store, SilentReporter()).held_out_loss < 0.69
    before, after = (load_adapter(store, f"law@{version}", base)[1] for version in (2, 3))
    width = base.config.n_embd
    for site, update in after.updates.items():
        assert not update.b[width:].any(), site
        assert not torch.equal(update.b[:width], before.updates[site].b[:width])


def test_what_does_not_fit_is_cut_where_it_matters_least(base):
    ids = base.tokenizer.encode
    pair = Preference(prompt="x y z " * 30, chosen="the cat" * 2, rejected="rain " * 60)
    rows = encode_pairs([pair], base.tokenizer, 32)
    assert rows.inputs.shape == (2, 32)
    assert rows.num_cut == 1
    assert rows.targets[0][rows.targets[0] != IGNORE].tolist() == list(ids(pair.chosen))
    assert rows.targets[1].tolist() == list(ids(pair.rejected))[:32]
    assert rows.inputs[1, 0] == ids(pair.prompt)[-1]


def test_held_out_prompts_are_not_trained_on():
    pairs = [dataclasses.replace(PAIRS[0], prompt=f"p{number // 7}") for number in range(60)]
    trained, held_out = split_pairs(pairs)
    assert sorted([*trained, *held_out]) == list(range(60))
    assert 6 <= len(held_out) <= 11
    assert not {pairs[i].prompt for i in trained} & {pairs[i].prompt for i in held_out}
    trained, held_out = split_pairs([PAIRS[0]] * 30)
    assert (len(trained), len(held_out)) == (26, 4), "one prompt for all"


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_derivatives_are_those_of_the_loss(kind, smoothing):
    torch.manual_seed(0)
    logps, reference = torch.randn(6, requires_grad=True), torch.randn(6)
    lengths = torch.tensor([3, 5, 2, 2, 9, 1])
    loss = PreferenceLoss(kind=kind, beta=0.3, smoothing=smoothing)
    losses, margins, slopes = loss.measure(logps, reference, lengths)
    losses.sum().backward()
    torch.testing.assert_close(slopes.detach(), logps.grad)
    ratio = (logps - reference) / (lengths if kind == "ipo" else 1)
    torch.testing.assert_close(margins, ratio[::2] - ratio[1::2])
    if kind == "dpo":
        kept = F.logsigmoid(0.3 * margins) * (1 - smoothing) + F.logsigmoid(-0.3 * margins) * smoothing
        torch.testing.assert_close(losses, -kept)
    if kind == "kto":
        values = torch.sigmoid(0.3 * ratio[::2]) + torch.sigmoid(-0.3 * ratio[1::2])
        torch.testing.assert_close(losses, 1 - values / 2)


def label(prompt, is_desirable):
    return LabelledText(prompt=prompt, text=f" {prompt} {is_desirable}", is_desirable=is_desirable)


@pytest.mark.parametrize(("good", "bad"), [(60, 20), (10, 50), (30, 4)])
def test_labelled_texts_count_alike_and_no_prompt_is_in_both_parts(good, bad):
    texts = [label(f"p{number}", is_good) for is_good, count in ((True, good), (False, bad)) for number in range(count)]
    pairs, split = match_labelled(texts)
    assert sorted([*split[0], *split[1]]) == list(range(len(pairs)))
    seen = []
    for part in split:
        chosen = [(pairs[index].prompt, pairs[index].chosen) for index in part]
        rejected = [(pairs[index].rejected_prompt, pairs[index].rejected) for index in part]
        assert all(text.endswith("True") for _, text in chosen)
        assert all(text.endswith("False") for _, text in rejected)
        counts = [Counter(side) for side in (chosen, rejected)]
        assert all(max(each.values()) - min(each.values()) <= 1 for each in counts), "repeated evenly"
        assert min(max(each.values()) for each in counts) == 1, "those of the commoner label are there once"
        seen.append({*chosen, *rejected})
    assert {(text.prompt, text.text) for text in texts} == seen[0] | seen[1]
    assert not {prompt for prompt, _ in seen[0]} & {prompt for prompt, _ in seen[1]}
    assert 4 <= len(seen[1]) <= 0.2 * len(texts)


def test_labels_of_one_prompt_are_held_out_too_and_too_few_are_refused():
    texts = [dataclasses.replace(label("p", n % 2 == 0), text=f" text {n % 38}") for n in range(40)]
    pairs, (trained, held_out) = match_labelled(texts)
    assert len(held_out) in (2, 3)
    assert len(trained) in (17, 18)
    kept, held = ({text for n in part for text in (pairs[n].chosen, pairs[n].rejected)} for part in (trained, held_out))
    assert not kept & held, "copies are together"
    few = [dataclasses.replace(label(("news", "law")[n >= 500], n % 2 == 0), text=f" text {n}") for n in range(540)]
    assert 20 <= len(match_labelled(few)[1][1]) <= 50, "two prompts, of which neither is held out whole"
    mixed = [dataclasses.replace(text, is_whole=text.is_desirable) for text in texts]
    pairs, split = match_labelled(mixed)
    for each in (*pairs, *mismatch_pairs(pairs, split)):
        assert (each.is_whole, each.is_rejected_whole) == (True, False)
    with pytest.raises(DataError, match="are copies of each other"):
        match_labelled([label("p", number % 2 == 0) for number in range(40)])
    with pytest.raises(DataError, match="37 desirable and 3 undesirable"):
        match_labelled([label("p", number > 2) for number in range(40)])


def test_mismatched_texts_are_those_of_other_pairs_of_the_same_part():
    pairs = [Preference(prompt=f"p{n}", chosen=f"c{n}", rejected=f"r{n}", rejected_prompt=f"q{n}") for n in range(9)]
    split = ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    found = mismatch_pairs(pairs, split)
    assert [(each.prompt, each.rejected_prompt) for each in found] == [(f"p{n}", f"q{n}") for n in range(9)]
    for part in split:
        assert sorted(found[index].chosen for index in part) == [f"c{index}" for index in part]
        assert all(found[index].chosen[1:] == found[index].rejected[1:] != str(index) for index in part)


def test_the_odds_ratio_is_that_of_the_paper():
    """ORPO's loss and slopes, against its formula with probabilities as they are, through autograd."""
    torch.manual_seed(0)
    logps, reference = -5 * torch.rand(6, dtype=torch.float64), -5 * torch.rand(6, dtype=torch.float64)
    logps.requires_grad_()
    lengths = torch.tensor([3, 5, 2, 2, 9, 1])
    losses, margins, slopes = PreferenceLoss(kind="orpo", beta=0.3).measure(logps, reference, lengths)

    def measure_odds(each):
        p = (each / lengths).exp()
        return (p / (1 - p)).view(-1, 2)

    odds = measure_odds(logps)
    ratio = odds[:, 0] / odds[:, 1]
    wanted = -(logps / lengths)[::2] - 0.3 * F.logsigmoid(ratio.log())
    torch.testing.assert_close(losses, wanted)
    (gradient,) = torch.autograd.grad(wanted.sum(), logps)
    torch.testing.assert_close(slopes, gradient)
    before = measure_odds(reference)
    torch.testing.assert_close(margins, ratio.log() - (before[:, 0] / before[:, 1]).log())
    certain = PreferenceLoss(kind="orpo").measure(torch.zeros(2), torch.zeros(2), torch.tensor([2, 3]))
    assert all(torch.isfinite(each).all() for each in certain)


def test_a_step_has_the_gradient_of_the_loss_whatever_the_passes(base):
    """Against autograd through the plain sum of log-likelihoods, with an adapter of the head too."""
    adapter = make_adapter(base.config, 3)
    rows, loss = encode_pairs(PAIRS, base.tokenizer, 48), PreferenceLoss(beta=0.5, smoothing=0.1)
    reference = torch.linspace(-40, -20, 8)
    gradients = []
    for most_tokens in (10**6, 1):
        bank = AdapterBank(base.config, adapter.ranks, 1, "training", base.model.wte.weight)
        bank.load(0, adapter)
        runner = StepRunner(base.model, bank, None, None, ProcessGroup())
        passes = [
            MicroBatch(
                slots=[0],
                slot_ids=torch.zeros(1, dtype=torch.long),
                inputs=torch.from_numpy(rows.inputs[group]),
                targets=torch.from_numpy(rows.targets[group]),
                loss_weights=torch.full((rows.inputs[group].size,), 1 / 4),
                dropout=0.0,
                label_smoothing=0.0,
                seeds=torch.zeros(len(group), dtype=torch.long),
                noise_alpha=0.0,
                gradient_checkpointing=False,
                preference=loss,
                reference_logps=reference[group],
            )
            for group in iter_groups(range(8), rows.inputs.shape[1], most_tokens)
        ]
        assert len(passes) == (1 if most_tokens > 1 else 4)
        runner.compute_gradients(passes)
        gradients.append((runner.losses.item(), runner.gradient.clone()))
    logps = score_rows(base.model, TrainingAdapters(bank, [0]), rows, range(8), 10**6)
    expected = loss.measure(logps, reference, torch.from_numpy(rows.lengths).flatten())[0].mean()
    assert gradients[0][0] == pytest.approx(expected.item(), rel=1e-5)
    assert gradients[1][0] == pytest.approx(expected.item(), rel=1e-5)
    assert (gradients[0][1] - gradients[1][1]).norm() <= 1e-5 * gradients[0][1].norm()
    # by differences along the gradient itself
    bank.enable_gradients()
    direction, step = gradients[0][1] / gradients[0][1].norm(), 1e-2
    values = []
    for sign in (1, -1):
        bank.flat.add_(direction, alpha=sign * step)
        bank.refresh_casts()
        found = score_rows(base.model, TrainingAdapters(bank, [0]), rows, range(8), 10**6)
        values.append(loss.measure(found, reference, torch.from_numpy(rows.lengths).flatten())[0].mean().item())
        bank.flat.add_(direction, alpha=-sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradients[0][1].norm().item(), rel=0.02)


@pytest.fixture
def store(tmp_path, base):
    found = Store(tmp_path / "store")
    publish_adapter(
        found, "law", make_adapter(base.config, 1), base, Origin(data={"embedding": {}}, recipe={"name": "law"})
    )
    return found


def write_pairs(path, count=40):
    words = ["sun", "rain", "cat", "dog", "hill"]
    records = [
        {"prompt": f"the {words[n % 5]} {n}", "chosen": f" and the cat {n}", "rejected": f" in rain in {n}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_training_moves_towards_what_was_chosen_and_publishes_the_next_version(base_folder, store, tmp_path):
    recipe = make_settings(
        base=str(base_folder), preferences__sources=[write_pairs(tmp_path / "pairs.jsonl")], train__learning_rate=3e-2
    )
    report = train_preferences(recipe, store, SilentReporter())
    assert str(report) == "law@2"
    assert report.held_out_loss_before == pytest.approx(math.log(2), rel=1e-5), "at first it is the reference"
    assert report.held_out_loss < 0.6
    assert report.held_out_accuracy == 1.0
    assert report.pairs + report.held_out_pairs == 40
    assert report.parent_perplexity is None, "its text is not known"
    assert "100% of 4 held-out pairs" in report.verdict
    manifest = store.read_manifest("law")
    assert [parent.reference for parent in manifest.parents] == ["law@1"]
    assert manifest.recipe["preferences"]["beta"] == 0.05
    assert manifest.data == store.read_manifest("law@1").data
    assert manifest.figures["held_out_loss"] == report.held_out_loss
    again = train_preferences(recipe.model_copy(update={"name": "other"}), store, SilentReporter())
    assert again.held_out_loss != report.held_out_loss, "from law@2, which is in use now"


def test_weights_beyond_the_limits_are_not_kept(base, base_folder, store, tmp_path, monkeypatch):
    rows = encode_pairs(PAIRS * 6, base.tokenizer, 48)
    recipe = make_settings(train__learning_rate=3e-2)
    adapter = make_adapter(base.config, 1)
    trainer = PreferenceTrainer(base, recipe, adapter, rows, (list(range(20)), list(range(20, 24))))
    own = iter([1.0, *[1.0 + 0.015 * step for step in range(1, 30)]])
    monkeypatch.setattr(trainer, "_measure_own_text", lambda: next(own))
    trainer.parent_own = next(own)
    trainer.train(StopRequest(), SilentReporter())
    assert trainer.best_step == 1
    assert torch.equal(trainer.bank.flat, trainer.best), "what went beyond is taken back"
    assert trainer.rate_factor == 0.5**11
    strict = PreferenceTrainer(
        base,
        make_settings(train__forget=0.05, train__learning_rate=3e-2),
        adapter,
        rows,
        (list(range(20)), [20]),
    )
    assert strict.parent_general > 0
    monkeypatch.setattr(strict, "_measure_general", lambda: strict.parent_general + 0.06)
    strict.train(StopRequest(), SilentReporter())
    assert strict.best_step == 0
    kept = strict.read_best().updates
    assert all(torch.equal(kept[site].a, update.a) for site, update in adapter.updates.items())


def test_every_pair_is_trained_on_once_in_an_epoch(base):
    rows = encode_pairs(PAIRS * 5, base.tokenizer, 48)
    trainer = PreferenceTrainer(
        base,
        make_settings(preferences__batch_size=6, train__steps=None),
        make_adapter(base.config, 1),
        rows,
        (list(range(18)), [18, 19]),
    )
    assert trainer.num_steps == 9
    chosen = [trainer._choose_pairs(step) for step in range(9)]
    assert all(sorted(itertools.chain(*chosen[start : start + 3])) == list(range(18)) for start in (0, 3, 6))
    assert chosen[0] != chosen[3]


def test_what_cannot_be_trained_is_refused_with_the_next_step(store, base_folder, tmp_path):
    few = [write_pairs(tmp_path / "few.jsonl", 5)]
    cases = [
        ({"preferences__sources": few}, DataError, "5 pairs are decided"),
        ({"preferences__sources": [str(tmp_path / "none.jsonl")]}, NotFoundError, "none.jsonl"),
        ({"preferences__sources": few, "lora__init_from": ""}, UsageError, "an adapter to start from"),
        ({"preferences__sources": few, "lora__init_from": "./folder"}, UsageError, "of the store"),
        ({"preferences__sources": few, "data__sources": ["x.txt"]}, UsageError, "not on both"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            train_preferences(make_settings(base=str(base_folder), **changes), store, SilentReporter())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match="rejected"):
        read_preferences([str(bad)])


def test_rounds_and_recorded_choices_are_read_ties_left_out(tmp_path):
    texts = (("one", "two"), ("three", "four"), ("five", "six"), ("same", "same"))
    round_ = Round(
        base="nano", adapters=("law", "base"), prompts=("a", "b", "c", "d"), texts=texts, criteria=("style",)
    )
    write_round(tmp_path / "round", round_)
    given = [("ann", 0, "second"), ("bob", 0, "second"), ("eve", 0, "first"), ("ann", 1, "tie"), ("ann", 2, "first")]
    add_answers(tmp_path / "round", [Answer(rater=r, task=t, criterion="style", value=v) for r, t, v in given])
    found = read_preferences([str(tmp_path / "round")])
    assert [(p.prompt, p.chosen, p.rejected) for p in found.pairs] == [("a", "two", "one"), ("c", "five", "six")]
    assert found.num_ties == 1
    scale = dataclasses.replace(round_, mode="scale")
    write_round(tmp_path / "scale", scale)
    add_answers(
        tmp_path / "scale",
        [Answer(rater="ann", task=t, criterion="style", value=v) for t, v in ((0, 2), (1, 5), (2, 3), (3, 3))],
    )
    found = read_preferences([str(tmp_path / "scale")])
    assert [(p.prompt, p.chosen, p.rejected) for p in found.pairs] == [("a", "two", "one")]
    assert found.num_ties == 1
    choices = tmp_path / "choices.jsonl"
    vote = {"prompt": "p", "models": ["law@1", "base", "code@1"], "chosen": "base", "seed": 1}
    choices.write_text(json.dumps(vote | {"texts": ["x", "y", "z"]}) + "\n" + json.dumps(vote) + "\n")
    found = read_preferences([str(choices)])
    assert [(p.prompt, p.chosen, p.rejected, p.is_whole) for p in found.pairs] == [
        ("p", "y", "x", False),
        ("p", "y", "z", False),
    ]
    choices.write_text(json.dumps(vote) + "\n")
    with pytest.raises(DataError, match="without their texts"):
        read_preferences([str(choices)])


@pytest.fixture
def own_text(base, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(make_text(60))
    return prepare_data(
        build_recipe({"data": {"sources": [str(path)], "block_size": 48}}, "test").data,
        base.tokenizer,
        SilentReporter(),
    )


def build_trainer(base, own_text, **settings):
    rows = encode_pairs(PAIRS * 6, base.tokenizer, 48)
    recipe = make_settings(train__learning_rate=3e-2, **settings)
    return PreferenceTrainer(base, recipe, make_adapter(base.config, 1), rows, (list(range(20)), [20]), own_text)


def test_replayed_text_adds_its_gradient_and_is_reported_apart(base, own_text):
    """Pairs and text together have the gradient of the pairs and `replay_weight` times that of the text's mean NLL."""
    trainer = build_trainer(base, own_text, preferences__replay_weight=0.3, train__micro_batch_tokens=100)
    pairs = [trainer._build(trainer.pairs.rows_of([0, 1, 2]), 3)]
    replayed = trainer._build_replayed(5)
    assert len(replayed) > 1, "in groups, of which each has its share"

    def compute(batches):
        trainer.runner.compute_gradients(batches)
        runner = trainer.runner
        return runner.gradient.clone(), float(runner.losses[0]), float(runner.divergences[0])

    both, loss, nll = compute([*pairs, *replayed])
    of_pairs, loss_alone, none = compute(pairs)
    assert (loss, none) == (pytest.approx(loss_alone), 0.0)
    batch = trainer.replayed.read(5)
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    with torch.no_grad():
        logits = base.model.logits(base.model(inputs, trainer.adapters), trainer.adapters)
    assert nll == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())), rel=1e-5)
    of_text, plain, _ = compute([dataclasses.replace(batch, penalties=None) for batch in replayed])
    assert plain == pytest.approx(nll)
    assert torch.allclose(both, of_pairs + 0.3 * of_text, atol=1e-6 * float(both.abs().max()))


def test_replay_keeps_the_own_text(base, own_text):
    after = {}
    for weight in (0.0, 1.0):
        trainer = build_trainer(
            base, own_text, preferences__replay_weight=weight, preferences__max_perplexity_ratio=100.0
        )
        assert (trainer.replayed is None) == (weight == 0)
        trainer.train(StopRequest(), SilentReporter())
        after[weight] = trainer._measure_own_text() - trainer.parent_own
    assert after[1.0] < after[0.0]


def test_without_its_own_text_an_adapter_is_trained_on_pairs_alone(base):
    trainer = build_trainer(base, None, preferences__replay_weight=1.0)
    assert trainer._build_replayed(0) == []
    trainer.train(StopRequest(), SilentReporter())
    assert trainer.best_step > 0


def kill_at(monkeypatch, step):
    """Sends SIGINT to this process after so many steps."""
    run_step = PreferenceTrainer._run_step

    def interrupt(self, number):
        loss = run_step(self, number)
        if number + 1 == step:
            os.kill(os.getpid(), 2)
        return loss

    monkeypatch.setattr(PreferenceTrainer, "_run_step", interrupt)


def weights_of(store, reference):
    return load((store.resolve(reference) / WEIGHTS).read_bytes())


def test_an_interrupted_run_equals_an_unbroken_one(base, base_folder, store, tmp_path, monkeypatch):
    publish_adapter(store, "law", make_adapter(base.config, 1), base, Origin())
    shared = {"base": str(base_folder), "lora": {"init_from": "law"}, "train__learning_rate": 0.03}
    sources = [write_pairs(tmp_path / "pairs.jsonl", 40)]
    whole = make_settings("whole", preferences__sources=sources, **shared)
    broken = make_settings("broken", preferences__sources=sources, **shared)
    wanted = train_preferences(whole, store, SilentReporter())
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        kill_at(patch, 5)
        train_preferences(broken, store, SilentReporter())
    assert "--resume" in caught.value.hint
    assert not store.has_adapter("broken")
    with pytest.raises(InterruptedRunError, match="at step 5"):
        train_preferences(broken, store, SilentReporter())
    changed = broken.model_copy(update={"preferences": broken.preferences.model_copy(update={"beta": 0.3})})
    with pytest.raises(MismatchError, match=r"preferences\.beta"):
        train_preferences(changed, store, SilentReporter(), resume=True)
    found = train_preferences(broken, store, SilentReporter(), resume=True)
    assert found.held_out_loss == wanted.held_out_loss
    assert (found.steps, found.best_step, found.train_tokens) == (wanted.steps, wanted.best_step, wanted.train_tokens)
    one, other = weights_of(store, "whole"), weights_of(store, "broken")
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
    metrics = [(store.resolve(name) / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert metrics[0] == metrics[1]
    again = train_preferences(broken, store, SilentReporter(), resume=True)
    assert again == found, "it is complete: what was said of it is said again"
    assert store.list_versions("broken") == [1]
    train_preferences(broken, store, SilentReporter())
    assert store.list_versions("broken") == [1, 2]


def test_a_run_that_was_killed_after_it_published_does_so_once(base, base_folder, store, tmp_path, monkeypatch):
    publish_adapter(store, "law", make_adapter(base.config, 1), base, Origin())
    sources = [write_pairs(tmp_path / "pairs.jsonl", 40)]
    recipe = make_settings(base=str(base_folder), preferences__sources=sources, train__learning_rate=0.03)
    before = store.list_versions("law")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RunFolder, "finish", lambda *arguments: 1 / 0)
        train_preferences(recipe, store, SilentReporter())
    assert len(store.list_versions("law")) == len(before) + 1
    other = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"alpha": 3.0})})
    with pytest.raises(MismatchError, match=r"lora\.alpha"):
        train_preferences(other, store, SilentReporter(), resume=True)
    small = recipe.train.model_copy(update={"micro_batch_tokens": 100})
    report = train_preferences(recipe.model_copy(update={"train": small}), store, SilentReporter(), resume=True)
    assert store.list_versions("law")[-1] == report.version == before[-1] + 1, "from the parent that it had"


def test_a_resumed_run_whose_best_is_its_parent_publishes_it_too(base, base_folder, store, tmp_path, monkeypatch):
    publish_adapter(store, "law", make_adapter(base.config, 1), base, Origin())
    recipe = make_settings(
        base=str(base_folder),
        preferences__sources=[write_pairs(tmp_path / "pairs.jsonl", 40)],
        train__learning_rate=1e-12,
        train__checkpoint_every=1,
    )
    before = store.list_versions("law")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        kill_at(patch, 2)
        train_preferences(recipe, store, SilentReporter())
    report = train_preferences(recipe, store, SilentReporter(), resume=True)
    assert (report.version, report.best_step) == (before[-1] + 1, 0)
    assert store.list_versions("law") == [*before, report.version]


def test_a_parent_in_another_shape_is_said_and_measured_as_it_is(
    base, base_folder, store, own_text, tmp_path, monkeypatch
):
    publish_adapter(store, "law", make_adapter(base.config, 1), base, Origin(figures={"trained_parameters": 5}))
    monkeypatch.setattr(preference_run, "_read_own", lambda *arguments: own_text)
    sources, said = [write_pairs(tmp_path / "pairs.jsonl", 40)], []
    reporter = SilentReporter()
    monkeypatch.setattr(reporter, "message", said.append)
    shared = {"base": str(base_folder), "preferences__sources": sources, "train__steps": 1}
    low = make_settings("low", **shared, lora={"init_from": "law", "rank": 1}, train__patience=3)
    report = train_preferences(low, store, reporter)
    session = Session(base, store)
    whole = measure_blocks(base, own_text.validation, session.adapters_for([session.resolve(Mix.single("law"))]))
    assert report.parent_perplexity == pytest.approx(math.exp(whole), rel=1e-5), "not that of what is left of it"
    assert any("relative error" in line for line in said)
    assert any("train.patience changes nothing" in line for line in said)
    manifest = store.read_manifest("low")
    assert manifest.figures["trained_parameters"] == manifest.num_parameters
    head = make_settings("head", **shared, lora={"init_from": "law", "targets": ["lm_head"]})
    with pytest.raises(UsageError, match="changes none of the targets lm_head"):
        train_preferences(head, store, SilentReporter())


def test_an_interrupted_run_can_be_begun_anew(base, base_folder, store, tmp_path, monkeypatch):
    publish_adapter(store, "law", make_adapter(base.config, 1), base, Origin())
    recipe = make_settings(
        base=str(base_folder),
        preferences__sources=[write_pairs(tmp_path / "pairs.jsonl", 40)],
        train__checkpoint_every=2,
    )
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        kill_at(patch, 5)
        train_preferences(recipe, store, SilentReporter())
    before = store.list_versions("law")
    train_preferences(recipe, store, SilentReporter(), fresh=True)
    assert store.list_versions("law") == [*before, before[-1] + 1]
