"""A program without the ``__main__`` guard, where processes are spawned: one error shows the lines to add."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from started import methods

import forkshm
from forkshm._system import CAN_FORK

pytestmark = pytest.mark.slow

GUARD = 'if __name__ == "__main__":\n        main()'
PROGRAM = """
import sys, forkshm
def f(x): return x + 1
forkshm.set_start_method(sys.argv[1])
"""

# Code that starts processes; whether the error is raised here or printed by the child; and how often it appears.
STARTS = [
    ("forkshm.Pool(2).map(f, range(3))", 1),
    ("forkshm.Pool(3).apply_async(f, (3,)).get()", 1),
    ("list(forkshm.Pool(2).imap(f, range(3)))", 1),
    ("forkshm.Pool(2, initializer=f, initargs=(1,)).apply(f, (3,))", 1),
    ("with forkshm.Pool(2) as pool: pool.starmap(pow, [(1, 2)])", 1),
    ("forkshm.Executor(2).submit(f, 1).exception().__cause__ and forkshm.Executor(2).submit(f, 1).result()", 1),
    ("forkshm.launch(f, (1,), workers=2)", 1),
    ("p = forkshm.Process(target=f, args=(1,)); p.start(); p.join(); sys.exit(p.exitcode)", 0),
    ("forkshm.Manager()", 1),
    ("forkshm.parallel(f, workers=2).map(range(3))", 1),
    ("forkshm.parallel(f, workers=2).submit(1).result()", 1),
]


# The report does not depend on the start method, so only every third start is repeated under forkserver. The starts of
# contexts, below, have both methods.
TABLE = {f"spawn-{start.split('(')[0]}{n}": ("spawn", start, raised) for n, (start, raised) in enumerate(STARTS)}
if CAN_FORK:
    for start, raised in STARTS[::3]:
        TABLE[f"forkserver-{start.split('(')[0]}"] = "forkserver", start, raised


@pytest.mark.parametrize(("method", "start", "raised"), TABLE.values(), ids=TABLE)
def test_one_error_shows_the_two_lines(tmp_path, method, start, raised):
    check_one_error(tmp_path, PROGRAM + start + "\n", method, raised)


def check_one_error(tmp_path, program, method, raised):
    path = tmp_path / "program.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, str(path), method], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.count(GUARD) == 1, done.stderr
    assert done.stderr.count("Traceback") <= 2 * raised, done.stderr  # including that of its cause
    assert len(done.stderr.splitlines()) < 45


OF_CONTEXTS = [
    ("context.Pool(2).map(f, range(3))", 1),
    ("forkshm.Executor(2, mp_context=context).submit(f, 1).result()", 1),
    ("p = context.Process(target=f, args=(1,)); p.start(); p.join(); sys.exit(p.exitcode)", 0),
    ("context.Manager()", 1),
]


@pytest.mark.parametrize("method", methods("spawn", "forkserver"))
@pytest.mark.parametrize(("start", "raised"), OF_CONTEXTS)
def test_one_error_shows_the_two_lines_if_another_start_method_is_the_default(tmp_path, method, start, raised):
    program = PROGRAM.replace("forkshm.set_start_method", "context = forkshm.get_context")
    check_one_error(tmp_path, program + start + "\n", method, raised)


@pytest.mark.parametrize("method", methods("spawn", "forkserver"))
def test_a_guarded_program_works_and_its_workers_may_start_pools(run_script, method):
    source = """
    import sys, forkshm
    def inner(x):
        return x + 1
    def outer(x):
        with forkshm.Pool(1) as pool:
            return pool.apply(inner, (x,))
    if __name__ == "__main__":
        forkshm.set_start_method(sys.argv[1])
        with forkshm.Pool(2) as pool:
            print(pool.map(outer, [1, 2]))
    """
    assert run_script(textwrap.dedent(source), method).strip() == "[2, 3]"


def test_the_error_is_a_runtime_error_as_in_multiprocessing():
    assert issubclass(forkshm.errors.MainGuardError, RuntimeError)
    assert issubclass(forkshm.errors.MainGuardError, forkshm.ForkshmError)
