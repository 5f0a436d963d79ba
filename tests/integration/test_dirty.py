"""Every row of the messy files' table, handled as it says; and the JSON parser tests."""

import csv
import json
import re

import pytest

from lora_gpt2.core.errors import DataError, LoraGpt2Error
from lora_gpt2.data.clean.cleaning import CleaningReport, clean_text
from lora_gpt2.data.clean.filters import find_reason
from lora_gpt2.data.clean.rules import BOILERPLATE, choose_rules
from lora_gpt2.data.read.formats import read_documents, read_source
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.read.sources import find_sources
from lora_gpt2.recipe import DataSettings

GONE = re.compile("[\u200b\u200c\u2060\ufeff\u00ad\u202a-\u202e\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean(text, **changes):
    return clean_text(text, choose_rules("prose", changes), CleaningReport())


class Reading:
    """What reading and cleaning one file gives."""

    def __init__(self, path, settings):
        chosen = DataSettings(**settings)
        try:
            items = [item for source in find_sources([str(path)], chosen) for item in read_source(source, chosen)]
        except LoraGpt2Error as error:
            items = [error]
        self.raw = [item.text for item in items if isinstance(item, Document)]
        self.errors = [item for item in items if not isinstance(item, Document)]
        self.text = [clean(text) for text in self.raw]
        self.path = path

    @property
    def one(self):
        assert not self.errors
        assert len(self.text) == 1
        return self.text[0]

    def neighbour(self, name):
        return clean((self.path.parent / name).read_text(encoding="utf-8"))


def num(count, errors=0):
    return lambda it: (len(it.text), len(it.errors)) == (count, errors) and all(map(str.strip, it.text))


def has(*wanted, no=()):
    def check(it):
        assert all(part in it.one for part in wanted), [part for part in wanted if part not in it.one]
        found = [part for part in no if part in it.one]
        assert not found, found
        return True

    return check


def refused(message):
    return lambda it: (
        not it.text and all(message in e.message and e.hint and e.exit_code == 3 for e in it.errors) and it.errors
    )


def words_of(it, share=0.99):
    """True if a damaged copy has nearly all the words of the clean text it was made of."""
    wanted = it.neighbour("mojibake_clean_utf8.txt").split()
    return len(set(it.one.split()) & set(wanted)) > share * len(set(wanted))


def as_in(name):
    """True if a table reads as the reference says."""

    def check(it):
        expected = json.loads((it.path.parent / "spectrum_json" / f"{name}.json").read_text())
        return [row.replace("\r", "") for row in it.raw] == [" ".join(r.values()).replace("\r", "") for r in expected]

    return check


def mojibake_cases(it):
    """True if what ftfy's own cases expect is reached, all of it but quotation marks, which are left curly."""
    cases = [case for case in json.loads(it.path.read_text(encoding="utf-8")) if case["expect"] == "pass"]
    wrong = [c["label"] for c in cases if straight(c["original"]) != straight(c["fixed"])]
    assert len(wrong) <= 1, wrong
    return len(cases) >= 30


def straight(text):
    return clean(text, quotes=True, unicode="nfkc")


SQL = "SELECT * FROM weather JOIN cities ON city = name"
CHECKS = {
    "html/postgres_sql-select.html": has(
        "SELECT [ ALL | DISTINCT", "\n    [ FROM from_item", no=["<pre", "Home", "Prev"]
    ),
    "html/postgres_tutorial-join.html": has(SQL, "Thus far, our queries", no=["<p", "<a", "Chapter 2."]),
    "html/python_library_json.html": has(
        "JSON encoder and decoder", ">>> import json\n", "json.dumps(", no=["¶", "Navigation", "Quick search"]
    ),
    "html/sqlite_whentouse.html": has("SQLite is not directly comparable", no=["function ", "<path", "onclick"]),
    "html/apache_ko_content-negotiation.html": has("내용", no=["\ufffd"]),
    "html/apache_fr_caching.html": has("cache", "é", no=["\ufffd", "&eacute;"]),
    "html/apache_de_glossary.html": has("Glossar", "ü", no=["\ufffd", "&uuml;"]),
    "html/apache_ja_content-negotiation.html": has("コンテント", no=["\ufffd"]),
    "html/apache_ru_getting-started.html": has("сервер", no=["\ufffd"]),
    "html/apache_pt-br_new_features_2_4.html": has("não", no=["\ufffd"]),
    "html/court_conn_example.html": has("Supreme Court", no=["<script", "function("]),
    "html/court_missctapp_example.html": has("Mississippi", no=["<"]),
    "html/court_prsupreme_example.html": has("Tribunal", "Resolución", no=["application/ld+json", "function("]),
    "encoding/gutenberg_6745-8_latin1_crlf.txt": has(
        "MISS PARLOA", "é", no=["START OF THE PROJECT", "SMALL PRINT", "\r"]
    ),
    "encoding/blackwood_real_mojibake.md": has("é", "à", no=["Ã", "\r"]),
    "encoding/sinclair_real_mojibake_excerpt.md": has("é", no=["Ã"]),
    "encoding/browning_real_control_char.md": has("actress", no=["\x03"]),
    "encoding/ftfy_in-the-wild.json": mojibake_cases,
    "encoding/ftfy_synthetic.json": mojibake_cases,
    "encoding/ftfy_negative.json": mojibake_cases,
    "encoding/emoji-test.txt": lambda it: (
        re.findall("[\U0001f000-\U0001faff\u200d\ufe0f]", it.one)
        == re.findall("[\U0001f000-\U0001faff\u200d\ufe0f]", it.raw[0])
    ),
    "encoding/mojibake_clean_utf8.txt": has("’"),
    "encoding/mojibake_twice.txt": lambda it: "â€" not in it.one and words_of(it, 0.7),
    "encoding/mojibake_latin1.txt": lambda it: it.one == it.neighbour("mojibake_clean_utf8.txt"),
    "encoding/smart_cp1252.txt": has("’", "“", no=["\ufffd", "â€"]),
    "encoding/smart_utf8_bom_crlf.txt": lambda it: "’" in it.one and "\r" not in it.one and "\ufeff" not in it.one,
    "encoding/mixed_encodings_one_file.txt": has("’", "“", no=["\ufffd", "â€"]),
    "encoding/truncated_multibyte_at_eof.txt": has("’", no=["\ufffd"]),
    "encoding/nul_bytes.txt": lambda it: "\0" in it.raw[0] and "\0" not in it.one,
    "encoding/control_chars.txt": lambda it: not GONE.search(it.one),
    "encoding/zero_width.txt": lambda it: not GONE.search(it.one) and not re.search("[\u00a0\u2009\u200a]", it.one),
    "encoding/real_zero_width_2015-12-23-looking-back-2015-our-own-words.md": has(
        "18F", no=["authors:", "{{", "\u200b"]
    ),
    "encoding/real_zero_width_2016-07-11-conversation-about-static-dynamic-websites.md": has(
        "Jekyll", no=["authors:", "{{", "\u200b"]
    ),
    "encoding/real_crlf_shortcodes.md": has("’", no=["&#8217;", "{{<", "slug:"]),
    "encoding/nfd_vs_nfc.txt": lambda it: "\u0301" in it.raw[0] and "\u0301" not in it.one and "é" in it.one,
    "encoding/fullwidth_ligatures.txt": lambda it: "ﬁ" in it.one and "ﬁ" not in clean(it.raw[0], unicode="nfkc"),
    "layout/long_token_no_spaces.txt": lambda it: (
        len(it.raw[0]) > 600_000 and len(it.one) < 300_010 and find_reason(it.one, DataSettings()) == "repetitive"
    ),
    "layout/boilerplate_repeated.jsonl": num(40),
    "layout/real_templated_near_duplicates.jsonl": num(500),
    "layout/whitespace_mess.txt": lambda it: (
        not re.search(r"\n{3}|[ \t\u00a0]\n|\S {2}|\r", it.one) and "\n\n" in it.one
    ),
    "layout/cr_only_mac.txt": lambda it: "\r" not in it.one and it.one.count("\n") > 100,
    "layout/pii.txt": lambda it: (
        "@example" in it.one and not re.search(r"@example|078-05-1\d{3}|192\.0\.2\.", clean(it.raw[0], pii="mask"))
    ),
    "layout/urls_markup.txt": lambda it: (
        "{{<" not in it.one and "&#8217;" not in it.one and "://" not in clean(it.raw[0], urls="drop")
    ),
    "layout/whitespace_only.txt": lambda it: it.one == "",
    "layout/bom_only.txt": lambda it: it.one == "",
    "layout/tiny_40_words.txt": num(1),
    "layout/no_trailing_newline.txt": lambda it: it.raw[0].split()[-1] == it.one.split()[-1],
    "binary/real_policy.pdf": refused("26 of 26 pages have fonts that name no characters: 1-26"),
    "binary/pdf_named.txt": refused("is a binary file"),
    "json/good.jsonl": num(20),
    "json/broken_line.jsonl": num(15, 4),
    "json/truncated_last_line.jsonl": num(9, 1),
    "json/nested_fields.jsonl": num(20),
    "json/blank_lines_crlf_bom.jsonl": num(20),
    "json/utf16.jsonl": num(20),
    "json/jsonl_named.json": num(20),
    "json/array_named.jsonl": num(20),
    "json/deeply_nested.json": refused("nested too deeply"),
    "json/chat_messages.jsonl": num(40),
    "json/real_nested_factbook_fr.json": refused("no field 'text' (found: Communications"),
    "csv/real_e2e_devset.csv": num(4672),
    "csv/tab.tsv": num(20),
    "csv/no_text_column.csv": refused("columns: mr, ref"),
    "csv/spectrum_empty_crlf.csv": as_in("empty_crlf"),
    "csv/spectrum_escaped_quotes.csv": lambda it: it.raw == ['1 ha "ha" ha', "3 4"],
    "csv/spectrum_newlines_crlf.csv": as_in("newlines_crlf"),
    "csv/spectrum_simple_crlf.csv": as_in("simple_crlf"),
}
SETTINGS = {
    "json/nested_fields.jsonl": {"text_field": "data.document.text"},
    "json/chat_messages.jsonl": {"template": "{messages}"},
    "csv/real_e2e_devset.csv": {"text_field": "ref"},
    "csv/spectrum_escaped_quotes.csv": {"template": "{a} {b}"},
    **{f"csv/spectrum_{n}_crlf.csv": {"template": "{a} {b} {c}"} for n in ("empty", "newlines", "simple")},
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_messy_file_is_handled_as_its_row_says(shared, name):
    assert CHECKS[name](Reading(shared / "dirty" / name, SETTINGS.get(name, {})))


def test_every_row_of_the_table_has_its_check(shared):
    with (shared / "dirty" / "EXPECT.tsv").open(encoding="utf-8", newline="") as file:
        names = {row["file"] for row in csv.DictReader(file, delimiter="\t")}
    references = {name for name in names if name.startswith("csv/spectrum_json/")}
    assert names - references - {"json/JSONTestSuite/"} == set(CHECKS)
    assert BOILERPLATE in choose_rules("prose", {})


def test_the_json_parser_tests_are_read_or_refused(shared):
    files = sorted((shared / "dirty" / "json" / "JSONTestSuite").iterdir())
    assert len(files) == 318
    for path in files:
        try:
            list(read_documents([str(path)], DataSettings()))
            message = ""
        except DataError as error:
            message = error.message
        is_syntax = bool(re.search("not JSON|not valid UTF|surrogate|binary", message))
        if path.name.startswith("y_"):
            assert not is_syntax, (path.name, message)
        elif path.name.startswith("n_"):
            is_number = re.search("nan|infinity", path.name, re.IGNORECASE) is not None
            assert is_syntax or (is_number and "expected text" in message), (path.name, message)
