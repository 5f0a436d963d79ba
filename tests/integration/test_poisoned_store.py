"""An adapter whose values are finite and whose logits are not: refused at every door, and harmless behind each."""

import json

import pytest
import torch

from lora_gpt2.core.console import LoggingReporter
from lora_gpt2.core.errors import CorruptError
from lora_gpt2.model import probe
from lora_gpt2.model.lora import Adapter, LoraUpdate
from lora_gpt2.store import files as store_files
from lora_gpt2.store.exchange import import_adapter
from lora_gpt2.store.fetch import fetch_adapter
from lora_gpt2.store.files import Origin, load_adapter, publish_adapter
from lora_gpt2.store.peft.tensors import to_peft
from tests.builders import make_adapter


@pytest.fixture
def bad(base):
    return Adapter(
        updates={
            site: LoraUpdate(torch.full_like(u.a, 1e18), torch.full_like(u.b, 1e18), u.alpha)
            for site, u in make_adapter(base.config).updates.items()
        }
    )


@pytest.fixture
def poisoned(base, trained, bad, monkeypatch):
    """A store that got such an adapter before publishing looked for it."""
    with monkeypatch.context() as patch:
        patch.setattr(store_files, "check_finite_logits", lambda *_: None)
        publish_adapter(trained, "bad", bad, base, Origin())
    return trained


def test_it_is_not_published_nor_imported(base, store, bad, tmp_path):
    with pytest.raises(CorruptError, match="law: its logits are not finite on this base") as caught:
        publish_adapter(store, "law", bad, base, Origin())
    assert caught.value.exit_code == 5
    assert "smaller train.learning_rate" in caught.value.hint
    for name, content in to_peft(bad, base.name, base.config).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptError, match="not finite"):
        import_adapter(fetch_adapter(str(tmp_path)), store, "law", base, LoggingReporter())
    assert store.list_names() == []


def test_it_is_not_loaded(base, poisoned):
    with pytest.raises(CorruptError, match="bad@1: its logits are not finite"):
        load_adapter(poisoned, "bad", base)
    assert load_adapter(poisoned, "law", base)[0].reference == "law@1"


def test_ordinary_adapters_need_no_pass_to_be_known_finite(base, trained, monkeypatch):
    monkeypatch.setattr(probe, "compute_logits", lambda *_: pytest.fail("a pass for nothing"))
    load_adapter(trained, "law", base)


@pytest.mark.parametrize("command", [["generate", "the", "--adapter", "bad"], ["evaluate", "-", "--adapter", "bad"]])
def test_commands_end_with_5_and_say_which(run, poisoned, text_file, command):
    code, out, err = run(*[str(text_file) if part == "-" else part for part in command])
    assert (code, out) == (5, "")
    assert "bad@1: its logits are not finite" in err
    assert "Traceback" not in err


def test_verify_names_it_and_passes_the_others(run, poisoned):
    code, out, _ = run("adapters", "verify", "--json")
    assert code == 9
    rows = {row["reference"]: row for row in json.loads(out)["adapters"]}
    assert {name: row["sound"] for name, row in rows.items()} == {"law@1": True, "code@1": True, "bad@1": False}
    assert "logits are not finite" in rows["bad@1"]["failure"]


@pytest.fixture
def undetected(poisoned, monkeypatch):
    """As if each had passed: what a mix of large weights, or an unusual prompt, can do to a sound adapter."""
    monkeypatch.setattr(store_files, "check_finite_logits", lambda *_: None)
    return poisoned


def test_the_others_of_a_comparison_are_written(run, undetected):
    options = ["generate", "the cat", "--seed", 1, "--json", "--compare"]
    code, out, _ = run(*options, "law,bad,base")
    outputs = {item["adapter"]: item for item in json.loads(out)["outputs"]}
    assert code == 5
    assert outputs["bad"]["finish_reason"] == "error"
    assert outputs["bad"]["error"] == "bad@1: the logits after this text are not finite"
    alone = {item["adapter"]: item for item in json.loads(run(*options, "law,base")[1])["outputs"]}
    assert {name: outputs[name]["text"] for name in alone} == {name: item["text"] for name, item in alone.items()}
    code, out, err = run("generate", "the cat", "--seed", 1, "--compare", "law,bad")
    assert code == 5
    assert alone["law"]["text"] in out
    assert err.splitlines()[-2:] == [
        "error: bad@1: the logits after this text are not finite",
        "  see 'lora-gpt2 adapters verify', or use smaller weights",
    ]


def test_the_others_of_a_file_of_prompts_are_written(run, undetected, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": f"the {k}", "adapter": "bad" if k == 2 else "law"} for k in range(6)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, _, err = run("generate", "--prompts", prompts, "--out", out, "--seed", 1)
    assert code == 5
    assert "bad@1" in err
    assert sorted(json.loads(line)["index"] for line in out.read_text().splitlines()) == [0, 1, 3, 4, 5]


def test_figures_of_the_others_are_right(run, undetected, text_file):
    code, out, _ = run("evaluate", f"x={text_file}", "--adapter", "law", "--adapter", "bad", "--no-general", "--json")
    assert code == 0, out
    cells = {cell["adapter"]: cell for cell in json.loads(out)["cells"]}
    assert cells["bad"]["perplexity"] is None
    alone = json.loads(run("evaluate", f"x={text_file}", "--adapter", "law", "--no-general", "--json")[1])["cells"]
    for cell in alone:
        assert cells[cell["adapter"]]["perplexity"] == pytest.approx(cell["perplexity"], rel=1e-5)
    table = run("evaluate", f"x={text_file}", "--adapter", "law", "--adapter", "bad", "--no-general")[1]
    assert table.count("*") == 1
    assert "nan" in table
