"""joblib's multiprocessing backend with forkshm's contexts, and under patch()."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

pytestmark = pytest.mark.slow

if importlib.util.find_spec("joblib") is None:
    pytest.skip("joblib is not installed: pip install 'forkshm[test]'", allow_module_level=True)

METHODS = ["fork", "spawn", "forkserver"]

PROGRAM = """
import sys
import forkshm

if sys.argv[2] == "imported under patch":
    forkshm.patch()

import joblib.pool
import multiprocessing
import numpy as np
from joblib import Parallel, delayed

def total(array, x):
    return type(multiprocessing.current_process()).__module__, float(array.sum()) + x

def write(array, x):
    array[x] = x

def fail(x):
    raise ValueError(f"bad {x}")

if __name__ == "__main__":
    method, when = sys.argv[1:]
    kind = joblib.pool.MemmappingPool
    assert issubclass(kind, forkshm.Pool) == (when == "imported under patch")
    if when == "not patched":
        # What joblib takes as a backend: anything with Pool and Lock.
        backend = forkshm.get_context(method)
    else:
        forkshm.patch()
        multiprocessing.set_start_method(method)
        backend = "multiprocessing"
    with Parallel(n_jobs=2, backend=backend) as parallel:
        small, large, shared = np.ones(1000), np.ones(300_000), forkshm.zeros(1000)
        for array in (small, large):
            answers = parallel(delayed(total)(array, i) for i in range(5))
            assert [answer for _, answer in answers] == [array.size + i for i in range(5)], answers
        parallel(delayed(write)(shared, i) for i in range(10))
        # Its own pool has picklers of its own, and those know arrays by value only.
        assert shared.sum() == (45 if issubclass(kind, forkshm.Pool) else 0), shared.sum()
        try:
            parallel(delayed(fail)(i) for i in range(3))
        except ValueError as error:
            assert str(error).startswith("bad "), error
        else:
            raise SystemExit("no error")
    assert not forkshm.active_children()
    print("done")
"""


@pytest.mark.parametrize("when", ["not patched", "imported before patch", "imported under patch"])
@pytest.mark.parametrize("method", METHODS)
def test_parallel(run_script, method, when):
    assert run_script(PROGRAM, method, when) == "done\n"


def test_the_default_joblib_backend_works_under_patch(run_script):
    said = run_script("""
import forkshm
forkshm.patch()
from joblib import Parallel, delayed

if __name__ == "__main__":
    print(Parallel(n_jobs=2)(delayed(pow)(i, 2) for i in range(4)))
    from joblib.externals.loky import get_reusable_executor
    get_reusable_executor().shutdown()
""")
    assert said == "[0, 1, 4, 9]\n"


def the_suite():
    place = pathlib.Path(__file__).with_name("joblib_suite.py")
    spec = importlib.util.spec_from_file_location("joblib_suite", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.nightly
def test_the_tests_of_joblib_pass_as_with_loky():
    joblib_suite = the_suite()

    report, unexplained = joblib_suite.compare()
    assert not unexplained, report
