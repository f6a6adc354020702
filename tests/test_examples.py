# SPDX-License-Identifier: MIT
"""The notebooks run from a clean kernel, and the outputs that the repository holds are from such a run."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
for _package in ("matplotlib", "sklearn"):
    pytest.importorskip(_package)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.joinpath("examples").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: Any) -> list[Any]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def kinds(notebook: Any) -> list[tuple[str, list[str]]]:
    """What every output is, without what it says."""
    return [
        (out.get("name", out.output_type), sorted(out.get("data", {})))
        for out in outputs(notebook)
        if out.get("name") != "stderr"
    ]


@pytest.mark.slow
@each_notebook
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    # Cells hold the assertions. They run where no source of the package lies about.
    execute = runpy.run_path(str(ROOT / "examples" / "execute.py"))["execute"]
    fresh = execute(path, tmp_path)
    assert kinds(fresh) == kinds(nbformat.read(path, as_version=4)), (
        f"{path.name} has outputs of an earlier version: run python examples/execute.py"
    )


@each_notebook
def test_kept_outputs_are_of_one_clean_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for out in outputs(notebook):
        assert out.output_type != "error"
        assert out.get("name") != "stderr", out.text


@each_notebook
def test_kept_outputs_say_nothing_of_the_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    for out in outputs(notebook):
        out.get("data", {}).pop("image/png", None)  # base64 may spell anything
    text = nbformat.writes(notebook)
    for place in ("/home/", "/root/", "/tmp/", "/usr/", "site-packages", " at 0x", str(ROOT)):
        assert place not in text, place
