"""The command line inside the test's process, and a store to use it on."""

import pytest

from lora_gpt2 import cli
from lora_gpt2.store.files import Origin, publish_adapter
from lora_gpt2.training import publish as publish_module
from tests.builders import make_adapter


@pytest.fixture
def run(capsys):
    """Runs a command line; returns exit code, stdout, stderr."""

    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """Publishing draws charts, seconds an adapter; a test that looks at them asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(publish_module, "render_report", lambda *args: {})


@pytest.fixture
def drawn():
    """The pages of an adapter are drawn."""


@pytest.fixture
def trained(base, store):
    """A store with two adapters."""
    for seed, name in enumerate(("law", "code"), start=1):
        publish_adapter(store, name, make_adapter(base.config, seed), base, Origin(figures={"train_tokens": 1000}))
    return store
