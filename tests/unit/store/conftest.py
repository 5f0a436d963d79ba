"""The command line, for what must hold through it."""

from tests.integration.conftest import run as run
