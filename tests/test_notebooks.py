"""The notebooks run from top to bottom, and are stored with what they show."""

import ast
import re

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from trainings import ROOT

NOTEBOOKS = ("first_steps", "kernel_space")


def script(name):
    return ROOT / "experiments" / f"{name}.py"


def stored(name):
    return nbformat.read(ROOT / "experiments" / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def settings(kernel_run, no_kernel_run, tmp_path_factory):
    """What takes the place of each notebook's parameters."""
    folder = tmp_path_factory.mktemp("first_steps")
    return {
        "first_steps": {"folder": str(folder), "epochs": 1},
        "kernel_space": {"kernel": str(kernel_run), "no_kernel": str(no_kernel_run), "count": 24},
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, settings):
    notebook = jupytext.read(script(name))
    (place,) = (
        place
        for place, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    )
    given = "\n".join(f"{key} = {value!r}" for key, value in settings[name].items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    where = {"metadata": {"path": str(ROOT / "experiments")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    ]
    assert len(pictures) >= 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_and_its_script_are_one(name):
    def cells(notebook):
        return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]

    assert cells(stored(name)) == cells(jupytext.read(script(name)))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_as_it_ran(name):
    cells = [cell for cell in stored(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_uses_public_names_alone(name):
    tree = ast.parse(script(name).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {
        a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names
    }
    assert not [each for each in used if re.match("_", each)]
