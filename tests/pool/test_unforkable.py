"""Libraries whose threads do not survive a fork are named at the start of a pool, and when a task hangs."""

from __future__ import annotations

import platform

import pytest

from forkshm.pool import _unforkable

pytestmark = pytest.mark.needs("proc")

# A module with the name of a known library, and a C thread with the name of the library's threads.
STAND_IN = """
import ctypes, ctypes.util, sys, threading, time, types, warnings
import forkshm

def use(module, comm):
    sys.modules[module] = types.ModuleType(module)
    libc = ctypes.CDLL(None)
    START = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    up = threading.Event()
    def run(_):
        libc.prctl(15, comm.encode(), 0, 0, 0)
        up.set()
        time.sleep(60)
    global kept
    kept = START(run)
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, kept, None)
    up.wait()
    # One that Python came to know by running in it is not one of a library.
    for ident in [i for i, t in threading._active.items() if isinstance(t, threading._DummyThread)]:
        del threading._active[ident]

def warned(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", forkshm.ForkshmWarning)
        make()
    return [(str(w.message), w.filename) for w in caught if issubclass(w.category, forkshm.ForkshmWarning)]

def start(method=None):
    forkshm.get_context(method).Pool(1).terminate()
"""


@pytest.mark.parametrize(
    ("module", "comm", "name"), [("polars", "polars-0", "polars"), ("grpc", "grpc_global_tim", "gRPC")]
)
def test_a_pool_warns_once_of_used_libraries(run_script, module, comm, name):
    said = run_script(
        STAND_IN
        + f"""
assert warned(start) == []
import types
sys.modules[{module!r}] = types.ModuleType({module!r})
assert warned(start) == []  # imported and not used
use({module!r}, {comm!r})
((message, file),) = warned(start)
assert file == __file__, file
assert message.startswith("this process has used {name}, and forks workers"), message
assert 'forkshm.get_context("forkserver").Pool(' in message
assert warned(start) == []
print("ok")
"""
    )
    assert said.strip() == "ok"


def test_other_start_methods_do_not_warn(run_script):
    said = run_script(
        STAND_IN
        + """
if __name__ == "__main__":
    use("polars", "polars-0")
    assert warned(lambda: start("spawn")) == []
    print("ok")
"""
    )
    assert said.strip() == "ok"


def test_a_task_that_hangs_names_the_suspect(run_script):
    said = run_script(
        STAND_IN
        + """
import time
use("polars", "polars-0")
warnings.simplefilter("ignore")
with forkshm.Pool(1, task_timeout=0.2) as pool:
    try:
        pool.apply(time.sleep, (30,))
    except forkshm.TaskTimeoutError as error:
        print(error)
"""
    )
    assert "the workers were forked after polars was used" in said
    assert "forkserver" in said


def test_a_task_that_takes_too_long_names_no_suspect_where_there_is_none(run_script):
    run_script(
        """
import time
import forkshm
with forkshm.Pool(1, task_timeout=0.2) as pool:
    try:
        pool.apply(time.sleep, (30,))
    except forkshm.TaskTimeoutError as error:
        assert "forked" not in str(error)
    else:
        raise AssertionError("it was not ended")
"""
    )


@pytest.mark.slow
def test_gnu_openmp_in_use_is_found(run_script):
    pytest.importorskip("sklearn")
    said = run_script("""
import os
os.environ.pop("OMP_NUM_THREADS", None)
import numpy as np
from forkshm.pool import _unforkable
import sklearn.ensemble
print(_unforkable.suspects())
x = np.random.default_rng(1).random((2000, 3))
sklearn.ensemble.HistGradientBoostingRegressor(max_iter=3).fit(x, x[:, 0])
print(_unforkable.suspects() if (os.cpu_count() or 1) > 1 else ["GNU OpenMP"])
""")
    assert said.splitlines() == ["[]", "['GNU OpenMP']"]


def test_gnu_openmp_is_found_beside_two_openblas_libraries(run_script):
    """Without threadpoolctl, whose absence numba shows: it loads the OpenBLAS of NumPy and that of SciPy."""
    pytest.importorskip("scipy")
    said = run_script("""
import ctypes
import os
import sys
import types
import numpy
import scipy.linalg
from forkshm.pool import _unforkable

sys.modules.pop("threadpoolctl", None)
sys.modules["numba"] = types.ModuleType("numba")
try:
    gomp = ctypes.CDLL("libgomp.so.1")
except OSError:
    print([], ["GNU OpenMP"])
else:
    before = _unforkable.suspects()
    gomp.GOMP_parallel(ctypes.CDLL(None).getpid, None, 2, 0)
    print(before, _unforkable.suspects())
""")
    assert said == "[] ['GNU OpenMP']\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere GNU OpenMP sleeps in the C library")
def test_gnu_openmp_is_found_after_openblas_ended_its_threads(run_script):
    """OpenBLAS ends its threads at each fork, and starts them when they are needed."""
    said = run_script("""
import ctypes
import os
import sys
import time
import types
import numpy
import forkshm
from forkshm.pool import _unforkable

sys.modules["numba"] = types.ModuleType("numba")
try:
    gomp = ctypes.CDLL("libgomp.so.1")
except OSError:
    print(["GNU OpenMP"])
else:
    forkshm.Pool(1).terminate()
    gomp.GOMP_parallel(ctypes.CDLL(None).getpid, None, 2, 0)
    (thread,) = _unforkable._unknown_threads()
    while _unforkable._sleeps_at(thread) is None:  # a busy machine may take long
        time.sleep(0.001)
    print(_unforkable.suspects())
""")
    assert said == "['GNU OpenMP']\n"


@pytest.mark.parametrize("places_are_known", [True, False])
def test_a_thread_that_python_does_not_list_is_not_one_of_gnu_openmp(run_script, places_are_known):
    """The `_thread` module starts such threads; forkshm's own one returns memory after a large array was sent."""
    said = run_script(f"""
import _thread
import ctypes
import os
import sys
import types
from forkshm.pool import _unforkable

sys.modules["numba"] = types.ModuleType("numba")
try:
    ctypes.CDLL("libgomp.so.1")
except OSError:
    pass
if not {places_are_known}:
    _unforkable._sleeps_at = lambda thread: 0
up, gate = _thread.allocate_lock(), _thread.allocate_lock()
up.acquire()
gate.acquire()

def wait():
    up.release()
    gate.acquire()

_thread.start_new_thread(wait, ())
up.acquire()
print(len(_unforkable._unknown_threads()), _unforkable.suspects())
""")
    assert said == "1 []\n"


@pytest.mark.slow
def test_polars_in_use_is_found(run_script):
    pytest.importorskip("polars")
    said = run_script("""
import polars
from forkshm.pool import _unforkable
print(_unforkable.suspects())
polars.DataFrame({"a": [1, 2]}).group_by("a").sum()
print(_unforkable.suspects())
""")
    assert said.splitlines() == ["[]", "['polars']"]


def test_the_doctor_lists_them(monkeypatch, capsys):
    from forkshm.__main__ import main

    find = _unforkable.importlib.util.find_spec
    monkeypatch.setattr(
        _unforkable.importlib.util, "find_spec", lambda name, *rest: object() if name == "polars" else find(name, *rest)
    )
    monkeypatch.setenv("COLUMNS", "300")
    main(["doctor"])
    assert "there (polars)" in capsys.readouterr().out
