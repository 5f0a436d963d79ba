"""The text that shows forgetting."""

from pathlib import Path

from lora_gpt2.evaluation import general
from lora_gpt2.evaluation.general import measure_general, read_general
from lora_gpt2.inference.mix import Mix
from tests.builders import make_adapter


def test_the_general_text_is_there_and_whole(monkeypatch):
    monkeypatch.setattr(general, "TEXT", Path(general.__file__).parent / "general.txt")
    passages = read_general()
    assert len(passages) == 12
    assert all(300 < len(passage) <= 1500 for passage in passages)
    assert not any("<|endoftext|>" in passage for passage in passages)


def test_an_adapter_changes_the_figure_and_the_base_does_not(base):
    from lora_gpt2.inference.session import Session

    session = Session(base)
    session.load_in_memory({"law": make_adapter(base.config)})
    plain = measure_general(base)
    assert plain.perplexity == measure_general(base, session.select(Mix())).perplexity
    assert abs(measure_general(base, session.select(Mix.single("law"))).perplexity - plain.perplexity) > 0.1
