"""A class is sent by name even if the module that it names has not been imported yet."""

from __future__ import annotations

import pytest

# Each runs in a fresh process, because other tests may have imported these modules here.
RECARRAY = """
import sys
import numpy as np
import forkshm

def look(array):
    return type(array) is np.recarray, float(array["a"].sum()), float(array.a.sum())

if __name__ == "__main__":
    assert "numpy.rec" not in sys.modules
    private = np.ones(5000, [("a", "f8")]).view(np.recarray)
    shared = np.asarray(forkshm.ones(5000, [("a", "f8")])).view(np.recarray)
    with forkshm.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(look, (private,)), pool.apply(look, (shared,)))
"""

MADE_UP = """
import forkshm

class Plain:
    def double(self):
        return 2

# In a module that does not exist, a module without such a class, and a module that is not a package.
kinds = [type("Made", (Plain,), {"__module__": name}) for name in ("no.such.module", "wave", "wave.x", "")]

if __name__ == "__main__":
    with forkshm.Pool(1) as pool:
        print([pool.apply(kind().double) for kind in kinds])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_object_of_numpy_in_a_process_without_numpy(run_script, method):
    numpy = pytest.importorskip("numpy")
    if numpy.recarray.__module__ != "numpy.rec":
        pytest.skip("this NumPy has imported all of its modules")
    assert run_script(RECARRAY, method) == "(True, 5000.0, 5000.0) (True, 5000.0, 5000.0)\n"


@pytest.mark.slow
def test_an_object_without_a_module(run_script):
    assert run_script(MADE_UP) == "[2, 2, 2, 2]\n"


LATER = """
import sys
import forkshm

if __name__ == "__main__":
    with forkshm.get_context(sys.argv[1]).Pool(1) as pool:
        pool.apply(abs, (1,))
        sys.path.insert(0, sys.argv[2])
        import later
        for call in [lambda: pool.apply(later.double, (2,)), lambda: pool.apply(len, (later.Words(),))]:
            try:
                call()
            except ModuleNotFoundError as error:
                print(error.name, error.__notes__)
        print(pool.apply(abs, (-1,)))
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_module_that_the_worker_cannot_import_gets_a_note(run_script, tmp_path, method):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "later.py").write_text("def double(x): return 2 * x\nclass Words(list): pass\n")
    said = run_script(LATER, method, str(folder)).splitlines()
    assert said[-1] == "1"
    assert len(said) == 3
    for line in said[:2]:
        assert line.startswith("later [")
        assert "change sys.path before you start the pool" in line
