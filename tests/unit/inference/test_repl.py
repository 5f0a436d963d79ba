"""One text, continued, taken back and tried again; every command, and what is wrong with each."""

import json
import os
import stat

import pytest

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.errors import ConflictError, LoraGpt2Error, NotFoundError, RecipeError, UsageError
from lora_gpt2.evaluation.perplexity import measure_perplexity
from lora_gpt2.inference.choose import choose_adapter
from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.history import LocalLog, find_log
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.repl import Repl
from lora_gpt2.inference.session import Session
from lora_gpt2.inference.slots import AdapterSlots
from lora_gpt2.recipe import EvaluateSettings, GenerateSettings
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter

SETTINGS = GenerateSettings(max_new_tokens=6, temperature=1.0, top_k=0)


@pytest.fixture
def repl(base, store, tmp_path):
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(figures={"test_perplexity": 9.5}))
    log = LocalLog(tmp_path / "log.jsonl", SilentReporter())
    pieces = []
    found = Repl(
        session=Session(base, store), settings=SETTINGS, seed=10, log=log, on_text=lambda _, piece: pieces.append(piece)
    )
    found.pieces = pieces
    return found


def wanted(repl, prompt, mix, seed):
    return generate(repl.session, [Request(prompt, mix, seed)], SETTINGS, truncate_left=True)[0].text


def test_text_is_continued_and_every_step_can_be_taken_back(repl):
    repl.run("/use law")
    repl.run("the cat")
    one = "the cat" + wanted(repl, "the cat", Mix.single("law"), 11)
    assert (repl.text, "".join(repl.pieces)) == (one, one.removeprefix("the cat"))
    repl.run("/use code")
    repl.run(" and")
    two = one + " and" + wanted(repl, one + " and", Mix.single("code"), 12)
    assert repl.text == two
    repl.run("/retry")
    assert repl.text == one + " and" + wanted(repl, one + " and", Mix.single("code"), 13) != two
    repl.run("/undo")
    assert repl.text == one
    repl.run("")
    assert repl.text.startswith(one)
    repl.run("/undo")
    repl.run("/undo")
    assert repl.text == ""
    for line in ("/undo", "/retry", ""):
        with pytest.raises(UsageError):
            repl.run(line)


def test_mixes_scales_and_the_base(repl):
    assert repl.run("/mix law:0.6 code:0.4") == "law:0.6+code:0.4 continues"
    assert repl.run("/scale 0.5") == "law:0.3+code:0.2 continues"
    assert repl.run("/scale 0") == "law:0+code:0 continues"
    assert repl.run("/scale 1") == "law:0.6+code:0.4 continues", "as it was named"
    assert repl.run("/base") == "the base continues"
    assert repl.name == "base"
    with pytest.raises(UsageError, match="/scale"):
        repl.run("/scale 2")
    repl.run("/use law@1")
    for factor in ("x", "nan", "", "99"):
        with pytest.raises(UsageError):
            repl.run(f"/scale {factor}")
    assert repl.name == "law@1", "what went wrong changed nothing"


def test_compare_keeps_nothing_and_shows_each(repl):
    repl.run("the cat")
    before = repl.text
    shown = repl.run("/compare")
    assert [line for line in shown.splitlines() if line.startswith("===")] == ["=== code", "=== law", "=== base"]
    assert repl.text == before
    assert repl.run("/compare law:0.5+code:0.5, base").startswith("=== law:0.5+code:0.5")


def test_settings_are_checked_together(repl):
    repl.run("/set temperature 0.5")
    repl.run("/set generate.top_k=7")
    assert (repl.settings.temperature, repl.settings.top_k, repl.settings.max_new_tokens) == (0.5, 7, 6)
    repl.run("/set logprobs 2")
    wrong = {"/set temperature -1": RecipeError, "/set num_beams 2": RecipeError, "/set tempe 1": UsageError}
    for line, kind in wrong.items():
        with pytest.raises(kind):
            repl.run(line)
    assert (repl.settings.temperature, repl.settings.num_beams) == (0.5, 1)
    assert "temperature 0.5" in repl.run("/set")
    assert repl.run("/set seed 5") == "the next seed is 5"
    repl.run("a")
    assert repl.seed == 5


def test_save_and_load(repl, tmp_path):
    repl.run("the cat")
    text, path = repl.text, tmp_path / "a text.txt"
    repl.run(f"/save '{path}'")
    repl.run(f"/save '{path}'")  # its own file may be saved again
    assert path.read_bytes().decode() == text
    other = tmp_path / "mine.txt"
    other.write_text("precious")
    with pytest.raises(ConflictError):
        repl.run(f"/save {other}")
    assert other.read_text() == "precious"
    repl.run("/new")
    assert repl.text == ""
    repl.run(f"/load {other}")
    assert repl.text == "precious"
    for line, kind in (("/load nothing.txt", NotFoundError), ("/load", UsageError), ("/save a b", UsageError)):
        with pytest.raises(kind):
            repl.run(line)
    with pytest.raises(LoraGpt2Error):
        repl.run(f"/load {tmp_path}")


