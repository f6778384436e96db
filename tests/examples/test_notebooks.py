"""The notebooks, executed in an empty folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

nbformat: Any = importlib.import_module("nbformat")
NOTEBOOKS = ("many_tasks", "train_export_serve")


def printed(notebook: Any) -> str:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text if o.output_type == "stream" else str(o.data) for o in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the Jupyter libraries
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client: Any = importlib.import_module("nbclient")
    notebook = nbformat.read(root / "examples" / f"{name}.ipynb", as_version=4)
    client.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = printed(notebook)
    wanted = {
        "many_tasks": ("agreement 100.0%", "['colour', 'digits', 'shape']", "['digits', 'shape']"),
        "train_export_serve": ("model.onnx", "largest difference of a logit", "'probability': "),
    }
    for phrase in wanted[name]:
        assert phrase in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs(name: str, root: Path) -> None:
    notebook = nbformat.read(root / "examples" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
