"""From blocks to passes: what a row's seed is a function of, and documents that do not see each other."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_gpt2.data.blocks import IGNORE
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.merge import DeltaAdapters, to_delta
from lora_gpt2.recipe import build_recipe
from lora_gpt2.training.step import draw_noise
from lora_gpt2.training.validation import measure_blocks
from tests.builders import make_adapter
from tests.unit.training.test_trainer import make_recipe, make_trainer


def seeds_of(trainer, slots, step):
    """Returns the seeds of each slot's rows in their order, over all passes, without those that fill passes up."""
    found = {slot: [] for slot in slots}
    for slot in slots:
        trainer.slots[slot].last_step = step
    for each in trainer.micro_batches.build(slots)[0]:
        rows = len(each.seeds) // len(each.slots)
        filled = (each.targets != IGNORE).any(1).view(len(each.slots), rows)
        for place, slot in enumerate(each.slots):
            seeds = each.seeds[place * rows : (place + 1) * rows].tolist()
            found[slot] += [seed for seed, real in zip(seeds, filled[place].tolist(), strict=True) if real]
    return found


def test_every_row_of_every_step_has_a_seed_of_its_own(base_folder, text_file, reporter):
    recipes = [make_recipe(base_folder, text_file, f"r{seed}", seed=seed, batch_tokens=80) for seed in (0, 1)]
    trainer = make_trainer(recipes, reporter)
    seeds = [seed for step in range(20) for rows in seeds_of(trainer, [0, 1], step).values() for seed in rows]
    assert len(seeds) == 20 * 2 * 5
    assert max(Counter(seeds).values()) == 1


def test_a_rows_seed_depends_on_the_recipes_seed_the_step_and_its_place_alone(base_folder, text_file, reporter):
    def find(slot, recipes, active=None, **change):
        changed = [make_recipe(base_folder, text_file, f"r{i}", **{**r, **change}) for i, r in enumerate(recipes)]
        return seeds_of(make_trainer(changed, reporter), active or list(range(len(recipes))), 3)[slot]

    recipe = {"seed": 4, "batch_tokens": 96}
    wanted = find(0, [recipe])
    assert len(wanted) == 6
    assert find(0, [recipe], micro_batch_tokens=16) == wanted
    assert find(0, [recipe], micro_batch_tokens=4096) == wanted
    assert find(1, [{"seed": 9, "batch_tokens": 32}, recipe]) == wanted
    assert find(1, [{"seed": 9}, recipe], active=[1]) == wanted
    assert find(0, [{**recipe, "batch_tokens": 48}]) == wanted[:3]
    assert not set(find(0, [{**recipe, "seed": 5}])) & set(wanted)


def test_noise_and_dropout_are_drawn_anew_in_every_step(base_folder, text_file, reporter):
    recipe = make_recipe(base_folder, text_file, neftune_noise_alpha=5, lora={"dropout": 0.5})
    trainer = make_trainer([recipe], reporter)
    noises, masks = [], []
    for step in range(4):
        trainer.slots[0].last_step = step
        (each,) = trainer.micro_batches.build([0])[0]
        noises.append(draw_noise(each, 16))
        rows = TrainingAdapters(trainer.bank, each.slots, each.slot_ids, each.dropout, each.seeds)
        masks.append(rows.draw_mask("h.0.mlp.c_fc", noises[0]))
    # over 1,024 draws the correlation of independent ones deviates by 0.03: five of these
    for drawn in (noises, masks):
        correlations = torch.corrcoef(torch.stack(drawn).flatten(1))
        assert torch.allclose(correlations, torch.eye(4), atol=0.16)


def test_a_pass_has_the_settings_of_its_recipe(base_folder, text_file, reporter):
    regular = {
        "label_smoothing": 0.1,
        "neftune_noise_alpha": 5,
        "gradient_checkpointing": True,
        "lora": {"dropout": 0.3},
    }
    recipes = [make_recipe(base_folder, text_file, "plain"), make_recipe(base_folder, text_file, "regular", **regular)]
    plain, other = make_trainer(recipes, reporter).micro_batches.build([0, 1])[0]
    assert (list(plain.slots), list(other.slots)) == ([0], [1])
    assert (plain.dropout, plain.label_smoothing, plain.noise_alpha, plain.gradient_checkpointing) == (0, 0, 0, False)
    assert (other.dropout, other.label_smoothing, other.noise_alpha, other.gradient_checkpointing) == (
        0.3,
        0.1,
        5,
        True,
    )


