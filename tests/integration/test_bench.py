"""The benchmarks measure what they say, on a tiny base."""

import json
import math
from dataclasses import asdict, replace

import pytest

from lora_gpt2 import cli
from lora_gpt2.bench.decoding import measure_decoding
from lora_gpt2.bench.grid import Point, _append, _read, find_best, rank_settings
from lora_gpt2.bench.serving import measure_serving
from lora_gpt2.bench.startup import measure_startup
from lora_gpt2.bench.training import count_flops_per_token, measure_training
from lora_gpt2.core.errors import DataError
from lora_gpt2.model.config import parse_config
from lora_gpt2.recipe import BLOCKS, LoraSettings
from tests.builders import make_text


def check_sides(report, names):
    sides = {side["name"]: side for side in report.to_json()["sides"]}
    assert list(sides) == names
    assert len(sides["ours"]["losses"]) == 5
    for name in set(names) & {"ours together", "peft"}:
        assert sides[name]["losses"] == pytest.approx(sides["ours"]["losses"], abs=2e-4)
    assert sides["ours"]["speed_of_ours"] == sides["ours"]["memory_of_ours"] == 1
    for side in sides.values():
        assert side["tokens_per_second"] > 0
        assert side["peak_memory_bytes"] > 50e6
        assert 0 < side["share_of_limit"] < 1.5
    return sides


@pytest.mark.slow
def test_both_sides_learn_the_same_and_every_figure_is_there(base_folder, reporter):
    report = measure_training(str(base_folder), 2, 16, 4, 1, reporter=reporter, rank=2, dtype="float32")
    check_sides(report, ["ours", "peft"])


@pytest.mark.slow
def test_several_adapters_and_the_usual_notebook_are_measured_too(base_folder, tmp_path, reporter):
    lines = tmp_path / "lines.txt"
    lines.write_text("the cat\nand the dog\n\nsun\n")
    report = measure_training(
        str(base_folder), 2, 16, 4, 1, reporter=reporter, rank=2, dtype="float32", slots=3, lines=lines
    )
    sides = check_sides(report, ["ours", "ours together", "peft", "notebook"])
    assert sides["notebook"]["losses"] != pytest.approx(sides["ours"]["losses"], abs=1e-2)


def test_the_arithmetic_of_gpt2_is_that_of_the_cost_model():
    config = parse_config({"model_type": "gpt2"}, "")
    blocks, whole = LoraSettings(rank=16), LoraSettings(rank=16, targets=(*BLOCKS, "lm_head"))
    assert count_flops_per_token(config, 1024, blocks) / 1e6 == pytest.approx(574, abs=1)
    head = 6 * 32 * (768 + 50257)
    assert count_flops_per_token(config, 1024, whole) - count_flops_per_token(config, 1024, blocks) == head


