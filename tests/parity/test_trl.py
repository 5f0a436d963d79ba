"""DPO, IPO and KTO as TRL computes them: the same loss and gradients for the same texts, adapter and reference."""

import warnings
from dataclasses import replace

import datasets
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from lora_gpt2.rating.preferences import Preference
from lora_gpt2.recipe import BLOCKS, LoraSettings, build_recipe
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.store.peft.config import module_of
from lora_gpt2.training.pairs import encode_pairs
from lora_gpt2.training.preferences import PreferenceTrainer
from tests.builders import make_adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

PAIRS = [
    ("the cat", " and the dog in the rain", " the hill"),
    ("the man on", " the hill", " rain rain rain rain"),
    ("a", " b a b", " c"),
    ("in the sun the cat", " the end", " and the man and the man"),
]
CHANGED = {"dpo": 1.3, "ipo": 1.3, "kto": 0.7}  # times the reference's factors, so that margin and shift are not zero

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, about its own defaults


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto"])
def test_loss_and_gradients_are_trls(base, base_folder, tmp_path, kind):
    store, adapter = Store(tmp_path / "store"), make_adapter(base.config, 1, LoraSettings(rank=4, targets=BLOCKS))
    publish_adapter(store, "law", adapter, base, Origin())
    wrapped = PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base_folder), store.resolve("law"), is_trainable=True
    )
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.pad_token = tokenizer.eos_token
    common = {"output_dir": str(tmp_path / "trl"), "beta": 0.3, "gradient_checkpointing": False, "bf16": False}
    common |= {"use_cpu": True, "report_to": []}
    if kind == "kto":
        settings = KTOConfig(per_device_train_batch_size=2 * len(PAIRS), **common)
        rows = [{"prompt": p, "completion": text, "label": text == c} for p, c, r in PAIRS for text in (c, r)]
    else:
        loss_type = "sigmoid" if kind == "dpo" else kind
        settings = DPOConfig(loss_type=loss_type, per_device_train_batch_size=len(PAIRS), **common)
        rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    trainer = (KTOTrainer if kind == "kto" else DPOTrainer)(
        model=wrapped, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    policy = {name: p for name, p in trainer.model.named_parameters() if ".default." in name}
    with torch.no_grad():
        for parameter in policy.values():
            parameter.mul_(CHANGED[kind])
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()

    pairs = [Preference(prompt=p, chosen=c, rejected=r, is_whole=True) for p, c, r in PAIRS]
    recipe = build_recipe(
        {
            "name": "law",
            "lora": {"init_from": "law"},
            "train": {"dtype": "float32"},
            "preferences": {"beta": 0.3, "loss": kind, "smoothing": 0.0},
        },
        "test",
    )
    encoded = encode_pairs(pairs, base.tokenizer, base.config.n_positions)
    mismatched = None
    if kind == "kto":  # TRL gives each prompt the text of the row before it
        texts = [(pairs[number - 1].rejected, pair.chosen) for number, pair in enumerate(pairs)]
        others = [replace(pair, chosen=c, rejected=r) for pair, (c, r) in zip(pairs, texts, strict=True)]
        mismatched = encode_pairs(others, base.tokenizer, base.config.n_positions)
    ours = PreferenceTrainer(base, recipe, adapter, encoded, (range(len(PAIRS)), [0]), mismatched=mismatched)
    ours.bank.flat.mul_(CHANGED[kind])
    ours.bank.refresh_casts()
    shift = ours._measure_shift(range(len(PAIRS)))
    ours.runner.compute_gradients([ours._build(range(2 * len(PAIRS)), len(PAIRS), shift)])
    assert (shift > 0) == (kind == "kto")
    assert ours.runner.losses.item() == pytest.approx(loss.item(), rel=1e-4)
    assert loss.item() != pytest.approx(0.5 if kind == "kto" else 0.6931, abs=1e-3), "the policy is not the reference"
    gradients = ours.bank.read(0, ours.runner.gradient)
    for site, update in gradients.updates.items():
        for half, mine in (("A", update.a), ("B", update.b)):
            wanted = policy[f"base_model.model.{module_of(site)}.lora_{half}.default.weight"].grad
            assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-8, (site, half)
