"""What PEFT's configuration means, site by site, against PEFT's own matching."""

import itertools
import json
import re
import warnings
from types import SimpleNamespace

import pytest

from lora_gpt2.model.gpt2 import ADAPTABLE
from lora_gpt2.store.peft.config import module_of, parse_peft_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

SITES = [f"h.{layer}.{target}" for layer in (0, 1, 10, 11) for target in ADAPTABLE if target != "lm_head"] + ["lm_head"]


def parse(**values):
    return parse_peft_config(json.dumps({"r": 4, "lora_alpha": 8, **values}).encode(), "here")


PATTERNS = [
    "proj",
    "c_proj",
    "attn.c_proj",
    "mlp.c_proj",
    "fc",
    "c_fc",
    "_fc",
    "c_f",
    "h.0.mlp.c_fc",
    "0.mlp.c_fc",
    "transformer.h.1.attn.c_attn",
    "h.1.attn.c_attn",
    "1.attn.c_attn",
    "c_attn",
    "attn",
    "mlp",
    "transformer",
    "h",
    "lm_head",
    "head",
    "lm_hea",
    "^c_fc",
    "^transformer.h.0.mlp.c_fc",
    "^lm_head",
    "c_fc$",
    ".*c_fc",
    "c_.*",
    ".*",
    r"h\.1\..*",
    r".*\.1\..*",
    r"h\.\d\.mlp\.c_fc",
    r"h\.\d+\.mlp\.c_fc",
    "c_fc|c_attn",
    "(c_fc|c_attn)",
    "attn|c_fc",
    "C_FC",
    "c_fc ",
    "",
    "c_proj|",
    "x",
    "[a-z_]+",
    r"\w+",
    r"h\.(0|1[01])\.attn\.c_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_fits_the_sites_that_it_fits_in_peft(pattern):
    ours = parse(rank_pattern={pattern: 5}, alpha_pattern={pattern: 3})
    for site in SITES:
        fits = get_pattern_key([pattern], module_of(site)) == pattern
        assert (ours.rank_of(site), ours.alpha_of(site)) == ((5, 3.0) if fits else (4, 8.0)), site


def test_a_part_of_a_name_is_not_the_name():
    spec = parse(alpha_pattern={"proj": 3}, rank_pattern={"proj": 2, "fc": 2, "head": 2, "ttn.c_proj": 2})
    assert {spec.alpha_of(site) for site in SITES} == {8.0}
    assert {spec.rank_of(site) for site in SITES} == {4}
    named = parse(alpha_pattern={"c_proj": 3})
    assert {site for site in SITES if named.alpha_of(site) == 3} == {site for site in SITES if site.endswith(".c_proj")}


def test_the_first_pattern_that_fits_counts_as_in_peft():
    patterns = {r"h\.0\..*": 1, "c_fc": 2, "mlp.c_proj": 3, ".*c_proj": 5, "c_attn": 7, ".*": 6}
    for given in (patterns, dict(reversed(patterns.items()))):
        spec = parse(rank_pattern=given, alpha_pattern=given)
        for site in SITES:
            wanted = given[get_pattern_key(given.keys(), module_of(site))]
            assert (spec.rank_of(site), spec.alpha_of(site)) == (wanted, float(wanted))


EXCLUDED = [None, [], ["c_proj"], ["attn.c_proj"], ["proj"], r".*\.h\.0\..*", "c_proj", ".*attn"]
LAYERS = [None, [], [1], [0, 11], 1, [5]]


@pytest.mark.parametrize(
    "targets",
    [
        ["c_attn"],
        ["c_proj"],
        ["attn.c_proj"],
        ["proj"],
        ["attn"],
        ["lm_head"],
        ["head"],
        ["c_fc", "lm_head"],
        ["transformer.h.0.mlp.c_fc"],
        ["h.0.mlp.c_fc", "h.1.attn.c_attn"],
        [".*"],
        [r"c_.*"],
        r".*\.c_fc",
        "c_fc",
        ".*c_fc",
        r"transformer\.h\.1\..*",
        "lm_head",
        ".*proj",
        ".*",
        r".*\.c_f",
        r"transformer\.h\.1",
        r"transformer\.h\.1|lm_head",
        r".*\.c_attn|.*\.c_f",
        r".*\.h\.(0|1)\.mlp\.c_(fc|proj)",
    ],
    ids=str,
)
def test_a_site_is_adapted_where_peft_adapts_it(targets):
    for excluded, layers in itertools.product(EXCLUDED, LAYERS):
        values = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
        spec = parse(**values)
        config = SimpleNamespace(**values, layers_pattern=None, modules_to_save=None, target_parameters=None)
        for site in SITES:
            found = check_target_module_exists(config, module_of(site))
            wanted = found is True or isinstance(found, re.Match)
            assert spec.is_target(site) is wanted, (site, excluded, layers)


def test_what_is_not_said_is_pefts_default():
    spec = parse_peft_config(b"{}", "here")
    assert (spec.rank, spec.alpha, spec.use_rslora, spec.dora, spec.pissa) == (8, 8.0, False, False, False)
    assert [site for site in SITES if spec.is_target(site)] == [site for site in SITES if site.endswith("c_attn")]


def test_matching_is_plain_only_without_expressions():
    for plain in (
        {"target_modules": ["c_fc", "h.0.mlp.c_proj"]},
        {"rank_pattern": {"c_fc": 2, "^h.0.c_fc": 3}},
        {},
        {"exclude_modules": ["lm_head"]},
        {"layers_pattern": ["h"]},
    ):
        assert parse(**plain).is_plain, plain
    for hidden in (
        {"target_modules": "c_fc"},
        {"target_modules": ["c_fc", "c_.*"]},
        {"rank_pattern": {"c_.*": 2}},
        {"alpha_pattern": {"a|b": 2}},
        {"exclude_modules": ".*"},
        {"exclude_modules": ["(a)"]},
        {"layers_pattern": "h"},
        {"layers_pattern": ["h+"]},
    ):
        assert not parse(**hidden).is_plain, hidden
