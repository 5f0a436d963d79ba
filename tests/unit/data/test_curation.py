"""What happens to documents after reading: personal data, copies, boilerplate, quality, and the time they may take."""

import random
import time
from itertools import pairwise

import numpy as np
import pytest

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.data import shards
from lora_gpt2.data.clean.boilerplate import drop_edges, find_boilerplate
from lora_gpt2.data.clean.cleaning import CleaningReport, clean_text
from lora_gpt2.data.clean.filters import find_reason
from lora_gpt2.data.clean.pii import find_pii, mask_pii
from lora_gpt2.data.clean.rules import RULES, Rule
from lora_gpt2.data.dedup import (
    NUM_HASHES,
    NearCopyIndex,
    choose_band_width,
    content_key,
    find_near_duplicates,
    sign,
)
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.shards import Shard, ShardContext, load_shard, process_shard
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.recipe import DataSettings


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to ada.l@mail.example.com.", [("email", "ada.l@mail.example.com")]),
        ("a..b@x.org, user@localhost", []),
        ("call (202) 555-0143 or +44 20 7946 0958", [("phone", "(202) 555-0143"), ("phone", "+44 20 7946 0958")]),
        ("in 1998 2004 2010 and 12345678", []),
        ("card 4111 1111 1111 1111, not 4111 1111 1111 1112", [("card", "4111 1111 1111 1111")]),
        ("SSN 078-05-1120 not 000-12-3456", [("ssn", "078-05-1120")]),
        ("host 192.0.2.1, version 1.2.3, 300.1.1.1", [("ip", "192.0.2.1")]),
        ("net 2001:db8::1 at 12:30:45", [("ip", "2001:db8::1")]),
        ("GB82 WEST 1234 5698 7654 32, not GB82 WEST 1234 5698 7654 33", [("iban", "GB82 WEST 1234 5698 7654 32")]),
    ],
)
def test_personal_data_needs_a_pattern_and_a_valid_number(text, found):
    assert [(each.kind, text[each.start : each.end]) for each in find_pii(text)] == found


CARD_IN_IBAN = "DE54 8809 1891 6348 9676 99"  # its last 18 digits pass the check of cards too


@pytest.mark.parametrize(
    ("text", "found", "masked"),
    [
        (f"to {CARD_IN_IBAN}, thanks", [("iban", CARD_IN_IBAN)], "to <iban>, thanks"),
        (f"{CARD_IN_IBAN[5:]} alone", [("card", CARD_IN_IBAN[5:])], "<card> alone"),
        ("078-05-1120 or 202-555-0143", [("ssn", "078-05-1120"), ("phone", "202-555-0143")], "<ssn> or <phone>"),
        (
            "a@b.org, a@b.org; c@d.org",
            [("email", "a@b.org"), ("email", "a@b.org"), ("email", "c@d.org")],
            "<email>, <email>; <email>",
        ),
        ("a@192.0.2.1 is no address", [("ip", "192.0.2.1")], "a@<ip> is no address"),
    ],
)
def test_what_is_found_does_not_overlap_and_is_masked_once(text, found, masked):
    findings = find_pii(text)
    assert [(each.kind, text[each.start : each.end]) for each in findings] == found
    assert all(one.end <= other.start for one, other in pairwise(findings))
    assert mask_pii(text) == masked


def test_findings_never_overlap_and_masking_keeps_all_the_rest():
    rng = random.Random(0)
    scraps = [
        "4111 1111 1111 1111",
        CARD_IN_IBAN,
        "078-05-1120",
        "+1 202 555 0143",
        "192.0.2.1",
        "a@b.org",
        " ",
        "-",
        "7",
    ]
    for _ in range(300):
        text = "".join(rng.choices(scraps, k=6))
        findings, rest, place = find_pii(text), "", 0
        for each in findings:
            assert place <= each.start < each.end <= len(text)
            rest += text[place : each.start] + f"<{each.kind}>"
            place = each.end
        assert mask_pii(text) == rest + text[place:]


def make_documents(count, words=120, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3000)}" for _ in range(words)) for _ in range(count)]


