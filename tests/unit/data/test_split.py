import random

import pytest

from lora_gpt2.data.dedup import content_key
from lora_gpt2.data.split import choose_section_length, iter_sections, split_keys

TEXTS = [f"document {i}" for i in range(2000)]


def split_documents(texts, *shares):
    return split_keys([content_key(text) for text in texts], *shares)


def test_equal_keys_have_one_part():
    parts = split_keys([b"prompt 1........"] * 3 + [b"prompt 2........", b"prompt 3........"], 0.3, 0.3)
    assert len(set(parts[:3])) == 1


def test_parts_have_about_their_share_and_do_not_depend_on_order_or_additions():
    parts = dict(zip(TEXTS, split_documents(TEXTS, 0.05, 0.1), strict=True))
    counts = {part: list(parts.values()).count(part) for part in ("train", "validation", "test")}
    assert 60 <= counts["validation"] <= 140
    assert 150 <= counts["test"] <= 250
    more = [*reversed(TEXTS), *(f"new {i}" for i in range(500))]
    again = dict(zip(more, split_documents(more, 0.05, 0.1), strict=True))
    assert all(again[text] == part for text, part in parts.items())


def test_a_part_that_would_be_empty_gets_a_document():
    assert sorted(split_documents(["a", "b", "c"], 0.01, 0.01)) == ["test", "train", "validation"]
    assert split_documents(["a", "b"], 0.01, 0.0) == ["train", "train"]
    assert split_documents(["a", "b", "c"], 0.0, 0.0) == ["train"] * 3


def test_sections_are_whole_paragraphs_and_lose_nothing():
    paragraphs = [f"paragraph {i} " + "x" * 500 for i in range(200)]
    text = "\n\n".join(paragraphs)
    sections = list(iter_sections(text, 2048))
    assert "\n\n".join(sections) == text
    assert all(len(section) >= 2040 for section in sections[:-1])
    assert len(sections) > 30
    longer = list(iter_sections(text + "\n\nmore", 2048))
    assert longer[: len(sections) - 1] == sections[:-1]


def test_text_without_blank_lines_is_cut_at_line_ends():
    text = "\n".join(f"line {i} of a book" for i in range(1000))
    sections = list(iter_sections(text, 256))
    assert "\n".join(sections) == text
    assert 50 < len(sections) < 90


@pytest.mark.parametrize(
    ("unit", "joint"),
    [
        ("A sentence of some words ends here! ", " "),
        ("这是一个没有空格的句子。", ""),
        ("word ", " "),
        ("ACGT", ""),
        ("日本語の文章です", ""),
        ("ก", ""),
    ],
)
def test_text_without_a_line_break_is_cut_at_sentences_then_words_then_anywhere(unit, joint):
    text = (unit * (40_000 // len(unit))).rstrip()
    sections = list(iter_sections(text, 512))
    assert 50 <= len(sections) <= 80
    assert max(map(len, sections)) <= 5 * 512
    assert joint.join(sections) == text
    assert not joint or all(section[0] == unit[0] for section in sections)


def test_no_text_is_lost_whatever_it_is_made_of():
    draw = random.Random(0)
    for _ in range(300):
        pieces = draw.choices(
            ["a", "b ", "\n", "\n\n", "。", "! ", "x" * 30, "你好", ". ", '." '], k=draw.randint(0, 900)
        )
        text = "".join(pieces)
        found = "".join(iter_sections(text, draw.choice([4, 16, 64])))
        assert "".join(found.split()) == "".join(text.split())


def test_the_section_size_grows_with_the_text_and_seldom_changes():
    assert [choose_section_length(n) for n in (0, 20_000, 41_000, 10**9)] == [256, 256, 1024, 8192]
    assert choose_section_length(41_000) == choose_section_length(80_000)
