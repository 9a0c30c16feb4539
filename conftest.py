"""Files that pytest does not collect, and a check that a run leaves no files behind."""

import gc
import os
import pathlib
import sys
import sysconfig
from importlib.util import find_spec

import pytest

ROOT = pathlib.Path(__file__).parent
# Files that pytest, the linters and the builds may create at the top.
BEFORE = pytest.StashKey[set]()
CACHES = {".coverage", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "dist"}

# Without compiled modules, each process that is not forked would compile forkshm, which takes a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Files that only the type checker runs, and doctests of integrations with libraries that are not installed.
collect_ignore = ["tests/typing"]
if sys.platform != "win32":
    collect_ignore += [
        "forkshm/popen_spawn_win32.py",
        "forkshm/_commands/_doctor_windows.py",
        "tests/windows/_capabilities.py",
    ]
    collect_ignore_glob = ["forkshm/backend/windows/*.py"]
if find_spec("torch") is None:
    collect_ignore.append("forkshm/integrations/torch.py")
if find_spec("joblib") is None:
    collect_ignore += ["forkshm/joblib.py", "forkshm/integrations/joblib.py"]
if find_spec("pandas") is None:
    collect_ignore += ["forkshm/pandas.py", "forkshm/integrations/pandas_engine.py"]
if find_spec("distributed") is None:
    collect_ignore += [f"forkshm/cluster/{name}.py" for name in ("__init__", "_agent", "_executor")]
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    collect_ignore.append("forkshm/integrations/numpy_memory.py")  # NumPy's allocations are hooked with the GIL only
for library in ("pandas", "pyarrow"):
    if find_spec(library) is None:
        collect_ignore.append(f"forkshm/integrations/{library}.py")


def at_the_top():
    """Return the names of the files and folders at the top of the repository."""
    return {path.name for path in ROOT.iterdir()} - CACHES


def pytest_sessionstart(session):
    """Record the files at the top before the tests."""
    session.config.stash[BEFORE] = at_the_top()


def pytest_sessionfinish(session, exitstatus):
    """Fail a run that leaves files at the top of the repository."""
    left = at_the_top() - session.config.stash.get(BEFORE, at_the_top())
    if left and not hasattr(session.config, "workerinput") and exitstatus == pytest.ExitCode.OK:
        print(f"\nthe run has left files behind: {', '.join(sorted(left))}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_finish(session):
    """Exclude libraries from the garbage collections around each test: with PyTorch each would take 0.1 s."""
    gc.collect()
    gc.freeze()
