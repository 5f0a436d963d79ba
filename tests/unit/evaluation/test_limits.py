"""Limits on a matrix: which cells fail, and how they are named."""

import json

import pytest

from lora_gpt2.core.errors import DataError, UsageError
from lora_gpt2.evaluation.limits import check_limits, find_above, find_regressions, parse_limits, read_baseline
from lora_gpt2.evaluation.matrix import Cell
from lora_gpt2.evaluation.perplexity import Score

LN10 = 2.302585092994046
HOW = {"base": "x", "protocol": "document", "window": 16, "stride": 8}
CELLS = [Cell("base", "law", Score(40 * LN10, 20, 1, 1)), Cell("law", "law", Score(20 * LN10, 20, 1, 1))]  # 100 and 10


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
    general = [Cell("law", "general", CELLS[0].score)]
    assert find_above(general, {"": 50.0}) == [], "a limit without a name is not for general English"
    assert len(find_above(general, {"general": 50.0})) == 1


def test_a_baseline_finds_what_is_worse_missing_or_of_another_text(tmp_path):
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"cells": [cell.to_json() for cell in CELLS], **HOW}))
    baseline = read_baseline(path)
    assert find_regressions(CELLS, HOW, baseline, 0.01) == []
    worse = [CELLS[0], Cell("law", "law", Score(20.4 * LN10, 20, 1, 1))]
    assert find_regressions(worse, HOW, baseline, 0.01) == ["law on law: perplexity 10.47, was 10.00 (+4.7%)"]
    assert find_regressions(worse, HOW, baseline, 0.05) == []
    other = [CELLS[0], Cell("law", "law", Score(19 * LN10, 19, 1, 1))]
    assert "not the same text" in find_regressions(other, HOW, baseline, 0.01)[0]
    assert find_regressions(CELLS[:1], HOW, baseline, 0.01) == ["law on law: not measured now"]
    assert find_regressions([*CELLS, Cell("new", "law", CELLS[0].score)], HOW, baseline, 0.01) == []


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
