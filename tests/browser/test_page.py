"""The web page in a real browser."""

import pytest

from lora_gpt2.core.console import SilentReporter
from lora_gpt2.inference.history import LocalLog, read_log
from lora_gpt2.inference.session import Session
from lora_gpt2.rating.votes import read_votes
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.api import Server
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter
from tests.serving import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def port(base, store, tmp_path):
    for seed, name in enumerate(("law", "code", "prose", "verse"), start=1):
        figures = {"base_perplexity": 300.0, "validation_perplexity": 100.0 + seed}
        recipe = {"description": "<b>Laws</b> & orders"}
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(figures=figures, recipe=recipe))
    choices = LocalLog(tmp_path / "choices.jsonl", SilentReporter())
    with serving(
        Server(session=Session(base, store), defaults=GenerateSettings(), limits=ServeSettings(), vote_log=choices)
    ) as number:
        yield number


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
    assert problems == []


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
    assert page.locator("article pre span[title$=nats]").count() > 20
    assert page.locator("article h2 .quiet").first.inner_text().startswith("perplexity")
    assert page.locator("#legend").is_visible()


def choose(page, *names):
    for card in page.locator(".adapter").all():
        if (card.get_attribute("aria-pressed") == "true") != (card.get_attribute("data-id") in names):
            card.click()


def test_blind_mode_hides_names_until_one_is_chosen_which_is_recorded(page, tmp_path, shoot):
    choose(page, "base", "code", "law")
    page.click("summary")
    page.check("#blind")
    page.click("#go")
    page.wait_for_selector("article button")
    shoot(page, "blind")
    names = page.locator("article h2 span:first-child")
    assert names.all_inner_texts() == ["Text A", "Text B", "Text C"]
    assert not page.locator(".origin").first.is_visible()
    page.locator("article button").nth(1).click()
    assert sorted(names.all_inner_texts()) == ["base", "code", "law"]
    assert page.locator("article.best").count() == 1
    page.wait_for_selector("#status:has-text('rate --recorded page')")
    (choice,) = read_votes(read_log(tmp_path / "choices.jsonl"))
    assert len(choice.texts) == len(choice.models)
    assert all(text and not text.startswith(choice.prompt) for text in choice.texts)
    best = page.locator("article.best h2 span:first-child").inner_text()
    assert choice.chosen == ("base" if best == "base" else f"{best}@1")
    assert sorted(choice.models) == ["base", "code@1", "law@1"]


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_static_pages_are_readable_on_a_phone_in_light_and_dark(browser, tmp_path, scheme, shoot):
    from lora_gpt2.core.pages import render_page

    long = "word" * 60
    rows = [(long, long, 12345678)] * 3
    values = {"title": long, "sources": long, "figures": [("1,234", "documents")] * 5, "rules": [], "examples": rows}
    empty = {"rejected": [], "near_duplicates": [], "pii": [], "settings": [("a", long)]}
    (tmp_path / "page.html").write_text(render_page("preparation.html", **values, **empty))
    page = browser.new_page(viewport={"width": 390, "height": 720}, color_scheme=scheme)
    page.goto(f"file://{tmp_path}/page.html")
    shoot(page, f"static-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, ground) > 7
    assert (contrast(ground, "rgb(0, 0, 0)") < 3) == (scheme == "dark")
    page.close()


def contrast(one, other):
    """Returns the contrast of two colours `rgb(r, g, b)`: WCAG 2.2, relative luminance."""
    values = []
    for colour in (one, other):
        parts = [int(float(part)) / 255 for part in colour[4:-1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        values.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(values) + 0.05) / (min(values) + 0.05)
