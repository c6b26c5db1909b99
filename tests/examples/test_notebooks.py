"""Tier four: the notebooks run from top to bottom, in a small setting, and are saved with their outputs."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "choosing_a_rank": {"EPOCHS": 1, "BATCHES": 5},
    "consensus": {"RANKS": 4, "STEPS": 4, "BYTES": 2_048},
    "first_run": {"EPOCHS": 1, "BATCHES": 5},
    "resuming": {"BATCHES": 4},
}


@pytest.fixture
def execute(monkeypatch):
    """Give what `make notebooks` calls."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "notebooks"))
    from execute import execute

    return execute


def outputs(notebook: nbformat.NotebookNode) -> dict[str, list[dict[str, str]]]:
    """Give what each code cell put out, by the cell's id: the forms of each output, and their content."""
    return {
        cell.id: [output.get("data") or {output.name: output.text} for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_and_is_saved_with_its_outputs(execute, name):
    path = ROOT / "examples" / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    saved = outputs(notebook)
    executed = outputs(execute(path, **SMALL[name]))  # fails with the first cell that does

    assert list(saved) == list(executed)
    for cell in saved:
        assert [sorted(output) for output in saved[cell]] == [sorted(output) for output in executed[cell]], cell
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # saved after one pass from top to bottom

    said = [output for cell in executed.values() for output in cell]
    pictures = [base64.b64decode(output["image/png"]) for output in said if "image/png" in output]
    assert 0 < max(map(len, pictures)) < 60_000
    texts = [text for output in said for form, text in output.items() if form != "image/png"]
    for place in (ROOT, Path.home(), tempfile.gettempdir()):
        assert not any(f"{place}/" in text for text in texts)


def test_all_notebooks_are_tested():
    assert sorted(SMALL) == sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"))


def test_a_setting_that_a_notebook_does_not_have_is_refused(execute):
    with pytest.raises(ValueError, match="no line `EPOCH = "):
        execute(ROOT / "examples" / "notebooks" / "first_run.ipynb", EPOCH=1)
