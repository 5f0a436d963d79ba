import base64
import random

import pytest

from lora_gpt2.core.errors import UsageError
from lora_gpt2.data.clean.cleaning import CleaningReport, clean_text
from lora_gpt2.data.clean.rules import BOILERPLATE, BOILERPLATE_MODES, PROFILES, RULES, choose_rules


@pytest.mark.parametrize(
    ("profile", "before", "after"),
    [
        ("raw", " a\r\n\0\n\n\n", " a\r\n\0\n\n\n"),
        ("code", "def f():\r\n\tx = 1  \r\n\0", "def f():\n\tx = 1  \n"),
        ("prose", "\ufeff a\r\rb  \u2028c\x07\x85\n\n\n\nd \n", "a\n\nb\nc\n\nd"),
        ("prose", "tabs\tand\u00a0non-breaking  spaces\n\tindent", "tabs and non-breaking spaces\n\tindent"),
        ("prose", " \n\t\n ", ""),
    ],
)
def test_each_profile_does_what_it_says(profile, before, after):
    assert clean_text(before, choose_rules(profile, {}), CleaningReport()) == after


def test_the_report_counts_and_shows_changes():
    report = CleaningReport()
    for text in ("a\0b", "c", "\0\0", "x\0", "y\0"):
        clean_text(text, choose_rules("code", {}), report)
    rule = report.rules["nul"]
    assert (rule.documents, rule.characters_removed, len(rule.examples)) == (4, 5, 3)
    assert rule.examples[0] == {"before": "a\0b", "after": "ab"}
    assert list(report.rules) == ["nul"]


BASE64 = base64.b64encode(random.Random(0).randbytes(3000)).decode()


def test_profiles_name_rules_that_exist():
    modes = {**{name: rule.modes for name, rule in RULES.items()}, BOILERPLATE: BOILERPLATE_MODES}
    for name, _, mode in (rule.partition(":") for rules in PROFILES.values() for rule in rules):
        assert (mode or modes[name][0]) in modes[name]
    assert all(rule.apply.__doc__.startswith("Returns ") for rule in RULES.values())