def test_planted_near_copies_are_found_and_no_other_pair_is():
    rng, documents = random.Random(1), make_documents(600)
    planted = []
    for text in documents[:300]:
        words = text.split()
        words[rng.randrange(len(words))] = "changed"
        planted.append("  ".join(words).upper() if rng.random() < 0.5 else " ".join(words))
    copies = find_near_duplicates(sign([*documents, *planted]), 0.8)
    assert {
        index: first for index, (first, _) in copies.items() if index >= 600 and first == index - 600
    }.keys() == copies.keys()
    assert len(copies) >= 0.98 * 300
    assert all(0.8 <= similarity <= 1 for _, similarity in copies.values())
    assert len(NearCopyIndex(sign(documents[:300]), 0.8).find(sign(planted))) == len(copies)
    assert len(NearCopyIndex(sign(documents[300:]), 0.8).find(sign(planted))) == 0


def test_copies_are_counted_of_the_first_documents_among_the_second_and_within_neither():
    one, two, three = make_documents(3)
    near = one.replace(one.split()[50], "changed")

    def count(of, among):
        return len(NearCopyIndex(sign(of), 0.8).find(sign(among)))

    assert count([one], [two, two, two]) == 0, "copies of each other alone"
    assert count([one, one], [two]) == 0
    assert count([one], [one, near, two]) == 2
    assert count([one], [one, one]) == 2, "each of them"
    assert count([one, one, near], [one]) == 1, "once, however many it is like"
    assert count([one, two], [three, two, two, three]) == 2
    assert count([], [one, one]) == count([one], []) == 0


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_copy_is_counted_though_it_is_more_like_another_document(order):
    """Signatures with set likenesses: the held-out one and Y share 0.82, Y and Z 0.92, the held-out one and Z 0.74."""
    held = np.arange(NUM_HASHES, dtype=np.uint32)
    y, z = held.copy(), held.copy()
    y[:23] += 1000
    z[:33] += 1000
    assert (held == z).mean() < 0.75 < 0.8 < (held == y).mean() < (y == z).mean()
    assert len(NearCopyIndex(held[None], 0.8).find(np.stack([y, z])[order])) == 1


def test_the_estimate_of_likeness_is_that_of_the_sets():
    words = make_documents(1, 1000)[0].split()
    for changes in (1, 10, 40):
        other = list(words)
        for place in range(0, 1000, 1000 // changes):
            other[place] = "changed"
        grams = [{tuple(side[i : i + 5]) for i in range(996)} for side in (words, other)]
        wanted = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        first, second = sign([" ".join(words), " ".join(other)])
        # NUM_HASHES draws of a share: it deviates by 0.044 at most
        assert float(np.mean(first == second)) == pytest.approx(wanted, abs=0.12)


def test_a_copy_of_a_copy_that_is_unlike_the_first_stays():
    signatures = np.arange(3 * 128, dtype=np.uint32).reshape(3, 128)
    signatures[1, :110] = signatures[0, :110]
    signatures[2, 20:] = signatures[1, 20:]
    assert find_near_duplicates(signatures, 0.8) == {1: (0, pytest.approx(110 / 128))}


def test_bands_miss_almost_nothing_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.95):
        width = choose_band_width(threshold)
        assert (1 - threshold**width) ** (128 // width) <= 0.005
    assert content_key("A  b\n") == content_key("a B") != content_key("ab")


def test_boilerplate_goes_at_the_edges_alone():
    texts = [f"Home > Blog\n\nSkip to content\n{i} story\nHeading\nmore {i}\n© 2015\n" for i in range(12)]
    lines = find_boilerplate(texts)
    assert lines == {"Home > Blog", "Skip to content", "Heading", "© 2015"}
    cleaned = drop_edges(texts[3], lines)
    assert cleaned == "3 story\nHeading\nmore 3"
    assert drop_edges(cleaned, lines) == cleaned
    assert find_boilerplate(texts[:9]) == frozenset(), "too few to tell"
    assert drop_edges("Heading\n\n© 2015", lines) == "Heading\n\n© 2015", "nothing would be left"


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        (" \n", {}, "empty"),
        ("short", {"min_characters": 6}, "too short"),
        ("x" * 5000, {}, "repetitive"),
        ("x" * 5000, {"max_repetition": 1.0}, None),
        ("The cat sat on the mat and looked at the rain outside.", {"languages": ("en",)}, None),
        ("Die Katze saß auf der Matte und sah dem Regen draußen zu.", {"languages": ("en",)}, "language: de"),
    ],
)
def test_documents_are_rejected_for_a_reason(text, settings, reason):
    assert find_reason(text, DataSettings(**settings)) == reason


