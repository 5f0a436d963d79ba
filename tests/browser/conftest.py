"""Debian's Chromium, driven by Playwright, and axe-core from npm; without them these slow tests are skipped."""

import os
import shutil
import subprocess
import tarfile

import pytest

CHROMIUM = os.environ.get("LORA_GPT2_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = "axe-core@4.14.1"
KEEP = os.environ.get("LORA_GPT2_SCREENSHOTS")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium, or set LORA_GPT2_CHROMIUM")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def check_accessible(tmp_path_factory):
    """Returns a function that asserts that axe-core finds nothing serious on a page."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("no npm here: apt install npm")
    packed = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, capture_output=True, text=True, check=False)
    if packed.returncode:
        pytest.skip(f"{AXE} cannot be had: {packed.stderr.strip()[-200:]}")
    with tarfile.open(folder / packed.stdout.strip()) as archive:
        source = archive.extractfile("package/axe.min.js").read().decode()

    def check(page):
        page.evaluate(source)  # which a Content-Security-Policy does not forbid
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (each["id"], each["impact"], [node["target"] for node in each["nodes"]][:5])
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == []

    return check


@pytest.fixture
def shoot():
    """Returns a function that keeps a picture of a page where $LORA_GPT2_SCREENSHOTS names a folder."""

    def keep(page, name):
        if KEEP:
            page.screenshot(path=f"{KEEP}/{name}.png", full_page=True)

    return keep
