"""The web page in a real browser."""

import re

import numpy as np
import pytest

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.core.pages import render_page
from lora_gpt2.evaluation.map import AdapterMap, build_map_page, scale_distances
from lora_gpt2.evaluation.report import build_matrix_page
from lora_gpt2.evaluation.token_page import build_token_page
from lora_gpt2.evaluation.token_scores import TokenScores
from lora_gpt2.inference.history import LocalLog, read_log
from lora_gpt2.inference.session import Session
from lora_gpt2.rating.votes import read_marks, read_votes
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.api import Server
from lora_gpt2.serving.middleware import Access
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter, make_text
from tests.serving import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def port(base, store, tmp_path):
    for seed, name in enumerate(("law", "code", "prose", "verse"), start=1):
        figures = {"base_perplexity": 300.0, "validation_perplexity": 100.0 + seed}
        recipe = {"description": "<b>Laws</b> & orders"}
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(figures=figures, recipe=recipe))
    choices = LocalLog(tmp_path / "choices.jsonl", SilentReporter())
    server = Server(
        session=Session(base, store),
        defaults=GenerateSettings(),
        limits=ServeSettings(),
        access=Access(is_local=True),
        vote_log=choices,
    )
    with serving(server) as number:
        yield number
    server.job.close()


@pytest.fixture
def page(browser, port):
    found = browser.new_page(viewport={"width": 1200, "height": 900})
    problems = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    found.goto(f"http://127.0.0.1:{port}/")
    found.wait_for_selector(".adapter")
    yield found
    found.close()
    assert [problem for problem in problems if "409 (Conflict)" not in problem] == []  # which the page explains


def finish(page):
    page.wait_for_selector("#status[data-state=done]", timeout=30_000)


