"""A web page to its text, through resiliparse: navigation, scripts and styles gone, paragraphs and `<pre>` kept.

What is boilerplate is told by the page's own markup (elements, roles, class names) and by the share of its letters
that are links (Kohlschütter et al. 2010), and nothing that holds half of the page is taken for it; a classifier of
"main content" loses whole articles on plain pages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lora_gpt2.data.clean.html_depth import measure_depth, strip_tags

GONE = (
    "script, style, noscript, template, svg, math annotation, iframe, object, canvas, head, nav, form, button, dialog, "
    "a.headerlink, [role=navigation], [role=search], [role=banner], [role=contentinfo], [aria-hidden=true], [hidden]"
)
SUSPECT = "header, footer, aside, div, section, ul, ol, table, td, p, center"
BOILERPLATE = re.compile(
    r"(?:^|[\s_-])(?:nav|navi|navbar|navigation|navheader|navfooter|menu|menubar|sidebar|sphinxsidebar|breadcrumbs?"
    r"|footer|header|related|toc|share|social|cookies?|advert|ads|search|searchbox|skip|pager|topsection|quickview"
    r"|bottomlang|toplang)(?:$|[\s_-])",
    re.I,
)
LINK_SHARE, MIN_LINKS = 0.7, 3
MARK = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html[\s>])", re.I)
LIST_TAG = re.compile(r"</?[uo]l\b", re.I)
MAX_DEPTH = 1000  # browsers stop at 512
MAX_LIST_DEPTH = 100
MAX_ROUNDS, MAX_CLIMB, MAX_WEIGHED = 8, 6, 20


def looks_like_page(text: str) -> bool:
    """True if a text begins as a web page does."""
    return MARK.match(text) is not None


def extract_text(text: str) -> str:
    """Returns the text of a page, and any other text as it is."""
    rounds = 0
    while looks_like_page(text):  # the text of a page may be a page
        if rounds == MAX_ROUNDS:
            return text.replace("<", "")
        text = _extract(text) if measure_depth(text) <= MAX_DEPTH else strip_tags(text)
        rounds += 1
    return text


def _extract(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(page)
    if tree.body is None:
        return ""
    _remove(tree.body.query_selector_all(GONE)[:])  # iterated, the collection would be searched anew at each step
    _remove(_find_boilerplate(tree.body))
    keep_form = _measure_list_depth(page) <= MAX_LIST_DEPTH  # each level indents all that is inside it
    return str(extract_plain_text(tree, preserve_formatting=keep_form, main_content=False, alt_texts=False)).strip()


def _measure_list_depth(page: str) -> int:
    depth = deepest = 0
    for match in LIST_TAG.finditer(page):
        depth = max(0, depth - 1) if match[0].startswith("</") else depth + 1
        deepest = max(deepest, depth)
    return deepest


def _remove(elements: Iterable[Any]) -> None:
    for element in elements:
        if element.parent is not None:
            element.parent.remove_child(element)


def _find_boilerplate(body: Any) -> list[Any]:
    """Returns the elements that are boilerplate, each less than half of the page.

    Only what has the name of it, or links close below, is weighed, and at most `MAX_WEIGHED` times the page in all, so
    that deeply nested pages take no longer than others.
    """
    whole = len(body.text)
    budget = MAX_WEIGHED * whole
    link_letters, num_links = Counter[Any](), Counter[Any]()
    level = [(link.parent, len(link.text), 1) for link in body.get_elements_by_tag_name("a")[:]]
    for _ in range(MAX_CLIMB):  # from the links upwards, siblings together
        lengths, counts = Counter[Any](), Counter[Any]()
        for node, length, count in level:
            if node is not None and node != body:
                lengths[node] += length
                counts[node] += count
        link_letters.update(lengths)
        num_links.update(counts)
        level = [(node.parent, lengths[node], counts[node]) for node in lengths]
    found = []
    for element in body.query_selector_all(SUSPECT)[:]:
        is_named = element.tag == "footer" or BOILERPLATE.search(f"{element.id} {element.getattr('class') or ''}")
        if is_named or num_links[element] >= MIN_LINKS:
            letters = len(element.text)
            budget -= letters
            if budget < 0:
                break
            if letters * 2 < whole and (is_named or link_letters[element] >= LINK_SHARE * letters):
                found.append(element)
    return found
