"""Run the notebooks of examples/notebooks and write them with their outputs, and without what differs from run to run.

python .ci/notebooks.py [quickstart transformer ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "notebooks"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where there is no ipywidgets
}


def run(path: Path, folder: Path) -> Any:
    """The notebook with new outputs, run in a folder; every other line of it is as it was."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | ENVIRONMENT)
    return plain(notebook)


def plain(notebook: Any) -> Any:
    """The notebook without times and versions; a progress bar that was removed leaves no output."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = _joined([each for each in cell.outputs if each.get("data", {}).get("text/html") != ""])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs, with lines printed one after the other as one."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.get("name", "") == joined[-1].get("name") == "stdout":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as elsewhere:
            nbformat.write(run(FOLDER / f"{name}.ipynb", Path(elsewhere)), FOLDER / f"{name}.ipynb")
