"""Notebooks run from top to bottom in a kernel of their own, and draw what they promise.

Here they run at the small sizes that `GRM_JAX_QUICK` asks for; people see the full ones.
"""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs_and_say_how_long_they_take(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    first, install = notebook.cells[:2]
    assert any(word in first.source for word in ("minute", "second"))
    assert "pip" in install.source
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRM_JAX_QUICK", "1")
    # A kernel of one device and of fast code, as people have it.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    drawn = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert drawn
