"""The rating form in a real browser, sent around as a file and served; slow, as the other pages are."""

import json
import os

import pytest

from lora_gpt2.rating.form import build_form
from lora_gpt2.rating.rounds import Round, import_answers, read_answers, read_round, write_round
from lora_gpt2.serving.rating_form import build_rating_server
from tests.serving import running

pytestmark = pytest.mark.slow
MADE = Round(
    base="nano",
    adapters=("secretone", "secrettwo"),
    prompts=("Take two eggs ", "The <king> "),
    texts=(("and beat", "in hand"), ("is dead", "lives")),
)


def answer(page, side):
    """Judges the task that is shown: on every criterion the text that `side` picks."""
    texts = page.locator(".text").all_inner_texts()
    label = "Text 1" if side(texts) == 0 else "Text 2"
    for field in page.locator("fieldset").all():
        field.get_by_text(label, exact=True).click()
    page.get_by_role("button", name="Next").click()


def begin(page):
    page.get_by_label("Your name").fill("anna")
    page.get_by_role("button", name="Begin").click()
    page.wait_for_selector(".text")


def prefers_first_adapter(texts):
    return next(place for place, text in enumerate(texts) if "beat" in text or "dead" in text)


def test_a_form_that_was_sent_gives_answers_that_can_be_imported(browser, tmp_path, shoot):
    folder = tmp_path / "r"
    write_round(folder, MADE)
    (tmp_path / "form.html").write_text(build_form(MADE), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(f"file://{tmp_path}/form.html")
    begin(page)
    shoot(page, "form-pair")
    answer(page, prefers_first_adapter)
    page.reload()
    page.wait_for_selector(".text")
    assert "1 of 2 done" in page.inner_text("main"), "it goes on after it was closed"
    answer(page, prefers_first_adapter)
    assert "All judged" in page.inner_text("main")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Another rater").click()
    assert "All judged" in page.inner_text("main"), "answers that were not saved are not thrown away unasked"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    assert "All done" in page.inner_text("main")
    download.value.save_as(tmp_path / "answers.json")
    page.close()
    assert import_answers(folder, MADE, [tmp_path / "answers.json"]) == 8
    assert {found.value for found in read_answers(folder, read_round(folder))} == {"first"}
    assert json.loads((tmp_path / "answers.json").read_text())["answers"][0]["rater"] == "anna"


def test_the_served_form_works_under_its_content_security_policy(browser, tmp_path, shoot):
    folder = tmp_path / "r"
    write_round(folder, MADE)
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    with running(build_rating_server(folder)) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        begin(page)
        shoot(page, "form-phone")
        answer(page, prefers_first_adapter)
        page.wait_for_selector("text=1 of 2 done")
        other = browser.new_context().new_page()
        other.goto(f"http://127.0.0.1:{port}/")
        other.get_by_label("Your name").fill("anna")
        other.get_by_role("button", name="Begin").click()
        other.wait_for_selector("text=anna has given 4 answers already")
        other.get_by_role("button", name="Begin").click()
        other.wait_for_selector(".text")
        page.close()
    assert [p for p in problems if "favicon" not in p and "404" not in p] == []
    assert {(found.rater, found.value) for found in read_answers(folder, MADE)} == {("anna", "first")}
    assert os.path.getsize(folder / "answers.jsonl") > 0
