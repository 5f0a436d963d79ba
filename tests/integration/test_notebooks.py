"""The notebooks run from their first cell to the last, in an empty folder, and show what they were run with."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent.parent / "notebooks").glob("*.ipynb"))
SECONDS = 900


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("LORA_GPT2_STORE", str(tmp_path / "adapters"))
    monkeypatch.chdir(tmp_path)
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "adapters").is_dir()


def test_the_notebooks_were_run_and_show_results():
    import nbformat

    assert {path.stem for path in NOTEBOOKS} == {"five_domains", "from_trainer"}
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells), path
        assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
        assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 1
