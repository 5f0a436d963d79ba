"""Limits on a matrix: which cells fail, and how they are named."""

import dataclasses
import json
import math

import pytest

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.evaluation.limits import check_limits, find_above, find_regressions, parse_limits, read_baseline
from lora_gpt2.evaluation.matrix import Cell
from lora_gpt2.evaluation.perplexity import Score

LN10 = 2.302585092994046
HOW = {"base": "x", "protocol": "document", "window": 16, "stride": 8}
CELLS = [
    Cell(adapter="base", source="law", score=Score(nll_nats=40 * LN10, tokens=20, words=1, bytes=1)),
    Cell(adapter="law", source="law", score=Score(nll_nats=20 * LN10, tokens=20, words=1, bytes=1)),
]  # 100 and 10


def test_limits_are_for_all_sources_or_one():
    assert parse_limits(["40", "law=9.5"]) == {"": 40.0, "law": 9.5}
    for bad in ("law", "law=", "x=-3", "0", "nan"):
        with pytest.raises(UsageError, match="expected a perplexity"):
            parse_limits([bad])


def test_the_base_fails_only_alone():
    assert find_above(CELLS, {"": 50.0}) == []
    assert find_above(CELLS, {"": 50.0, "law": 9.9}) == ["law on law: perplexity 10.00, limit 9.9"]
    assert find_above(CELLS[:1], {"": 50.0}) == ["base on law: perplexity 100.00, limit 50"]
    with pytest.raises(UsageError, match="code"):
        check_limits({"code": 50.0}, ["law", "general"])
    check_limits({"": 1.0, "general": 50.0}, ["law", "general"])
    general = [Cell(adapter="law", source="general", score=CELLS[0].score)]
    assert find_above(general, {"": 50.0}) == [], "a limit without a name is not for general English"
    assert len(find_above(general, {"general": 50.0})) == 1


def test_a_baseline_finds_what_is_worse_missing_or_of_another_text(tmp_path):
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"cells": [cell.to_json() for cell in CELLS], **HOW}))
    baseline = read_baseline(path)
    assert find_regressions(CELLS, HOW, baseline, 0.01) == []
    worse = [
        CELLS[0],
        Cell(adapter="law", source="law", score=Score(nll_nats=20.4 * LN10, tokens=20, words=1, bytes=1)),
    ]
    assert find_regressions(worse, HOW, baseline, 0.01) == ["law on law: perplexity 10.47, was 10.00 (+4.7%)"]
    assert find_regressions(worse, HOW, baseline, 0.05) == []
    other = [CELLS[0], Cell(adapter="law", source="law", score=Score(nll_nats=19 * LN10, tokens=19, words=1, bytes=1))]
    assert "not the same text" in find_regressions(other, HOW, baseline, 0.01)[0]
    assert find_regressions(CELLS[:1], HOW, baseline, 0.01) == ["law on law: not measured now"]
    assert (
        find_regressions([*CELLS, Cell(adapter="new", source="law", score=CELLS[0].score)], HOW, baseline, 0.01) == []
    )


def test_a_baseline_measured_otherwise_is_no_baseline(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"cells": [cell.to_json() for cell in CELLS], **HOW}))
    baseline = read_baseline(tmp_path / "b.json")
    assert find_regressions(CELLS, {**HOW, "stride": 9}, baseline, 0.01) == ["stride is 9 now, 8 in the baseline"]


