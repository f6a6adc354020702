# SPDX-License-Identifier: MIT
"""Run notebooks from a clean kernel and keep their outputs: ``python examples/execute.py [notebook …]``.

What depends on the run alone (times, kernel and Python version) is left out of the file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parent


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook at ``path``, run from its first cell to its last with ``folder`` as working directory.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the text has its traceback.
        nbclient.exceptions.CellTimeoutError: a cell took longer than ten minutes.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
