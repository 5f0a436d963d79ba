"""Publishing draws charts, two seconds an adapter; here they are left out (`test_report.py` and the CLI tests draw)."""

import pytest

from lora_gpt2.training import publish


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(publish, "render_report", lambda *args: {})
