import pytest

from lora_gpt2.data.cleaning import PROFILES, RULES, CleaningReport


@pytest.mark.parametrize(
    ("profile", "before", "after"),
    [
        ("raw", " a\r\n\0\n\n\n", " a\r\n\0\n\n\n"),
        ("code", "def f():\r\n\tx = 1  \r\n\0", "def f():\n\tx = 1  \n"),
        ("prose", "\ufeff a\r\rb  \u2028c\x07\x85\n\n\n\nd \n", "a\n\nb\nc\n\nd"),
        ("prose", "tabs\tand\u00a0non-breaking stay", "tabs\tand\u00a0non-breaking stay"),
        ("prose", " \n\t\n ", ""),
    ],
)
def test_each_profile_does_what_it_says(profile, before, after):
    assert CleaningReport().clean(before, profile) == after


def test_the_report_counts_and_shows_changes():
    report = CleaningReport()
    for text in ("a\0b", "c", "\0\0", "x\0", "y\0"):
        report.clean(text, "code")
    rule = report.rules["nul"]
    assert (rule.documents, rule.characters_removed, len(rule.examples)) == (4, 5, 3)
    assert rule.examples[0] == {"before": "a\0b", "after": "ab"}
    assert list(report.rules) == ["nul"]


def test_profiles_name_rules_that_exist():
    assert {name for names in PROFILES.values() for name in names} == set(RULES)
