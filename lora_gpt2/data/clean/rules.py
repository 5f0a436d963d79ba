"""Cleaning rules: each one a function from text to text, idempotent, in linear time.

A profile says which rules are on, and the recipe changes that rule by rule. Expressions that could take longer are
RE2's, and so are searches that usually find nothing; it is slow only where it replaces much. Where removing something
can make the same thing anew (`{{ {{x}} }}`), a rule goes on until nothing changes, a limited number of rounds, and then
drops the characters that would feed it.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import re2

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.suggest import suggest
from lora_gpt2.data.clean.html import extract_text
from lora_gpt2.data.clean.pii import mask_pii
from lora_gpt2.renamed_settings import RENAMED_RULES

MAX_ROUNDS = 8
LINE_ENDS = ("\r\n", "\r", "\u2028", "\u2029", "\u0085")
SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
INVISIBLE_PATTERN = (
    r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u180e\u200b\u200c\u200e\u200f\u202a-\u202e"
    r"\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
INVISIBLE = re.compile(INVISIBLE_PATTERN)
HAS_INVISIBLE = re2.compile(
    re.sub(r"\\[xu]([0-9a-f]{2,4})", r"\\x{\1}", INVISIBLE_PATTERN)
)  # much faster where none is
PICTURES = "\u231a-\u23ff\u2600-\u27bf\u2b05-\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
LONE_JOINER = re.compile(f"(?<![{PICTURES}\ufe0f\u200d\u2190-\u21ff])\u200d|\u200d(?=\u200d)")
PICTURE = re.compile(
    f"(?:[0-9#*]\ufe0f?\u20e3|[{PICTURES}](?:[\ufe0f\U0001f3fb-\U0001f3ff]|[\U000e0020-\U000e007f]|\u200d[{PICTURES}"
    "\u2190-\u21ff])*)"
)
ODD_LINE = re.compile("[^\x00-\x7f]{2}|[\u00c2\u00c3\u00e2]|[\x80-\x9f]")
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
FRONT_MATTER = re2.compile(
    r"\A\s*(?:---|\+\+\+)[ \t]*\n\s*[\w.-]+[ \t]*[:=][^\n]*\n"
    r"(?:[ \t]*(?:[\w.\"'-]+[ \t]*[:=][^\n]*|[-#\[\]}][^\n]*|[ \t][^\n]*|)\n)*?(?:---|\+\+\+)[ \t]*(?:\n|\z)"
)
TEMPLATE = re.compile(
    r"\$?\{\{(?:[<%#/!&^~>-][^{}]*|[^{}|]*\|[^{}]*|\s*[A-Za-z_][\w.]*\([^{}]*\)\s*)\}\}"
    r"|(?<!\w)\$?\{\{\s*(?:[A-Za-z_][\w.$\[\]'\"()-]*)?\s*\}\}|\{%[^{}]*%\}|\{#[^{}]*#\}"
)
FENCE = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,})([^\n]*)$", re.MULTILINE)
LONGEST_TILDES = 5  # more of them with nothing behind are a line between parts
CODE_SPAN = re.compile(r"`[^`\n]+`")
MARKUP = ("entities", "template_tags", "tags")
"""Rules that a page of HTML has gone through when its text is taken: what looks like markup in it is text."""
LINK_TO_NOTHING = re.compile(r"!?\[([^\[\]\n]*)\]\(\s*\)")
NAMES = (
    "a|abbr|acronym|address|article|aside|b|big|blockquote|body|br|caption|center|cite|code|col|colgroup|dd|del|details|dfn"
    "|div|dl|dt|em|figcaption|figure|font|footer|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|li|link|main|mark"
    "|meta|nav|ol|p|picture|pre|q|s|samp|section|small|source|span|strike|strong|sub|summary|sup|table|tbody|td|tfoot|th"
    "|thead|title|tr|tt|u|ul|var|video|wbr"
)
HIDDEN = [  # one by one: together, one that is never closed would be looked for again after each of the others
    re2.compile(p)
    for p in (r"(?s)<!--.*?-->", r"(?is)<script\b[^<>]*>.*?</script\s*>", r"(?is)<style\b[^<>]*>.*?</style\s*>")
]
BREAK = re.compile(r"(?i)<(?:br|hr)\s*/?>|</(?:p|div|li|tr|h[1-6]|table|ul|ol|dl|blockquote|pre|section|article)\s*>")
TAG = re.compile(rf"(?i)</?(?:{NAMES})(?:\s[^<>]*)?/?>")
LICENCE_BEGIN = re2.compile(
    r"(?im)^[ \t]*(?:\*{3}[ ]?START OF (?:THIS|THE) PROJECT GUTENBERG[^\n]*|\*END\*? ?THE SMALL PRINT![^\n]*"
    r"|\*\*\* START: FULL LICENSE[^\n]*)\n?"
)
BOOK_BEGIN = re2.compile(r"(?im)^[ \t]*\*{3}[ ]?START OF (?:THIS|THE) PROJECT GUTENBERG")
SHORT_HEADER, LONGEST_HEADER = 500, 20_000  # characters, of one that does not name the project and of one that does
LICENCE_END = re2.compile(
    r"(?im)^[ \t]*(?:\*{3}[ ]?END OF (?:THIS|THE) PROJECT GUTENBERG[^\n]*"
    r"|End of (?:the |this )?Project Gutenberg[^\n]*)\n?"
)
CREDITS = re2.compile(
    r"(?i)\A\s*(?:Produced by|E-?text prepared by|This e-?text was (?:produced|prepared) by)[^\n]*\n(?:[^\n]+\n)*"
)
URL = re.compile(r"""(?i)\b(?:https?://|ftp://|www\.)[^\s<>"`\[\](){}]*[^\s<>"`\[\](){}.,;:!?']""")
LINK = re.compile(r"(!?)\[([^\[\]\n]*)\]\([^()\s]+(?:\s+\"[^\"\n]*\")?\)")
LONG_WORD, HAS_LONG_WORD = re.compile(r"(?<!\S)[!-~]{1001,}(?!\S)"), re2.compile(r"[!-~]{1000}")
HEX, LEAST_ENCODED = frozenset("0123456789abcdefABCDEF"), 40
LINE_END_BLANKS, BLANKS = re.compile(r"(?<![ \t])[ \t]++(?=\n|\Z)"), re.compile(r"(?<=\S)(?:[ \t]{2,}|\t)")
HAS_ODD_BLANKS, GAP = re2.compile(r"[ \t]\n|[^\s][ \t]{2}|[^\s]\t"), re.compile(r"\n{3,}")


def _until_stable(step: Callable[[str], str], text: str, feed: str) -> str:
    """Returns what `step` makes of a text when it changes nothing more; after `MAX_ROUNDS`, without `feed`."""
    for _ in range(MAX_ROUNDS):
        changed = step(text)
        if changed == text:
            return text
        text = changed
    for character in feed:
        text = text.replace(character, "")
    return text


def _shorten(cut: Callable[[str], str], text: str) -> str:
    """Returns what remains of a text when there is nothing more to cut from it."""
    while len(shorter := cut(text)) < len(text):
        text = shorter
    return text


def read_page(text: str, _mode: str = "on") -> str:
    """Returns the text of a web page: paragraphs and `<pre>`, without navigation, scripts and styles."""
    return extract_text(text)


def normalize_newlines(text: str, _mode: str = "on") -> str:
    """Returns the text with every line end as a line feed."""
    for end in LINE_ENDS:
        text = text.replace(end, "\n")
    return text


def drop_nul(text: str, _mode: str = "on") -> str:
    """Returns the text without NUL characters."""
    return text.replace("\0", "")


def fix_mojibake(text: str, _mode: str = "on") -> str:
    """Returns the text with what was decoded wrongly decoded again, line by line, where `ftfy` is sure."""
    if text.isascii():
        return text
    import ftfy

    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.isascii() and ODD_LINE.search(line):
            lines[number] = _until_stable(ftfy.fix_encoding, line, "")
    return "\n".join(lines)


def drop_control(text: str, _mode: str = "on") -> str:
    """Returns the text without control and invisible characters; what joins emoji, tabs and line feeds stay."""
    if HAS_INVISIBLE.search(text):
        text = _until_stable(lambda text: INVISIBLE.sub("", text), text, "\x1b")
    return _until_stable(lambda text: LONE_JOINER.sub("", text), text, "\u200d") if "\u200d" in text else text


def normalize_unicode(text: str, mode: str = "nfc") -> str:
    """Returns the text in Unicode normal form C, or KC, which also makes full-width letters and ligatures plain."""
    return unicodedata.normalize("NFKC" if mode == "nfkc" else "NFC", text)


def straighten_quotes(text: str, _mode: str = "on") -> str:
    """Returns the text with straight quotation marks."""
    import ftfy.fixes

    return ftfy.fixes.uncurl_quotes(text)


def decode_entities(text: str, _mode: str = "on") -> str:
    """Returns the text with `&#8217;` and `&amp;` as the characters they stand for."""
    if "&" not in text:
        return text
    return _until_stable(lambda text: ENTITY.sub(lambda match: html.unescape(match[0]), text), text, "&")


def drop_front_matter(text: str, _mode: str = "on") -> str:
    """Returns the text without the settings that static site generators keep at its top."""
    if not text.lstrip().startswith(("---", "+++")):
        return text
    return _shorten(lambda text: str(FRONT_MATTER.sub("", text, count=1)), text)


def drop_template_tags(text: str, _mode: str = "on") -> str:
    """Returns the text without template tags such as `{{< ref >}}`, and links that led only to one as their text."""
    if "{" not in text:
        return text
    return _until_stable(
        lambda text: _outside_code(lambda part: LINK_TO_NOTHING.sub(r"\1", TEMPLATE.sub("", part)), text), text, "{"
    )


def drop_tags(text: str, _mode: str = "on") -> str:
    """Returns the text without HTML tags and comments; where a block or line ended, a line ends."""
    if "<" not in text:
        return text
    return _until_stable(
        lambda text: _outside_code(lambda part: TAG.sub("", BREAK.sub("\n", _drop_hidden(part))), text), text, "<"
    )


def _outside_code(change: Callable[[str], str], text: str) -> str:
    """Returns the text with everything changed but code in Markdown: spans and fenced blocks."""
    if "`" not in text and "~~~" not in text:
        return change(text)
    parts, end = list[str](), 0
    for begin, after in (*_find_fenced(text), (len(text), len(text))):
        for code in CODE_SPAN.finditer(text, end, begin):
            parts += [change(text[end : code.start()]), code[0]]
            end = code.end()
        parts += [change(text[end:begin]), text[begin:after]]
        end = after
    return "".join(parts)


def _find_fenced(text: str) -> list[tuple[int, int]]:
    """Returns where fenced blocks of Markdown begin and end (CommonMark 4.5); a fence that is never closed is text."""
    fences = [(found.span(), found[1][0], len(found[1]), found[2].strip()) for found in FENCE.finditer(text)]
    longest, closed = {"`": 0, "~": 0}, list[bool]()
    for _, mark, length, info in reversed(fences):
        closed.append(longest[mark] >= length and not (mark == "~" and length > LONGEST_TILDES and not info))
        longest[mark] = max(longest[mark], 0 if info else length)
    found, opened = list[tuple[int, int]](), None
    for (span, mark, length, info), is_closed in zip(fences, reversed(closed), strict=True):
        if opened is None:
            opened = (span[0], mark, length) if is_closed else None
        elif mark == opened[1] and length >= opened[2] and not info:
            found.append((opened[0], span[1]))
            opened = None
    return found


def _drop_hidden(text: str) -> str:
    if "<!--" in text or "</" in text:
        for pattern in HIDDEN:
            text = str(pattern.sub("", text))
    return text


def drop_licence(text: str, _mode: str = "on") -> str:
    """Returns a Project Gutenberg book without the licence around it."""
    if "Gutenberg" not in text and "GUTENBERG" not in text:
        return text
    return _shorten(_cut_licence, text)


def _split_books(text: str) -> list[str]:
    """Returns the books of a file that holds several, each from its mark on, after what stands before the first."""
    begins = [found.start() for found in BOOK_BEGIN.finditer(text)]
    parts = [text[start:end] for start, end in pairwise([*begins, len(text)])]
    if len(parts) < 2 or not all(LICENCE_END.search(part) for part in parts[:-1]):
        return [text]
    return parts if _is_header(text[: begins[0]]) else [text[: begins[0]], *parts]


def _is_header(text: str) -> bool:
    """True for what stands before a book: hardly anything, or a page that names the project."""
    return len(text) < SHORT_HEADER or (len(text) < LONGEST_HEADER and "gutenberg" in text.lower())


def _cut_licence(text: str) -> str:
    if len(books := _split_books(text)) > 1:
        return "\n\n".join(_cut_licence(book).strip("\n") for book in books) + "\n"
    begin, is_book = LICENCE_BEGIN.search(text), False
    if begin and begin.start() < len(text) / 2:
        head, text = text[: begin.start()], str(CREDITS.sub("", text[begin.end() :], count=1))
        is_book = _is_header(head)
        text = text if is_book else head + text
    end = LICENCE_END.search(text)
    if end and (is_book or len(text) - end.end() < SHORT_HEADER or "gutenberg" in text[end.end() :].lower()):
        return text[: end.start()]
    return text


def replace_emoji(text: str, mode: str = "drop") -> str:
    """Returns the text without emoji and pictographs, or with their names, as in `:grinning_face:`."""
    if text.isascii():
        return text
    return PICTURE.sub((lambda match: _name_picture(match[0])) if mode == "name" else "", text)


@lru_cache(maxsize=4096)
def _name_picture(picture: str) -> str:
    names = [unicodedata.name(c, "") for c in picture if not ("\U0001f3fb" <= c <= "\U0001f3ff" or c in "\ufe0f\u200d")]
    shown = "_".join(re.sub(r"[^a-z0-9]+", "_", name.lower()) for name in names if name and "TAG " not in name)
    return f":{shown}:" if shown else ""


def redact_urls(text: str, mode: str = "mask") -> str:
    """Returns the text with web addresses dropped or masked as `<url>`, and Markdown links as their text."""
    if "](" not in text and "://" not in text and "www." not in text.lower():
        return text
    mask = "<url>" if mode == "mask" else ""

    def change(text: str) -> str:
        text = LINK.sub(lambda match: "" if match[1] else match[2], text)
        return URL.sub(mask, text)

    return _until_stable(change, text, "[/")


def redact_pii(text: str, mode: str = "report") -> str:
    """Returns the text with personal data masked, as in `<email>`; with `report`, as it is."""
    return _until_stable(mask_pii, text, "") if mode == "mask" else text


def drop_long_words(text: str, _mode: str = "on") -> str:
    """Returns the text without encoded data: runs of over 1,000 ASCII characters that look like base64, hex or hashes.

    Scripts without spaces, and sequences over a small alphabet (DNA, proteins, moves of a game), stay.
    """
    return LONG_WORD.sub(lambda match: "" if _is_encoded(match[0]) else match[0], text) if _has_long(text) else text


def _has_long(text: str) -> bool:
    return HAS_LONG_WORD.search(text) is not None


def _is_encoded(run: str) -> bool:
    """True for hexadecimal digits, and for a mixture of upper case, lower case and digits from most of the alphabet."""
    used = set(run)
    kinds = [any(low <= c <= high for c in used) for low, high in ("09", "az", "AZ")]
    return (all(kinds) and len(used) >= LEAST_ENCODED) or (kinds[0] and used <= HEX and len(used) > len("ACGTN"))


def normalize_whitespace(text: str, _mode: str = "on") -> str:
    """Returns the text with plain single spaces between words, one blank line between paragraphs, indents as they are.

    Nothing stands at line ends, at the beginning or at the end.
    """
    text = text if text.isascii() else SPACES.sub(" ", text)
    if HAS_ODD_BLANKS.search(text):
        text = BLANKS.sub(" ", LINE_END_BLANKS.sub("", text))
    return GAP.sub("\n\n", text).strip()


@dataclass(frozen=True)
class Rule:
    """A rule and its modes, the first of which is what `true` means."""

    apply: Callable[[str, str], str]
    modes: tuple[str, ...] = ("on",)


RULES: dict[str, Rule] = {
    "html": Rule(read_page),
    "entities": Rule(decode_entities),
    "newlines": Rule(normalize_newlines),
    "nul": Rule(drop_nul),
    "mojibake": Rule(fix_mojibake),
    "control": Rule(drop_control),
    "unicode": Rule(normalize_unicode, ("nfc", "nfkc")),
    "quotes": Rule(straighten_quotes),
    "front_matter": Rule(drop_front_matter),
    "template_tags": Rule(drop_template_tags),
    "tags": Rule(drop_tags),
    "licence": Rule(drop_licence),
    "emoji": Rule(replace_emoji, ("drop", "name")),
    "urls": Rule(redact_urls, ("mask", "drop")),
    "pii": Rule(redact_pii, ("report", "mask")),
    "long_words": Rule(drop_long_words),
    "whitespace": Rule(normalize_whitespace),
}  # in the order in which they are applied
BOILERPLATE = "boilerplate"  # lines that most documents begin or end with; needs to have seen them, see `boilerplate`
BOILERPLATE_MODES = ("all", "pages")
"""Of all documents, or of those that were web pages."""
PROFILES: dict[str, tuple[str, ...]] = {  # a rule, or rule:mode where it is not the first of its modes
    "prose": (
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
        f"{BOILERPLATE}:pages",
    ),
    "code": ("newlines", "nul", "pii"),
    "raw": (),
}


def choose_rules(profile: str, changes: Mapping[str, bool | str]) -> dict[str, str]:
    """Returns the rules that are on, in order, with their modes; raises `UsageError` for one that does not exist."""
    known = {**{name: rule.modes for name, rule in RULES.items()}, BOILERPLATE: BOILERPLATE_MODES}
    chosen = {name: mode or known[name][0] for rule in PROFILES[profile] for name, _, mode in [rule.partition(":")]}
    for name, wanted in changes.items():
        if name not in known:
            new = RENAMED_RULES.get(name)
            raise UsageError(
                f"data.rules: there is no rule '{name}'", f"it is called {new} now" if new else suggest(name, known)
            )
        off = wanted in (False, "off", "keep")
        mode = known[name][0] if wanted is True or wanted == "on" else str(wanted)
        if not off and mode not in known[name]:
            modes = ", ".join((*known[name], "off"))
            raise UsageError(f"data.rules.{name}: there is no mode '{mode}'", f"its modes are {modes}")
        chosen.pop(name, None)
        if not off:
            chosen[name] = mode
    return {name: chosen[name] for name in known if name in chosen}
