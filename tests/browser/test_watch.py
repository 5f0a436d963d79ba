"""The page of a run in a real browser: one adapter, sixty, as they train and when they have."""

import json
import math

import pytest

from lora_gpt2.serving.middleware import Access
from lora_gpt2.serving.watch import RunPages, build_watch_server
from lora_gpt2.training.report import render_run
from lora_gpt2.training.run_reader import RunReader
from lora_gpt2.training.run_status import ALL, STOP_ENDING, RunStatus
from tests.serving import running

pytestmark = pytest.mark.slow
STEPS = 200


def list_records(seed, first, last):
    for step in range(first, last + 1):
        loss = 3 + (seed % 7) / 10 + 2 * math.exp(-step / 40) + 0.2 * math.sin(step * (seed + 1) * 1.7)
        found = {"step": step, "tokens": 1024 * step, "seconds": step / 5, "loss": loss, "gradient_norm": 1.0}
        found["learning_rate"] = 3e-3 * min(1.0, step / 10) * (1 - step / STEPS)
        if step % 20 == 0:
            found |= {"validation_loss": loss + 0.1, "memory_bytes": 5 * 10**8 + step}
            found["sample"] = f"The <b>tenant</b> & {step}\nshall pay"
        yield found


class Run:
    """A run that a test writes as a trainer does."""

    def __init__(self, folder, names):
        self.folder, self.names, self.status = folder / "run-1", names, RunStatus(folder / "run-1")
        self.folder.mkdir()
        adapters = [{"name": n, "description": "", "num_steps": STEPS, "tokens_per_step": 1024} for n in names]
        device = {"device": "cpu", "dtype": "bfloat16"}
        self.reporting = self.status.report({"kind": "train", "base": "nano", **device, "adapters": adapters})

    def __enter__(self):
        self.reporting.__enter__()
        return self

    def __exit__(self, *error):
        return self.reporting.__exit__(*error)

    def train(self, name, first, last, state="training", detail=""):
        records = list_records(self.names.index(name), first, last)
        with (self.folder / f"{name}.metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.status.update({name: (state, detail)})

    @property
    def asked(self):
        return {path.name.removesuffix(STOP_ENDING) for path in self.folder.glob(f"*{STOP_ENDING}")}


def write_sixty(folder):
    run = Run(folder, [f"domain-{index:02}" for index in range(60)])
    run.__enter__()
    for index, name in enumerate(run.names):
        if index < 30:
            run.train(name, 1, STEPS, "published", f"{name}@1")
        elif index < 36:
            run.train(name, 1, 20 * (index - 28), "training")
        elif index == 36:
            run.train(name, 1, 33, "failed", "step 33: loss nan")
        else:
            run.train(name, 1, 0, "waiting")
    return run


@pytest.fixture
def open_page(browser, tmp_path):
    pages = []

    def open_(url, **more):
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **more})
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda said: page.problems.append(said.text) if said.type == "error" else None)
        page.goto(url)
        page.wait_for_selector("#charts path.train", state="attached")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
        assert page.problems == []


def serve(folder, **access):
    return running(build_watch_server(RunPages(folder=folder, access=Access(is_local=True, **access))))


def test_one_adapter_is_watched_while_it_trains(open_page, tmp_path, shoot, check_accessible):
    with Run(tmp_path, ["law"]) as run, serve(tmp_path) as port:
        run.train("law", 1, 60)
        page = open_page(f"http://127.0.0.1:{port}/")
        assert page.url.endswith("/run-1/"), "the only run is shown at once"
        assert page.inner_text("#state") == "training"
        assert page.locator("#figures b").first.inner_text() == "30 %"
        assert page.title() == "30 % · law"
        assert page.locator("#list").is_hidden(), "one adapter needs no list"
        assert page.locator("#samples tbody tr").count() == 3
        assert page.locator("#samples .sample").first.inner_text().startswith("The <b>tenant</b> & 60"), "newest first"
        run.train("law", 61, 120)
        page.wait_for_selector("#samples tbody tr:nth-child(6)", timeout=5000)
        assert page.locator("#figures b").first.inner_text() == "60 %"
        shoot(page, "watch-one")
        check_accessible(page)
        loss = page.locator("figure:has-text('nats per token') svg").first
        assert "validation from" in loss.get_attribute("aria-label")
        loss.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".readout").first.inner_text().startswith("step 1: training")
        run.status.update({"law": ("published", "law@1")}, "done")
        page.wait_for_selector(
            "#state:has-text('finished: published law@1 (stopped at step 120 of 200)')", timeout=5000
        )
        assert page.locator("#figures b").first.inner_text() == "60 %"
        assert page.locator("#stop-all").is_hidden()


