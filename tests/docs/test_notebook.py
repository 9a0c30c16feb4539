"""The notebooks run from the first to the last cell, and print what the text says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pages import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("numpy")

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(os.name == "nt", reason="the cells fork")]

# In a process of its own, because Jupyter's client leaves sockets behind.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": sys.argv[3]}}).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.ipynb")))
def test_a_notebook_runs(name, tmp_path):
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    out = tmp_path / name
    subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / "examples" / name), str(out), str(tmp_path)], check=True, timeout=200
    )
    notebook = nbformat.read(out, as_version=4)
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("text/html" in data for data in shown) >= 3
    assert any("image/png" in data for data in shown)
