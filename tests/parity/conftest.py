"""Tools that are compared with, installed for a test."""

import subprocess
import sys

import pytest

PACKAGES = [
    "lm_eval==0.4.13",
    "jsonlines",
    "sqlitedict",
    "pytablewriter",
    "more_itertools",
    "word2number",
    "scikit-learn",
    "scipy",
    "threadpoolctl",
    "chardet",
    "dataproperty",  # and what the tables are written with
    "mbstrdecoder",
    "pathvalidate",
    "tabledata",
    "tcolorpy",
    "typepy",
]


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """A folder with lm-evaluation-harness, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("harness")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(folder), *PACKAGES]
    subprocess.run(install, check=True, timeout=300)
    return folder