@pytest.mark.parametrize(
    ("rule", "mode", "before", "after"),
    [
        ("html", "on", "a < b", "a < b"),
        ("html", "on", "<!DOCTYPE html><title>t</title><nav>menu</nav><p>one</p><p>two &amp; 3</p>", "one\n\ntwo & 3"),
        ("html", "on", "<html><script>x()</script><style>y</style><pre>a\n  b</pre><svg><path d='M'/></svg>", "a\n  b"),
        ("entities", "on", "It&#8217;s &amp;amp; &lt;b&gt; &nosuch; & &#x41;", "It\u2019s & <b> &nosuch; & A"),
        ("newlines", "on", "a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("nul", "on", "a\0b", "ab"),
        ("mojibake", "on", "dÃ©jÃ\xa0 vu \u2014 \u201cok\u201d\nschÃ¶n", "déjà vu \u2014 \u201cok\u201d\nschön"),
        ("mojibake", "on", "Ãngström à la carte, naïve", "Ãngström à la carte, naïve"),
        ("control", "on", "act\x03ress\x1b[31m red\u200b\ufeff\u00ad!\u202e", "actress red!"),
        ("control", "on", "👩\u200d👩\u200d👧 a\u200db", "👩\u200d👩\u200d👧 ab"),
        ("unicode", "nfc", "e\u0301 ﬁ Ａ", "é ﬁ Ａ"),
        ("unicode", "nfkc", "e\u0301 ﬁ Ａ", "é fi A"),
        ("quotes", "on", "\u201cit\u2019s\u201d", '"it\'s"'),
        ("front_matter", "on", "---\ntitle: x\ntags:\n- a\n---\n\nText\n---\nmore", "\nText\n---\nmore"),
        ("front_matter", "on", "---\nA poem\n---\n", "---\nA poem\n---\n"),
        ("template_tags", "on", 'see [us]({{< ref "a.md" >}}) {% if x %}y{% endif %}', "see us y"),
        ("template_tags", "on", "{{ {{x}} }} {a}", " {a}"),
        ("template_tags", "on", "{{ url_for('x', y='z.css') }}a {{b}}", "a "),
        (
            "template_tags",
            "on",
            "{{ \\bf The theorem }} {{ 1, 2, 3 }} {{ a b }}",
            "{{ \\bf The theorem }} {{ 1, 2, 3 }} {{ a b }}",
        ),
        ("template_tags", "on", "$\\frac{{ x + y }}{{ z - 1 }}$", "$\\frac{{ x + y }}{{ z - 1 }}$"),
        ("template_tags", "on", "\\frac{{a}}{b} x{{y}}", "\\frac{{a}}{b} x{{y}}"),
        ("tags", "on", "~~~~~~~~\n<i>a</i>\n~~~~~~~~\n<i>b</i>\n~~~", "~~~~~~~~\na\n~~~~~~~~\nb\n~~~"),
        ("tags", "on", "````md\n```\n<b>\n```\n````\n<i>c</i>", "````md\n```\n<b>\n```\n````\nc"),
        ("tags", "on", "```py\n<b>\n```\n```py\n<i>not closed</i>", "```py\n<b>\n```\n```py\nnot closed"),
        ("tags", "on", "~~~ html\n<b>\n~~~~\n`<b>` <b>", "~~~ html\n<b>\n~~~~\n`<b>` "),
        ("tags", "on", "a<br/>b <b class='x'>bold</b> <unk> 1 < 2 <!-- no --> <<b>b>", "a\nb bold <unk> 1 < 2  "),
        (
            "licence",
            "on",
            "The Project Gutenberg EBook\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\nProduced by A\nand B\n\n"
            "Text\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nlicence",
            "\nText\n",
        ),
        ("licence", "on", "about Gutenberg's press", "about Gutenberg's press"),
        ("emoji", "drop", "hi 👩\u200d👧🏽!\u2122 1\ufe0f\u20e3", "hi !\u2122 "),
        ("emoji", "name", "hi 😀", "hi :grinning_face:"),
        ("urls", "mask", 'see https://a.b/c?d=1, or [it](https://x.y "t") www.z.org.', "see <url>, or it <url>."),
        ("urls", "drop", "![p](http://x/y.png)see http://a.b", "see "),
        ("pii", "report", "a@b.org", "a@b.org"),
        ("pii", "mask", "a@b.org, 4111 1111 1111 1111", "<email>, <card>"),
        ("long_words", "on", f"a {BASE64[:1000]} {BASE64[:1001]} b", f"a {BASE64[:1000]}  b"),
        ("whitespace", "on", " a  b\t c \n\n \n\n  d\u2003e\n", "a b c\n\n  d e"),
    ],
)
def test_each_rule_does_what_it_says(rule, mode, before, after):
    assert RULES[rule].apply(before, mode) == after
    assert RULES[rule].apply(after, mode) == after


START = "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n"
END = "*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
STORY = "A line of the story.\n" * 20


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"header\n{START}{STORY}{END}licence\n", STORY),
        (f"a\n{START}{STORY}{END}b\n{START}Another.\n{END}c\n", f"{STORY}\nAnother.\n"),  # two books
        (f"{STORY}Such books begin with\n{START}and no more.\n", None),  # quoted near the end of another text
        (f"{STORY}{START}", None),
        (f"{STORY * 2}{START}{STORY * 3}{START}{STORY * 5}", STORY * 10),  # quoted twice in the middle of another text
        (f"{STORY * 20}{START}{STORY}{END}b\n{START}Another.\n{END}c\n", f"{STORY * 20}\n{STORY}\nAnother.\n"),
        (f"{START}{STORY}", STORY),
        (f"{STORY}{END}licence\n", STORY),
        (f"{STORY * 3}{END}{STORY * 5}", None),  # quoted in an essay
        (f"{STORY * 3}{START}{STORY}{END}{STORY * 5}", f"{STORY * 4}{END}{STORY * 5}"),
        (f"{STORY * 10}{START}{STORY}{END}b\n{START}Another.\n{END}c\n", f"{STORY * 10}\n{STORY}\nAnother.\n"),
        (f"{STORY}He said *** START OF THE PROJECT GUTENBERG EBOOK, and left.\n", None),  # within a line
        (f"He wrote: *** END OF THE PROJECT GUTENBERG EBOOK X ***\n{STORY}", None),
        (f"{START}Produced by A\nand B\n\n{STORY}", "\n" + STORY),
        (f"{START}{STORY}Produced by A\n", f"{STORY}Produced by A\n"),
        (f"header\n{START}{STORY}End of Project Gutenberg's X\nlicence\n", STORY),
    ],
)
def test_the_licence_is_cut_at_its_own_lines_and_a_text_that_quotes_them_stays(before, after):
    assert RULES["licence"].apply(before, "on") == (before if after is None else after)


DEEP = {
    "template_tags": ["{{" * 20 + "x" + "}}" * 20, "{%" * 20 + "x" + "%}" * 20, "[" * 20 + "a" + "]()" * 20],
    "entities": ["&" + "amp;" * 12, "&" + "amp;" * 12 + "lt;b&gt;", "&" + "#38;" * 12],
    "tags": ["<b" * 20 + ">" * 20, "<<b>" * 20 + "b>" * 20, "<!--" * 20 + "-->" * 20, "<scr<b>ipt>" * 20],
    "control": ["\x1b[" * 20 + "1m" * 20, "\x1b\x00" * 20 + "[m" * 20, "a\u200d" * 20 + "\u200d" * 20],
    "urls": ["[" * 20 + "a" + "](b)" * 20, "[a](" * 20 + "x" + ")" * 20, "http://a.b" * 20],
    "pii": ["a@b.org" * 20, "4111 1111 1111 1111 " * 20],
    "whitespace": [" \t\n" * 20, "a \n" * 20 + "\n" * 20],
    "emoji": ["1\ufe0f\u20e3" * 20, "👩\u200d" * 20],
}
CASES = [(rule, mode, text) for rule, texts in DEEP.items() for mode in RULES[rule].modes for text in texts]


