"""What pytest does not collect, and what the collector of garbage need not look at."""

import gc
import sys
from importlib.util import find_spec

# What only the type checker runs, and the doctests of integrations with libraries that are not installed.
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
for library in ("pandas", "pyarrow"):
    if find_spec(library) is None:
        collect_ignore.append(f"forkshm/integrations/{library}.py")


def pytest_collection_finish(session):
    """Let the collections around each test pass over the libraries: with PyTorch they take 0.1 s each."""
    gc.collect()
    gc.freeze()
