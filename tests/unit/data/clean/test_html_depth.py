import time

import pytest

from lora_gpt2.data.clean.html import MAX_DEPTH, extract_text
from lora_gpt2.data.clean.html_depth import measure_depth, strip_tags


@pytest.mark.parametrize(
    ("page", "depth"),
    [
        ("<html><body><p>a<p>b<ul><li>c<li>d</ul>", 1),
        ("<div><b>x</b><br><i>y</i></div>", 2),
        ("<a><p><b>" * 3, 6),
        ("<i><div></i>" * 4, 5),
        ("</div></div><div>", 1),
        ("<div></span></b></x><div>", 2),
        ("<script>'<div><div><div>'</script><div>", 1),
        ("<svg><path d=x /><path/><g><rect/></g></svg>", 2),
        ("<div/><div/><div/>", 3),
        ("<svg><div/><foo/><foo/>", 3),
    ],
)
def test_depth_is_counted_as_a_parser_nests(page, depth):
    assert measure_depth(page) == depth


def test_what_lies_between_tags_is_left():
    page = "<h1>One &amp; two</h1><script>a<b</script><p>Th<b>re</b>e<br>four"
    assert strip_tags(page) == "One & two\nThree\nfour"


@pytest.mark.parametrize("unit", ["<a><p><b>", "<a><div>", "<i><div></i>", "<svg><div/><foo/>", "<table><a>"])
def test_a_page_that_nests_without_end_takes_no_longer_than_others(unit):
    page = "<!doctype html><body>begin " + unit * (540_000 // len(unit)) + "end"
    assert measure_depth(page) > MAX_DEPTH
    started = time.process_time()
    text = extract_text(page)
    assert time.process_time() - started < 3
    assert text.split() == ["begin", "end"]


def test_a_page_of_usual_depth_is_read_by_the_parser():
    inside = "<div>" * (MAX_DEPTH // 2) + "deep" + "</div>" * (MAX_DEPTH // 2)
    page = f"<!doctype html><body><nav><a href=x>menu</a></nav>{inside}<p>text</p>"
    assert extract_text(page).split() == ["deep", "text"]