@pytest.mark.parametrize(("rule", "mode", "text"), CASES, ids=lambda value: repr(value)[:20])
def test_a_rule_applied_twice_is_the_rule_applied_once_however_deep_the_nesting(rule, mode, text):
    once = RULES[rule].apply(text, mode)
    assert RULES[rule].apply(once, mode) == once


@pytest.mark.parametrize(
    ("rule", "text", "left"),
    [
        ("template_tags", "{{" * 20 + "x" + "}}" * 20, "}"),
        ("entities", "&" + "amp;" * 12 + "lt;b", "amp;"),
        ("tags", "<b" * 20 + ">" * 20, ">"),
    ],
)
def test_what_is_nested_deeper_than_the_rounds_loses_the_characters_that_feed_the_rule(rule, text, left):
    found = RULES[rule].apply(text, "on")
    assert not {"{", "&", "<"} & set(found)
    assert left in found, "and no more than these"


@pytest.mark.parametrize(
    ("rule", "repeated"),
    [("front_matter", "---\na: b\n---\n"), ("licence", "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n")],
)
def test_what_is_stacked_is_cut_however_high(rule, repeated):
    text = "x " * 2000
    assert RULES[rule].apply(repeated * 30 + text, "on").strip() == text.strip()


def test_the_profiles_are_these():
    """A golden list: what a profile does changes what every later training sees."""
    prose = (
        "html",
        "entities",
        "newlines",
        "mojibake",
        "control",
        "unicode",
        "front_matter",
        "template_tags",
        "tags",
        "licence",
        "pii",
        "long_words",
        "whitespace",
        BOILERPLATE,
    )
    modes = dict.fromkeys(prose, "on") | {"unicode": "nfc", "pii": "report", BOILERPLATE: "pages"}
    assert list(choose_rules("prose", {}).items()) == [(name, modes[name]) for name in prose]
    assert list(choose_rules("code", {}).items()) == [("newlines", "on"), ("nul", "on"), ("pii", "report")]
    assert choose_rules("raw", {}) == {}
    assert set(PROFILES) == {"prose", "code", "raw"}


@pytest.mark.parametrize("profile", ["prose", "code"])
def test_personal_data_is_counted_and_left_in_the_text_by_default(profile):
    report, text = CleaningReport(), "write to a@b.org and a@c.org, 4111 1111 1111 1111"
    assert clean_text(text, choose_rules(profile, {}), report) == text
    assert clean_text("nothing here", choose_rules(profile, {}), report) == "nothing here"
    assert report.pii == {"email": 1, "card": 1}, "documents, not findings"
    assert clean_text(text, choose_rules(profile, {"pii": "mask"}), CleaningReport()) == (
        "write to <email> and <email>, <card>"
    )


def test_rules_are_switched_by_name_and_mode():
    assert "emoji" not in choose_rules("prose", {})
    changed = choose_rules(
        "prose", {"emoji": True, "urls": "drop", "whitespace": False, "unicode": "nfkc", "tags": "off"}
    )
    assert (changed["emoji"], changed["urls"], changed["unicode"]) == ("drop", "drop", "nfkc")
    assert not {"whitespace", "tags"} & set(changed)
    assert list(changed) == [name for name in [*RULES, BOILERPLATE] if name in changed], "in their order"
    assert choose_rules("raw", {"control": True}) == {"control": "on"}
    for wrong, message in (({"emojis": True}, "no rule 'emojis'"), ({"urls": "hide"}, "no mode 'hide'")):
        with pytest.raises(UsageError) as caught:
            choose_rules("prose", wrong)
        assert message in caught.value.message
        assert caught.value.hint


PAGE = "<!doctype html><p>Use the <code>&lt;div&gt;</code> element and <code>{{ name }}</code>.</p>"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PAGE, "Use the <div> element and {{ name }}."),
        ("Use `<div>` and <b>bold</b>.\n\n```\n<p>{{ x }}</p>\n```\nend <i>now</i>", None),
        ("title = {{Attention is all you need}}, int a[] = {{1, 2}, {3, 4}};", None),
        ("---\nROMEO: But soft!\nIt is the east.\n---\nJULIET: Ay me!", None),
        ("---\ntitle: A\ntags:\n- b\n  - c\n# d\n---\ntext", "text"),
        ("see {{ user.name }}, {{< ref a >}} and ${{ secrets.TOKEN }} now", "see , and now"),
    ],
)
def test_text_about_markup_keeps_what_it_is_about(before, after):
    expected = before.replace("<b>bold</b>", "bold").replace("<i>now</i>", "now") if after is None else after
    assert clean_text(before, choose_rules("prose", {}), CleaningReport()) == expected