def test_a_baseline_that_is_none_is_a_data_error(tmp_path):
    for content in ("", "[1]", '{"cells": [{}]}', '{"cells": 3}', '{"cells": []}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError) as caught:
            read_baseline(tmp_path / "x.json")
        assert "--json" in caught.value.hint


class Told(Score):
    """A score whose perplexity is what it is told to be."""

    perplexity = property(lambda self: self.nll_nats)


def tell(adapter, perplexity, tokens=20, source="law"):
    return Cell(adapter=adapter, source=source, score=Told(nll_nats=perplexity, tokens=tokens, words=1, bytes=1))


@pytest.mark.parametrize(
    "score",
    [Score(nll_nats=math.nan, tokens=20, words=1, bytes=1), Told(nll_nats=math.nan, tokens=20, words=1, bytes=1)],
)
@pytest.mark.parametrize("limit", [1.0, 50.0, 1e300])
def test_what_is_not_a_number_is_above_every_limit(score, limit):
    for label in ("", "law"):
        (line,) = find_above([CELLS[0], Cell(adapter="law", source="law", score=score)], {label: limit})
        assert line.startswith("law on law: perplexity ")
        assert line.endswith(f", limit {limit:g}")
        assert len(find_above([Cell(adapter="base", source="law", score=score)], {label: limit})) == 1, (
            "the base alone as well"
        )
    assert len(find_above([Cell(adapter="law", source="general", score=score)], {"general": limit})) == 1


def test_a_limit_is_the_largest_that_passes():
    cells = [tell("base", 1.0), tell("law", 10.0)]
    assert find_above(cells, {"": 10.0}) == []
    assert len(find_above(cells, {"": math.nextafter(10.0, 0)})) == 1
    assert len(find_above([tell("law", math.inf)], {"": 1e308})) == 1
    assert len(find_above([tell("law", 10.0), tell("code", 11.0), tell("x", 9.0)], {"": 9.5})) == 2, (
        "each that is above"
    )
    by_source = [tell("law", 10.0, source=source) for source in ("a", "b", "general")]
    assert find_above(by_source, {"": 5.0, "a": 20.0}) == ["law on b: perplexity 10.00, limit 5"]


def read_back(tmp_path, cells, **more):
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"cells": [cell.to_json() for cell in cells], **HOW, **more}))
    return read_baseline(path)


@pytest.mark.parametrize(
    "score",
    [Score(nll_nats=math.nan, tokens=20, words=1, bytes=1), Told(nll_nats=math.nan, tokens=20, words=1, bytes=1)],
)
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 100.0])
def test_what_is_not_a_number_is_worse_than_every_baseline(tmp_path, score, tolerance):
    baseline = read_back(tmp_path, CELLS)
    for place, name in ((0, "base"), (1, "law")):
        cells = [*CELLS]
        cells[place] = dataclasses.replace(CELLS[place], score=score)
        (line,) = find_regressions(cells, HOW, baseline, tolerance)
        assert line.startswith(f"{name} on law: perplexity ")


def test_nothing_is_as_good_as_a_baseline_that_is_not_a_number(tmp_path):
    baseline = read_back(tmp_path, [tell("law", math.nan)])
    assert len(find_regressions([tell("law", 1.0)], HOW, baseline, 0.5)) == 1


def test_as_much_worse_as_is_tolerated_passes_and_better_always_does(tmp_path):
    baseline = read_back(tmp_path, [tell("law", 8.0)])
    assert find_regressions([tell("law", 10.0)], HOW, baseline, 0.25) == []
    assert find_regressions([tell("law", math.nextafter(10.0, 11))], HOW, baseline, 0.25) != []
    assert find_regressions([tell("law", 8.0)], HOW, baseline, 0.0) == []
    assert find_regressions([tell("law", 1.0)], HOW, baseline, 0.0) == []
    assert find_regressions([tell("law", math.inf)], HOW, baseline, 100.0) != []
    for tokens in (19, 21):
        assert "not the same text" in find_regressions([tell("law", 8.0, tokens)], HOW, baseline, 1.0)[0]


def test_general_english_counts_where_both_have_it(tmp_path):
    forgetting = [tell("law", 30.0, source="general").to_json()]
    baseline = read_back(tmp_path, [tell("law", 8.0)], forgetting=forgetting)
    assert find_regressions([tell("law", 8.0)], HOW, baseline, 0.0) == [], "it was not measured now"
    now = [tell("law", 8.0), tell("law", 40.0, source="general")]
    assert find_regressions(now, HOW, baseline, 0.1) == ["law on general: perplexity 40.00, was 30.00 (+33.3%)"]
    assert find_regressions(now, HOW, read_back(tmp_path, [tell("law", 8.0)]), 0.1) == [], "it was not measured then"
