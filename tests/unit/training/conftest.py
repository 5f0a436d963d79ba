"""Publishing draws charts, two seconds an adapter; here they are left out (`test_report.py` and the CLI tests draw)."""

import pytest

from lora_gpt2.training import run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(run, "render_report", lambda *args: {})