def test_continuations_stream_side_by_side_by_keyboard_alone(page, shoot):
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("the cat")
    assert page.locator(".adapter[aria-pressed=true]").all_text_contents()[0].startswith("code"), (
        "one is chosen, the first"
    )
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the base, code, which is chosen, law, prose
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Control+Enter")
    finish(page)
    shoot(page, "plain")
    assert page.locator("article h2 span:first-child").all_inner_texts() == ["code", "law", "prose"], "as the cards"
    texts = page.locator("article pre").all_text_contents()
    assert all(text.startswith("the cat") and len(text) > 20 for text in texts)
    assert texts[0] != texts[1]
    assert "@1 (" in page.locator(".origin").first.inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("article").nth(1).locator("button:has-text('Copy')").click()
    page.wait_for_selector("button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == texts[1]
    page.locator("article").nth(1).locator("button:has-text('Continue from here')").click()
    assert page.input_value("#prompt") == texts[1]
    assert page.locator(".adapter[aria-pressed=true]").count() == 1
    assert page.locator(".adapter small").first.inner_text().endswith("without an adapter")
    assert "<b>Laws</b> & orders" in page.locator(".adapter").nth(1).inner_text(), "text stays text"


def test_a_seed_repeats_and_colours_show_perplexity(page, shoot):
    page.click("summary")
    page.fill("#seed", "7")
    page.check("#colour")
    seen = []
    for _ in range(2):
        page.click("#go")
        finish(page)
        seen.append(page.locator("article pre").all_text_contents())
    shoot(page, "coloured")
    assert seen[0] == seen[1]
    assert page.locator("article pre span[class^=s]").count() > 20
    text = page.locator("article pre").first
    text.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("article .readout").first.inner_text()
    assert re.fullmatch(r'".*" had [\d.]+ % \([\d.]+ nats\); others: (".*" [\d.]+ %(, )?){4}', first)
    text.locator("span[class^=s]").nth(3).hover()
    assert page.locator("article .readout").first.inner_text() != first
    assert text.locator(".told").count() == 1
    assert page.locator("article h2 .quiet").first.inner_text().startswith("perplexity")
    assert page.locator("#legend").is_visible()


def break_off(page):
    page.evaluate(
        "() => { window.real = fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch')); }"
    )


def choose(page, *names):
    for card in page.locator(".adapter").all():
        if (card.get_attribute("aria-pressed") == "true") != (card.get_attribute("data-id") in names):
            card.click()


def test_blind_mode_hides_names_until_one_is_chosen_which_is_recorded(page, tmp_path, shoot):
    choose(page, "base", "code", "law")
    page.click("summary")
    page.select_option("#judge", "best")
    page.click("#go")
    page.wait_for_selector("article button")
    shoot(page, "blind")
    names = page.locator("article h2 span:first-child")
    assert names.all_inner_texts() == ["Text A", "Text B", "Text C"]
    assert not page.locator(".origin").first.is_visible()
    break_off(page)
    page.locator("article button").nth(1).click()
    page.wait_for_selector("#status:has-text('the names stay hidden')")
    assert names.all_inner_texts() == ["Text A", "Text B", "Text C"]
    page.evaluate("() => { window.fetch = window.real; }")
    page.locator("article button").nth(1).click()
    page.wait_for_selector("article.best")
    assert sorted(names.all_inner_texts()) == ["base", "code", "law"]
    assert page.locator("article.best").count() == 1
    page.wait_for_selector("#status:has-text('rate --recorded page')")
    (choice,) = read_votes(read_log(tmp_path / "choices.jsonl"))
    assert len(choice.texts) == len(choice.models)
    assert all(text and not text.startswith(choice.prompt) for text in choice.texts)
    best = page.locator("article.best h2 span:first-child").inner_text()
    assert choice.chosen == ("base" if best == "base" else f"{best}@1")
    assert sorted(choice.models) == ["base", "code@1", "law@1"]


def give(page, given):
    for criterion, marks in given.items():
        for card, mark in zip(page.locator("article").all(), marks, strict=True):
            if mark is not None:
                card.locator("fieldset", has_text=criterion).get_by_text(str(mark), exact=True).click()


def test_texts_are_rated_from_1_to_5_blind_and_the_marks_are_recorded(page, tmp_path, shoot, check_accessible):
    choose(page, "code", "law")
    page.click("summary")
    page.select_option("#judge", "marks")
    page.click("#go")
    page.wait_for_selector("button.done")
    assert page.locator("article h2 span:first-child").all_inner_texts() == ["Text A", "Text B"]
    assert page.locator("#history").inner_text().endswith("not judged"), "the order of the texts is told nowhere"
    given = {"coherence": (4, 2), "style": (5, 5), "fluency": (None, 1)}
    give(page, given)
    shoot(page, "marks")
    check_accessible(page)
    page.click("#history button")
    assert page.locator("article h2 span:first-child").all_inner_texts() == ["Text A", "Text B"], "still blind"
    page.click("button.done")
    assert page.inner_text("#status") == "give one mark at least"
    assert page.locator("article h2 span:first-child").all_inner_texts() == ["Text A", "Text B"]
    give(page, given)
    page.click("button.done")
    page.wait_for_selector("#status:has-text('--mode scale')")
    names = page.locator("article h2 span:first-child").all_inner_texts()
    assert sorted(names) == ["code", "law"]
    assert page.locator("#history").inner_text().endswith(", ".join(names))
    (found,) = read_marks(read_log(tmp_path / "choices.jsonl"))
    assert list(found.models) == [f"{name}@1" for name in names]
    assert found.marks == {"coherence": (4, 2), "relevance": (None, None), "fluency": (None, 1), "style": (5, 5)}
    assert len(found.texts) == 2


def test_the_session_can_be_undone_and_is_kept_over_a_reload(page, shoot):
    seen = []
    for prompt in ("the cat", "a dog"):
        page.fill("#prompt", prompt)
        page.click("#go")
        finish(page)
        seen.append(page.locator("article pre").inner_text())
        page.evaluate("document.getElementById('status').dataset.state = ''")
    assert page.locator("#history li").count() == 2
    page.locator("article button:has-text('Continue from here')").click()
    page.click("#undo")
    assert page.input_value("#prompt") == "a dog", "what was typed since goes first"
    page.click("#undo")
    assert page.input_value("#prompt") == "the cat"
    assert page.locator("article pre").inner_text() == seen[0]
    assert page.locator("#undo").is_disabled()
    page.click("#redo")
    assert page.locator("article pre").inner_text() == seen[1]
    shoot(page, "history")
    page.reload()
    page.wait_for_selector("#history li")
    page.locator("#history button").last.click()
    assert page.locator("article pre").inner_text() == seen[0]
    page.locator("article button:has-text('Continue from here')").click()
    assert page.input_value("#prompt") == seen[0]


def test_what_cannot_be_judged_or_sent_is_said(page):
    page.click("summary")
    page.select_option("#judge", "best")
    page.click("#go")
    assert "choose two or more" in page.inner_text("#status")
    page.select_option("#judge", "marks")
    page.check("#colour")
    page.click("#go")
    page.wait_for_selector("button.done")
    assert page.locator("article h2 .quiet").inner_text() == "", "its perplexity would tell who wrote it"
    page.fill("#seed", "-5")
    page.click("summary")
    page.click("#go")
    assert page.locator("#seed").is_visible(), "the settings open, where the fault is"


def test_a_prompt_that_is_cut_says_so(page):
    page.fill("#prompt", "the cat " * 60)
    page.click("#go")
    finish(page)
    assert re.search(r"the first \d+ tokens of the prompt were not read", page.inner_text("article .origin"))


def test_auto_says_how_sure_it_is(page):
    choose(page, "auto")
    page.click("#go")
    finish(page)
    assert re.fullmatch(r"auto → (base|\w+ \(\d+ %\))", page.locator("article h2 span:first-child").inner_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, port, check_accessible, scheme):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector(".adapter")
    choose(page, "base", "code", "law")
    page.click("summary")
    page.check("#colour")
    page.check("#mixes")
    page.click("#go")
    finish(page)
    check_accessible(page)
    page.goto(f"http://127.0.0.1:{port}/training/")
    check_accessible(page)
    page.close()


def test_a_text_becomes_an_adapter_on_the_page(page, tmp_path, shoot, check_accessible):
    page.get_by_role("link", name="Training").click()
    (tmp_path / "plays.jsonl").write_text(make_text(60))
    page.click("#plan")
    assert page.locator("#name:invalid").count() == 1, "it needs a name"
    page.fill("#name", "plays")
    page.fill("#steps", "400")
    page.uncheck("#forget")
    page.click("#plan")
    assert "choose a file, or paste some text" in page.inner_text("#said")
    page.set_input_files("#file", tmp_path / "plays.jsonl")
    page.click("#plan")
    page.wait_for_selector("#train:visible", timeout=20_000)
    assert "plays.jsonl becomes plays on" in page.inner_text("#said")
    assert page.locator("#planned .figures div").count() == 4
    shoot(page, "plan")
    check_accessible(page)
    page.click("#train")
    page.wait_for_selector("#said a:has-text('watch it')", timeout=60_000)
    with page.expect_navigation():
        page.click("#said a")
    page.wait_for_selector("#charts path.train", state="attached")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Stop all and keep").click()
    page.wait_for_selector("#state:has-text('published plays@1')", timeout=60_000)
    page.go_back()
    page.wait_for_selector("#said:has-text('plays@1: validation perplexity')", timeout=60_000)
    assert page.locator("#runs tbody tr").first.inner_text().startswith("plays")
    shoot(page, "trained")
    page.click("#said a:has-text('write with it')")
    page.wait_for_selector(".adapter[aria-pressed=true]")
    assert page.locator(".adapter[aria-pressed=true]").get_attribute("data-id") == "plays"
    page.click("#go")
    finish(page)
    assert page.locator("article .origin").inner_text().startswith("plays@1 (")


def test_a_tab_trains_what_it_shows_though_another_one_plans_something_else(page, tmp_path):
    page.get_by_role("link", name="Training").click()
    other = page.context.browser.new_context().new_page()
    other.goto(page.url)
    for tab, name in ((page, "mine"), (other, "theirs")):
        (tmp_path / f"{name}.jsonl").write_text(make_text(60))
        tab.fill("#name", name)
        tab.fill("#steps", "30")
        tab.uncheck("#forget")
        tab.set_input_files("#file", tmp_path / f"{name}.jsonl")
    page.click("#plan")
    page.wait_for_selector("#said:has-text('mine.jsonl becomes mine')", timeout=20_000)
    page.evaluate("clearTimeout(polling)")  # so that it does not hear of the other one
    other.click("#plan")
    other.wait_for_selector("#said:has-text('theirs.jsonl becomes theirs')", timeout=20_000)
    page.click("#train")
    page.wait_for_selector("#said:has-text('another plan was made meanwhile: plan again')")
    page.fill("#steps", "20")
    page.click("#plan")
    page.wait_for_selector("#said:has-text('mine.jsonl becomes mine')", timeout=20_000)
    other.close()


def test_the_keyboard_asks_for_what_the_button_asks_for(page):
    page.click("summary")
    page.fill("#seed", "-5")
    page.locator("#prompt").press("Control+Enter")
    assert page.locator("#seed:invalid").count() == 1
    assert page.locator("article").count() == 0


def test_a_text_that_cannot_be_trained_on_says_why(page):
    page.get_by_role("link", name="Training").click()
    page.fill("#name", "tiny")
    page.fill("#text", "one word")
    page.click("#plan")
    page.wait_for_selector("#said:has-text(';')", timeout=60_000)
    assert page.locator("#train").is_hidden()
    assert "Traceback" not in page.inner_text("main")


def test_a_mix_and_what_is_wrong_with_one(page, shoot):
    choose(page)
    page.click("#go")
    assert "choose an adapter" in page.locator("#status[data-state=error]").inner_text()
    page.fill("#mix", "law:0.6+code:0.4")
    page.click("#go")
    finish(page)
    assert page.locator("article h2 span:first-child").all_inner_texts() == ["law:0.6+code:0.4"]
    page.fill("#mix", "")
    choose(page, "base", "code", "law")
    page.check("#mixes")
    sliders = page.locator("#weights input")
    assert sliders.count() == 2, "the base has no weight"
    sliders.first.fill("0.8")
    shoot(page, "mix")
    page.click("#go")
    finish(page)
    assert page.locator("article h2 span:first-child").all_inner_texts() == ["base", "code:0.8+law:0.5"]


def test_an_error_is_said(page, port):
    page.fill("#mix", "nobody")
    refusal = """'{"error": {"message": "no such adapter"}}', {status: 404}"""
    page.evaluate(f"window.fetch = () => Promise.resolve(new Response({refusal}))")
    page.click("#go")
    page.wait_for_selector("#status[data-state=error]")
    assert page.locator("#status").inner_text() == "no such adapter"
    assert "no such adapter" in page.locator("article.failed").last.inner_text(), "in its own column, too"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_in_light_and_dark(browser, port, scheme, shoot):
    page = browser.new_page(viewport={"width": 375, "height": 720}, color_scheme=scheme)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector(".adapter")
    page.click("#go")
    finish(page)
    shoot(page, f"phone-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off at the side"
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, ground) > 7
    quiet, card = (
        page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in ((".quiet", "color"), ("form", "backgroundColor"))
    )
    assert contrast(quiet, card) > 4.5
    page.close()


def build_preparation():
    long = "word" * 60
    rows = [(long, long, 12345678)] * 3
    values = {"title": long, "sources": long, "figures": [("1,234", "documents")] * 5, "rules": [], "examples": rows}
    empty = {"rejected": [], "near_duplicates": [], "pii": [], "settings": [("a", long)]}
    return render_page("preparation.html", **values, **empty)


def build_map():
    points = np.random.default_rng(0).normal(size=(9, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    coordinates, shown = scale_distances(distances)
    names = ("base", *(f"a-name-that-is-long-{index}" for index in range(8)))
    found = AdapterMap(
        by="updates", names=names, distances=distances, cosines=distances, coordinates=coordinates, shown=shown
    )
    return build_map_page(found, "nano")


def build_matrix():
    cells = []
    for adapter in ("base", "law", "code"):
        for source in ("law", "code"):
            value = 40.0 if adapter == source else 130.0
            figures = {
                "perplexity": value,
                "word_perplexity": 2 * value,
                "bits_per_byte": 1.0,
                "tokens": 9,
                "documents": 9,
            }
            ratio = {"ratio_to_base": value / 100, "ratio_interval": (0.1, 0.2), "perplexity_interval": (1.0, 2.0)}
            cells.append({"adapter": adapter, "source": source, **figures, **ratio})
    how = {"base": "nano", "protocol": "document", "window": 1024, "stride": 512}
    return build_matrix_page({"cells": cells, **how})


def build_tokens():
    tokens = ["The", " tenant", " word" * 30, ".", "\n", "\n", " pays"]
    random = np.random.default_rng(0)
    offsets = np.cumsum([0, *map(len, tokens[:-1])]).tolist()
    scores = [
        TokenScores(
            source=source,
            origin="",
            prompt="Who?",
            text="".join(tokens),
            token_ids=[0] * 7,
            tokens=tokens,
            text_offset=offsets,
            logprobs={name: -random.exponential(4, 7).astype(np.float32) for name in ("base", "law", "code")},
        )
        for source in ("law", "code")
    ]
    return build_token_page(scores, "nano")


def test_the_figures_of_a_token_are_shown_by_pointer_and_keys_and_follow_what_is_chosen(browser, tmp_path):
    (tmp_path / "page.html").write_text(build_tokens())
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/page.html")
    readout = page.locator("#readout")
    page.locator("#documents span", has_text="tenant").hover()
    assert readout.inner_text().startswith('" tenant" · base')
    page.locator("#documents").press("ArrowRight")
    page.locator("#documents").press("ArrowRight")
    assert readout.inner_text().startswith('"." ·')
    page.locator("#documents").press("Escape")
    assert readout.inner_text() == ""
    own = page.evaluate("JSON.parse(document.getElementById('run').textContent).texts[1].sums.code")
    page.select_option("#text", "code")
    page.select_option("#adapter", "code")
    assert f"{np.exp(own['adapter']):,.2f}" in page.locator("#figures").inner_text()
    assert page.locator("#kinds tbody tr").count() == len(own["kinds"])
    assert ("loss" if own["base"] < own["adapter"] else "gain") in page.locator("h2").first.inner_text()
    page.select_option("#view", "logprob")
    assert "10 nats" in page.locator("#legend").inner_text()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("build", [build_preparation, build_map, build_matrix, build_tokens])
def test_static_pages_are_readable_on_a_phone_in_light_and_dark(
    browser, tmp_path, scheme, shoot, check_accessible, build
):
    (tmp_path / "page.html").write_text(build())
    page = browser.new_page(viewport={"width": 390, "height": 720}, color_scheme=scheme)
    page.goto(f"file://{tmp_path}/page.html")
    shoot(page, f"static-{build.__name__}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    check_accessible(page)
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, ground) > 7
    assert (contrast(ground, "rgb(0, 0, 0)") < 3) == (scheme == "dark")
    for colour in page.evaluate("[...document.querySelectorAll('.picture text')].map((t) => getComputedStyle(t).fill)"):
        card = page.evaluate("getComputedStyle(document.querySelector('.picture')).backgroundColor")
        assert contrast(colour, card) > 4.5 or build is build_matrix, "cells of a heat map have their own ground"
    page.close()


def contrast(one, other):
    """Returns the contrast of two colours `rgb(r, g, b)`: WCAG 2.2, relative luminance."""
    values = []
    for colour in (one, other):
        parts = [int(float(part)) / 255 for part in colour[4:-1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        values.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(values) + 0.05) / (min(values) + 0.05)