def test_sixty_are_a_line_each_and_one_of_them_is_stopped(open_page, tmp_path, shoot, check_accessible):
    run = write_sixty(tmp_path)
    with serve(tmp_path) as port:
        page = open_page(f"http://127.0.0.1:{port}/run-1/")
        assert page.locator("#adapters tbody tr").count() == 60
        assert page.inner_text("#state") == "30 published, 6 training, 1 failed, 23 waiting"
        assert page.locator("button.name[aria-current=true]").inner_text() == "domain-30", "the first that trains"
        shoot(page, "watch-sixty")
        check_accessible(page)
        page.get_by_role("button", name="domain-50", exact=True).click()
        assert page.inner_text("#of") == "of domain-50", "which waits and has no curve"
        assert page.locator("#stop-all").is_visible()
        page.get_by_role("button", name="domain-30", exact=True).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert page.inner_text("#of") == "of domain-31"
        answers = iter([False, True, True])
        page.on("dialog", lambda dialog: dialog.accept() if next(answers) else dialog.dismiss())
        stop = page.get_by_role("button", name="Stop and keep domain-31")
        stop.click()
        assert run.asked == set(), "it was taken back"
        stop.click()
        page.wait_for_selector("#asked:has-text('domain-31 stops after this step.')")
        assert run.asked == {"domain-31"}
        page.get_by_role("button", name="Stop all and keep").click()
        page.wait_for_selector("#asked:has-text('All adapters')")
        assert run.asked == {"domain-31", ALL}
        assert page.locator("#adapters button:has-text('Stop'):visible").count() == 6, "those that train"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(open_page, tmp_path, shoot, check_accessible, scheme):
    run = write_sixty(tmp_path)
    with serve(tmp_path) as port:
        view = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
        page = open_page(f"http://127.0.0.1:{port}/run-1/", **view)
        shoot(page, f"watch-phone-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert len(run.names) == page.locator("#adapters tbody tr").count()
        check_accessible(page)


def test_the_finished_report_is_the_same_page_in_one_file(open_page, tmp_path, shoot, check_accessible):
    with Run(tmp_path, ["law"]) as run:
        run.train("law", 1, STEPS, "published", "law@1")
    (tmp_path / "page.html").write_text(render_run(RunReader(run.folder), is_live=False))
    page = open_page(f"file://{tmp_path}/page.html")
    shoot(page, "watch-static")
    assert page.locator("#samples tbody tr").count() == STEPS // 20
    assert page.locator("#charts figure:visible").count() == 4
    assert page.locator("button:visible").count() == 0
    assert page.inner_text("#state") == "finished: published law@1"
    assert page.locator("#figures b").first.inner_text() == "100 %"
    check_accessible(page)


def test_with_an_admin_key_the_page_asks_for_it(open_page, tmp_path):
    with Run(tmp_path, ["law"]) as run, serve(tmp_path, admin_key="adm1n") as port:
        run.train("law", 1, 60)
        page = open_page(f"http://127.0.0.1:{port}/run-1/")
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Stop all and keep").click()
        page.wait_for_selector("#key:visible")
        assert "admin key is needed" in page.inner_text("#asked")
        assert run.asked == set()
        page.fill("#key", "adm1n")
        page.get_by_role("button", name="Stop all and keep").click()
        page.wait_for_selector("#asked:has-text('All adapters')")
        assert run.asked == {ALL}
        page.problems[:] = [each for each in page.problems if "401" not in each]


def test_a_server_that_went_away_is_said_and_found_again(open_page, tmp_path):
    with Run(tmp_path, ["law"]) as run:
        run.train("law", 1, 60)
        with serve(tmp_path) as port:
            page = open_page(f"http://127.0.0.1:{port}/run-1/")
            assert page.locator("#lost").is_hidden()
        page.wait_for_selector("#lost:visible", timeout=10_000)
        page.problems.clear()


def test_a_page_opened_before_the_run_begins_finds_it(browser, tmp_path):
    with serve(tmp_path) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        assert "No run has begun yet" in page.inner_text("main")
        with Run(tmp_path, ["law"]) as run:
            run.train("law", 1, 20)
            page.wait_for_selector("#charts path.train", state="attached", timeout=10_000)
        page.close()
