import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def folder(path, finished, cli):
    """A finished run of the kind that a notebook looks at."""
    if path.stem != "classification":
        return finished[0]
    run = cli.root / "labels"
    small = ["model=resnet18", "data.images={train:40,test:8}", "data.image_size=32", "trainer.max_epochs=1"]
    cli("train", "data=phantom_melanoma", *small, f"hydra.run.dir={run}")
    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_a_finished_run(path, folder, cli, monkeypatch):
    for name, value in cli.environment.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setitem(os.environ, "MEDVISION_RUN", str(folder))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= (4 if path.stem == "classification" else 3)
    shown = "Classifier resnet18" if path.stem == "classification" else "UNetV2"
    assert any(shown in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs_and_defines_nothing(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert not any(line.startswith(("def ", "class ")) for cell in cells for line in cell.source.splitlines())