def test_a_grid_trains_every_setting_and_goes_on_where_it_stopped(base_folder, tmp_path, capsys):
    for name, words in {"cat": "the cat and the dog run", "chat": "le chat et le chien sous"}.items():
        (tmp_path / name).mkdir()
        for seed, part in enumerate(("train", "valid", "test")):
            (tmp_path / name / f"{part}.jsonl").write_text(make_text(40, seed=seed, words=words))
    kept = tmp_path / "grid.jsonl"
    arguments = [
        "bench",
        "grid",
        tmp_path / "cat",
        tmp_path / "chat",
        "--rate",
        "1e-2",
        "--rate",
        "1e-4",
        "--keep",
        kept,
    ]
    arguments += ["--rank", "2", "--targets", "q,v", "--full", "--json", "--set", "train.steps=5"]
    arguments += ["--set", f"base={base_folder}", "--set", "data.block_size=16", "--set", "train.batch_tokens=64"]
    arguments += ["--set", "train.validate_every=5", "--set", "train.validation_tokens=64"]
    arguments += ["--set", "train.sample_tokens=0"]
    assert cli.run([str(a) for a in arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["points"]) == 2 * 2 + 2 * 4
    assert all(p["perplexity"] < p["base_perplexity"] for p in report["points"] if p["learning_rate"] >= 1e-3)
    assert report["ranking"][0][2] == 1e-2
    of_base = {(point["domain"], round(point["base_perplexity"], 3)) for point in report["points"]}
    assert len(of_base) == 2, "adapters and full fine-tunes are measured by one protocol"
    assert all(p["validation_perplexity"] != p["perplexity"] for p in report["points"])
    lines = kept.read_text().splitlines()
    old = {key: value for key, value in json.loads(lines[4]).items() if key != "validation_perplexity"}
    kept.write_text("\n".join([*lines[:4], json.dumps(old)]) + "\n")  # the last one by an earlier version
    assert cli.run([str(a) for a in arguments]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["points"] == report["points"]
    assert len(kept.read_text().splitlines()) == len(lines) + 1
    assert cli.run([str(a) for a in [*arguments, "--set", "train.steps=2"]]) == 0
    other = json.loads(capsys.readouterr().out)
    assert len(other["points"]) == len(report["points"])
    assert other["points"] != report["points"], "points of other settings are not taken for these"


def test_settings_are_ranked_by_their_worst_domain():
    def point(domain, rate, perplexity, targets="all"):
        return Point(
            setup="",
            domain=domain,
            targets=targets,
            rank=8,
            learning_rate=rate,
            base_perplexity=100.0,
            validation_perplexity=perplexity,
            perplexity=1 / perplexity,  # test text, by which nothing is chosen, says the opposite
            best_step=1,
        )

    points = [point("a", 1e-3, 10.0), point("b", 1e-3, 30.0), point("a", 2e-3, 11.0), point("b", 2e-3, 20.0)]
    points.append(point("a", 1e-4, 1.0, "full"))
    assert {domain: p.learning_rate for domain, p in find_best(points).items()} == {"a": 1e-3, "b": 2e-3}
    ranking = rank_settings(points)
    assert ranking[0][:4] == ("all", 8, 2e-3, pytest.approx(1.1))
    assert ranking[1][3] == pytest.approx(1.5)


@pytest.mark.slow
def test_writing_is_measured_beside_peft_and_both_write_the_same(base_folder, reporter):
    report = measure_decoding(str(base_folder), 12, 1, 2, reporter)
    sides = {side["name"]: side for side in report.to_json()["sides"]}
    assert list(sides) == ["ours", "ours, float16 weights", "peft"]
    assert sides["ours"]["ids"] == sides["peft"]["ids"]
    assert len({tuple(ids) for ids in sides["ours"]["ids"]}) > 1, "eight adapters do not write one text"
    for side in sides.values():
        assert all(side[key] > 0 for key in ("single", "batch_one", "batch_mixed", "swap_seconds", "load_seconds"))
    losses = [sides[name]["nll_nats"] for name in ("ours", "ours, float16 weights")]
    assert 0 < abs(losses[0] - losses[1]) < 1e-2


def test_serving_is_measured_in_a_process_of_its_own(base, trained, reporter):
    report = measure_serving(base.name, trained, 3, 40, 6, tokens=4, reporter=reporter)
    steady, burst, beside = report.loads
    assert report.adapters == ("code", "law")
    assert (steady.statuses, beside.statuses) == ({200: 24}, {200: 50})
    assert set(burst.statuses) <= {200, 429}
    assert sum(burst.statuses.values()) == 40
    assert steady.tokens_per_second > 0
    assert 0 < steady.median_seconds <= steady.p99_seconds


@pytest.mark.slow
def test_start_up_is_measured_beside_a_script(base_folder, reporter):
    seconds = measure_startup(str(base_folder), 1, reporter)
    assert next(iter(seconds)) == "--help"
    assert 0 < seconds["--help"] < seconds["first token under an adapter"]
    assert seconds["the same by transformers + PEFT"] > 1


def test_points_of_a_grid_that_was_killed_are_read_and_other_files_refused(tmp_path):
    point = Point(
        setup="s",
        domain="d",
        targets="all",
        rank=4,
        learning_rate=1e-3,
        base_perplexity=9.0,
        validation_perplexity=8.0,
        perplexity=8.5,
        best_step=3,
    )
    kept = tmp_path / "grid.jsonl"
    kept.write_text(json.dumps(asdict(point)) + "\n" + json.dumps(asdict(point))[:20])
    assert _read(kept) == [point]
    _append(kept, [point])
    assert _read(kept) == [point, point], "what follows is written on a line of its own"
    for other in ("no points\n", "notes\nwithout an end", '{"a": 1}'):
        kept.write_text(other)
        with pytest.raises(DataError, match="holds no points"):
            _read(kept)
        assert kept.read_text() == other
    worst = replace(point, domain="e", validation_perplexity=math.inf)
    assert rank_settings([point, worst])[0][3] == math.inf, "where all diverged, nothing is good"