def test_stats_give_the_perplexity_that_evaluate_gives(repl):
    repl.run("/use law")
    repl.text = "the cat and the dog"
    shown = repl.run("/stats")
    settings = EvaluateSettings(window=48, stride=48)
    rows = repl.session.select(Mix.single("law"))
    score = measure_perplexity(repl.session.base, [repl.text], settings, rows)
    assert f"under law: {score.perplexity:.2f} ({score.tokens} tokens)" in shown
    assert "under base:" in shown
    repl.run("/scale 0.5")
    half = measure_perplexity(repl.session.base, [repl.text], settings, repl.session.select(Mix([("law", 0.5)])))
    assert f"under law:0.5: {half.perplexity:.2f} (" in repl.run("/stats")


def test_a_text_longer_than_the_context_goes_on(repl):
    repl.text = "the cat and " * 30
    assert "tokens were left out" in repl.run("more")
    assert repl.text.startswith("the cat and " * 30 + "more")


def test_help_lists_every_command_and_a_wrong_one_gets_the_nearest(repl):
    shown = repl.run("/help")
    assert all(f"/{name}" in shown for name in Repl.help)
    assert all(hasattr(repl, f"_do_{name}") for name in Repl.help)
    with pytest.raises(UsageError) as caught:
        repl.run("/usee law")
    assert caught.value.hint == "did you mean 'use'?"
    with pytest.raises(NotFoundError):
        repl.run("/use lwa")
    assert "law@1, perplexity 9.5" in repl.run("/adapters")
    repl.run("/quit")
    assert repl.is_over


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/us", ["/use"]),
        ("/use l", ["law"]),
        ("/mix law ", ["code", "law"]),
        ("/compare b", ["base"]),
        ("/set temp", ["temperature"]),
        ("/set temperature ", []),
        ("plain te", []),
        ("/sa", ["/save"]),
    ],
)
def test_completion(repl, text, words):
    assert repl.complete(text) == words


def test_every_continuation_is_recorded_for_its_owner_alone(repl, tmp_path):
    repl.run("/use law")
    repl.run("the cat")
    repl.run("/compare law base")
    path = tmp_path / "log.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["adapter"] for record in records] == ["law", "law", "base"]
    assert records[0]["prompt"] + records[0]["text"] == repl.text
    assert records[0]["provenance"]["adapters"][0]["sha256"] == repl.session.store.read_manifest("law").digest
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_the_record_can_be_declined_and_never_stops_the_work(repl, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_GPT2_LOG", "off")
    assert find_log() is None
    monkeypatch.setenv("LORA_GPT2_LOG", str(tmp_path / "x"))
    assert find_log() == tmp_path / "x"
    monkeypatch.delenv("LORA_GPT2_LOG")
    assert find_log() == tmp_path / "state" / "lora-gpt2" / "generations.jsonl"
    said = []
    reporter = SilentReporter()
    reporter.message = said.append
    repl.log = LocalLog(tmp_path, reporter)  # a folder is no file
    repl.run("the cat")
    repl.run("more")
    assert len(said) == 1
    assert repl.text.startswith("the cat")


def test_a_retry_that_cannot_be_made_loses_nothing(repl, tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("a long story", encoding="utf-8")
    repl.run(f"/load {path}")
    with pytest.raises(UsageError, match="nothing written"):
        repl.run("/retry")
    assert repl.text == "a long story"
    repl.run("/use law")
    repl.run(" and")
    text = repl.text
    repl.session.store = None
    repl.session.slots = AdapterSlots(repl.session.base, 4)
    with pytest.raises(UsageError):
        repl.run("/retry")
    assert repl.text == text
    repl.run("/undo")
    assert repl.text == "a long story"


def test_a_value_may_hold_what_stands_between_key_and_value(repl):
    repl.run('/set stop ["a=b", "c d"]')
    assert repl.settings.stop == ("a=b", "c d")
    repl.run('/set stop=["a=b"]')
    assert repl.settings.stop == ("a=b",)


def test_auto_continues_with_the_adapter_that_the_text_belongs_to_and_says_so(repl):
    assert repl.run("/use auto") == "auto continues"
    said = repl.run("the cat")
    chosen = choose_adapter(repl.session, "the cat", ["code", "law"])
    assert said.splitlines()[0] == str(chosen)
    assert repl.text == "the cat" + wanted(repl, "the cat", Mix.parse(chosen.adapter), 11)
    assert "perplexity of the text under base" in repl.run("/stats")
    assert repl.complete("/use a") == ["auto"]
    with pytest.raises(UsageError):
        repl.run("/scale 0.5")
    assert repl.run("/use law") == "law continues"
    assert repl.run(" and") == ""