def test_languages_without_their_package_say_what_to_install(monkeypatch):
    monkeypatch.setattr("lora_gpt2.data.clean.filters._identifier", None)
    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    with pytest.raises(ResourceError) as caught:
        find_reason("some text", DataSettings(languages=("en",)))
    assert "pip install py3langid" in caught.value.hint


def test_a_document_that_takes_too_long_is_set_aside_and_the_others_go_on(base_folder, tmp_path, monkeypatch):
    def crawl(text, mode):
        while "slow" in text:
            time.sleep(0.01)
        return text

    monkeypatch.setitem(RULES, "whitespace", Rule(apply=crawl))
    monkeypatch.setattr(shards, "MIN_TIMEOUT_SECONDS", 0.2)
    job = ShardContext(
        settings=DataSettings(),
        rules={"whitespace": "on"},
        code_rules={},
        tokenizer=load_tokenizer(base_folder, 0),
        boilerplate=frozenset(),
        section_length=0,
        folder=tmp_path,
    )
    documents = [Document(text, f"d{i}") for i, text in enumerate(("one", "a slow one", "two"))]
    process_shard(Shard(number=0, split="train", documents=documents), job)
    kept, report = load_shard(tmp_path, 0)
    assert kept.origins == ["d0", "d2"]
    assert report.rejected == [{"origin": "d1", "reason": "too slow to clean", "text": "a slow one"}]
    assert (report.read, report.kept) == (3, 2)


HOSTILE = {  # unit, repeated, after a beginning
    "whitespace": ("", " "),
    "tabs": ("", "x\t"),
    "lines": ("", "\n"),
    "entities": ("", "&amp;"),
    "nested": ("&", "amp;"),
    "comments": ("", "<!--"),
    "tags": ("", "<b "),
    "braces": ("", "{{"),
    "links": ("", "[a]("),
    "at": ("", "a@"),
    "dots": ("@", "a."),
    "digits": ("", "1 "),
    "words": ("", "x"),
    "urls": ("", "http://"),
    "fences": ("", "---\na:\n"),
    "mojibake": ("", "Ã©â€™"),
    "accents": ("", "é\u0301"),
    "emoji": ("", "👩\u200d"),
    "text": ("", "the cat & 3 < 5. "),
    "page": ("<html>", "<div><p>a</p><a href=x>b</a>"),
}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rule_is_quadratic(rule):
    """On text made to be slow, quadratic work would take minutes; a loaded machine is not asked for more."""
    for name, (beginning, unit) in HOSTILE.items():
        for mode in RULES[rule].modes:
            times = []
            for size in (60_000, 120_000):
                value = beginning + unit * (size // len(unit))
                attempts = []
                for _ in range(2):
                    started = time.process_time()
                    RULES[rule].apply(value, mode)
                    attempts.append(time.process_time() - started)
                times.append(min(attempts))
            assert times[1] < max(0.5, 3.5 * times[0]), (name, mode, times)


def test_reports_add_up():
    one, two = CleaningReport(), CleaningReport()
    for report, texts in ((one, ["a\0", "b"]), (two, ["c\0\0"])):
        for text in texts:
            clean_text(text, {"nul": "on", "pii": "report"}, report)
    one.add(CleaningReport.from_json(two.to_json()))
    assert (one.rules["nul"].documents, one.rules["nul"].characters_removed, len(one.rules["nul"].examples)) == (
        2,
        3,
        2,
    )