@pytest.fixture
def short_texts(tmp_path):
    path = tmp_path / "short.jsonl"
    texts = [f"{'abcdefgh'[i % 8] * (1 + i % 5)} dog {i}" for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def packed_recipe(base_folder, source, layout="packed", **train):
    return build_recipe(
        {
            "name": "one",
            "base": str(base_folder),
            "data": {"sources": [str(source)], "block_size": 32, "layout": layout, "profile": "raw"},
            "lora": {"rank": 2},
            "train": {"dtype": "float32", "batch_tokens": 160, "steps": 3, **train},
        },
        "test",
    )


def split_documents(rows):
    """Returns the documents of packed rows as (inputs, targets), each beginning where the tokenizer's EOS stands."""
    found = []
    for inputs, targets in zip(rows.inputs, rows.targets, strict=True):
        real = int((targets != IGNORE).sum())
        starts = [*np.flatnonzero(inputs[:real] == inputs[0]).tolist(), real]
        found += [(inputs[i:j], targets[i:j]) for i, j in pairwise(starts)]
    return [tuple(torch.from_numpy(side)[None] for side in document) for document in found]


def nll_alone(trainer, documents, adapter):
    """Returns the NLL of each document on its own, the adapter added to the weights."""
    model = trainer.base.model
    rows = DeltaAdapters(lambda site: to_delta(adapter.updates[site]) if site in adapter.updates else None)
    hidden = (model(inputs, rows) for inputs, _ in documents)
    logits = [model.logits(states, rows)[0] for states in hidden]
    return [
        F.cross_entropy(one, targets[0], reduction="sum") for one, (_, targets) in zip(logits, documents, strict=True)
    ]


@pytest.mark.parametrize("micro_batch_tokens", [32, 64, 4096])
def test_a_packed_batch_trains_each_document_as_if_it_were_alone(
    base_folder, short_texts, reporter, micro_batch_tokens
):
    """Loss and gradient of a step, through the blocks and the passes, are those of the documents one by one."""
    recipe = packed_recipe(base_folder, short_texts, micro_batch_tokens=micro_batch_tokens)
    trainer = make_trainer([recipe], reporter)
    adapter = make_adapter(trainer.base.config, settings=recipe.lora)
    trainer.bank.load(0, adapter)
    passes, (count,) = trainer.micro_batches.build([0])
    trainer.runner.compute_gradients(passes)
    documents = split_documents(trainer.micro_batches.read([0])[0][0])
    assert len(documents) > 7, "more than rows"
    assert sum(inputs.numel() for inputs, _ in documents) == count
    leaves = {s: (u.a.clone().requires_grad_(), u.b.clone().requires_grad_()) for s, u in adapter.updates.items()}
    tracked = type(adapter)(updates={s: type(u)(*leaves[s], u.alpha) for s, u in adapter.updates.items()})
    wanted = sum(nll_alone(trainer, documents, tracked)) / count
    wanted.backward()
    assert trainer.runner.losses.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = trainer.bank.read(0, trainer.runner.gradient)
    for site, (a, b) in leaves.items():
        for mine, theirs in ((found.updates[site].a, a.grad), (found.updates[site].b, b.grad)):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), site  # float32 sums in another order
    trainer.runner.compute_gradients([replace(each, positions=None) for each in passes])
    assert abs(trainer.runner.losses.item() / wanted.item() - 1) > 1e-4, "the comparison can fail"


def test_packed_text_is_measured_document_by_document(base_folder, short_texts, reporter):
    trainer = make_trainer([packed_recipe(base_folder, short_texts)], reporter)
    adapter = make_adapter(trainer.base.config, settings=trainer.slots[0].recipe.lora)
    trainer.bank.load(0, adapter)
    blocks = trainer.slots[0].data.train  # larger than the validation part
    documents = split_documents(blocks.read(range(blocks.num_blocks)))
    assert len(documents) > blocks.num_blocks
    wanted = float(sum(nll_alone(trainer, documents, adapter))) / sum(inputs.numel() for inputs, _ in documents)
    assert measure_blocks(trainer.base, blocks, TrainingAdapters(trainer.bank, [0])) == pytest.approx(wanted, rel=1e-5)


def test_in_layout_concat_documents_see_what_stands_before_them(base_folder, short_texts, reporter):
    passes, _ = make_trainer([packed_recipe(base_folder, short_texts, "concat")], reporter).micro_batches.build([0])
    assert all(each.positions is None for each in passes)


def test_prompts_longer_than_what_is_measured_are_no_division_by_zero(base_folder, tmp_path, reporter):
    rows = [{"prompt": f"{n} the cat and the dog {n} " * 20, "completion": f"sun {n}"} for n in range(30)]
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = packed_recipe(base_folder, source, "concat")
    data = recipe.data.model_copy(update={"near_duplicate_threshold": 0.0})
    trainer = make_trainer([recipe.model_copy(update={"data": data})], reporter)
    blocks = trainer.slots[0].data.validation
    assert not (blocks.read(range(1)).targets != IGNORE).any(), "the first block has no target"
    found = measure_blocks(trainer.base, blocks, None, max_tokens=1, batch_tokens=32)
    assert math.isfinite(found)
