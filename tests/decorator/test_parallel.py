"""@parallel: a function that can still be called, and can be mapped over workers."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import time
import types

import numpy as np
import pytest

import forkshm
from forkshm._system import CAN_FORK
from forkshm.decorator import _settings

pytestmark = pytest.mark.usefixtures("_warm_up")


@pytest.fixture(autouse=True)
def _no_workers_left(no_leaks):
    """Close all workers that a test started."""
    yield
    for executor in list(_settings.executors.values()):
        executor.shutdown()
    _settings.executors.clear()


@forkshm.parallel(workers=2)
def double(x: int, *, plus: int = 0) -> int:
    """Return twice *x*."""
    return 2 * x + plus


@forkshm.parallel(workers=2)
def pid_of(_: object = None) -> int:
    return os.getpid()


@forkshm.parallel(workers=2)
def add(a, b):
    return a + b


@forkshm.parallel(workers=2)
def picky(x):
    if x == 2:
        raise ValueError(f"not {x}")
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@forkshm.parallel(workers=2)
def nested(x):
    return os.getpid(), pid_of.map(range(3)), double.submit(x).result(), list(double.imap([x]))


@forkshm.parallel(workers=2, nested=True)
def pid_of_other(_):
    return os.getpid()


@forkshm.parallel(workers=1)
def nested_in_workers(x):
    return os.getpid(), pid_of_other.map(range(3))


made = []


@forkshm.parallel(workers=2, worker_init=lambda: made.append(1) or (os.getpid(), len(made)))
def state_of(_):
    return os.getpid(), state_of.state


class Table:
    def __init__(self, values):
        self.values = values

    @forkshm.parallel(workers=2)
    def at(self, index: int) -> float:
        """The value of the object."""
        return float(self.values[index])

    @forkshm.parallel(workers=2)
    @classmethod
    def name_and(cls, x):
        return cls.__name__, x

    @forkshm.parallel(workers=2)
    @staticmethod
    def triple(x):
        return 3 * x


def test_calling_a_decorated_function_calls_the_original():
    assert double(3, plus=1) == 7
    assert (double.__name__, double.__doc__, double.__module__) == ("double", "Return twice *x*.", __name__)
    assert str(inspect.signature(double)) == "(x: 'int', *, plus: 'int' = 0) -> 'int'"
    assert not _settings.executors, "a plain call starts nothing"


def test_maps_have_the_answers_of_the_builtins():
    assert double.map(range(10)) == [2 * x for x in range(10)]
    assert double.map([]) == []
    assert double.map(iter([1, 2]), chunksize=1) == [2, 4]
    assert add.starmap([(1, 2), ("a", "b")]) == [3, "ab"]
    assert list(double.imap(iter(range(5)))) == [0, 2, 4, 6, 8]
    assert sorted(double.imap_unordered(range(5), chunksize=2)) == [0, 2, 4, 6, 8]
    assert sorted(double.map(range(5), ordered=False)) == [0, 2, 4, 6, 8]
    assert double.submit(4, plus=1).result() == 9
    assert asyncio.run(double.amap(range(5))) == [0, 2, 4, 6, 8]


def test_the_workers_are_others_and_stay_and_are_shared():
    first = set(pid_of.map(range(40), chunksize=1))
    again = set(pid_of.map(range(40), chunksize=1)) | {pid_of.submit().result()}
    assert os.getpid() not in first
    assert len(first | again) <= 2
    double.map([1])
    assert len(_settings.executors) == 1


def test_equal_options_share_workers_and_others_do_not():
    @forkshm.parallel(workers=1)
    def other(_):
        return os.getpid()

    assert set(other.map(range(4))).isdisjoint(pid_of.map(range(4)))


def test_close_ends_the_workers_and_the_next_call_starts_new_ones():
    before = pid_of.submit().result()
    pid_of.close()
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert pid_of.submit().result() != before
    pid_of.close()
    pid_of.close()


def test_a_forked_child_has_workers_of_its_own(in_child):
    pid_of.map([1])
    parents = {worker.pid for worker in _settings.executor_of(pid_of._settings).pool._worker_group.workers}

    def child():
        children = set(pid_of.map(range(20), chunksize=1))
        pid_of.close()
        return not (children and children.isdisjoint(parents))

    assert in_child(child) == 0
    assert parents >= set(pid_of.map(range(20), chunksize=1))


def test_a_map_in_a_worker_runs_in_that_worker():
    ((worker, pids, doubled, more),) = nested.map([21])
    assert set(pids) == {worker} != {os.getpid()}
    assert (doubled, more) == (42, [42])


def test_a_nested_map_has_workers_of_its_own():
    ((worker, pids),) = nested_in_workers.map([0])
    assert worker not in pids


def test_a_map_in_a_worker_of_a_plain_pool_runs_in_that_worker(pool):
    worker, pids, *_ = pool.apply(nested, (1,))
    assert set(pids) == {worker}


@pytest.mark.parametrize("call", [picky.map, lambda xs, **o: list(picky.imap(xs, **o))], ids=["map", "imap"])
def test_on_error(call):
    with pytest.raises(ValueError, match="not 2") as raised:
        call(range(4))
    assert "picky" in str(raised.value.__cause__)
    returned = call(range(7), on_error="return")
    assert [value for value in returned if isinstance(value, int)] == [0, 1, 3, 4, 6]
    assert isinstance(returned[2], ValueError)
    assert "not 2" in str(returned[2].__cause__)
    assert isinstance(returned[5], forkshm.WorkerDiedError)
    assert call(range(7), on_error="skip") == [0, 1, 3, 4, 6]


def fail_on_odd(x):
    if x % 2:
        raise ValueError(x)
    return x


def test_options_are_taken_together_with_a_function():
    assert forkshm.parallel(fail_on_odd, workers=1, on_error="skip").map(range(4)) == [0, 2]
    with pytest.raises(ValueError, match="on_error"):
        forkshm.parallel(fail_on_odd, on_error="whatever")


def test_on_error_without_workers():
    """Maps that run inside a worker return the same answers."""

    @forkshm.parallel(workers=1)
    def inner(xs):
        with pytest.raises(ValueError, match="not 2"):
            picky.map(xs)
        return picky.map(xs, on_error="skip"), [repr(x) for x in picky.imap(xs, on_error="return")]

    assert inner.map([[1, 2, 3]]) == [([1, 3], ["1", "ValueError('not 2')", "3"])]


def test_amap_has_the_same_errors():
    returned = asyncio.run(picky.amap(range(7), on_error="return", chunksize=1))
    assert isinstance(returned.pop(5), forkshm.WorkerDiedError)
    assert isinstance(returned.pop(2), ValueError)
    assert returned == [0, 1, 3, 4, 6]
    with pytest.raises(ValueError, match="not 2"):
        asyncio.run(picky.amap([1, 2, 3]))


def test_results_are_written_into_a_shared_array_and_not_sent():
    out = forkshm.zeros((6, 100_000))

    @forkshm.parallel(workers=2)
    def row(x):
        return np.full(100_000, x)

    executor = _settings.executor_of(row._settings)
    before = executor.pool.statistics().bytes_copied
    assert row.map(range(6), out=out) is out
    assert out[:, -1].tolist() == [0, 1, 2, 3, 4, 5]
    assert executor.pool.statistics().bytes_copied - before < 100_000
    assert add.starmap([(1, 2), (3, 4)], out=out[:2, 0]).tolist() == [3, 7]
    assert picky.map([1, 2, 3], out=out[:3, 1], on_error="skip").tolist() == [1, 1, 3]


@pytest.mark.parametrize("out", [np.zeros(3), bytearray(3)])
def test_an_array_that_workers_cannot_write_is_refused(out):
    with pytest.raises(ValueError, match=r"not in shared memory that workers can write\. Create it"):
        double.map(range(3), out=out)


def test_a_method_takes_its_object_along_once():
    table = Table(np.arange(2_000_000.0))
    assert (table.at(3), Table.at(table, 4)) == (3.0, 4.0)
    pool = _settings.executor_of(Table.at._settings).pool
    before = pool.statistics().bytes_copied
    assert table.at.map(range(50), chunksize=1) == [float(x) for x in range(50)]
    assert 16e6 <= pool.statistics().bytes_copied - before < 17e6
    assert table.at.submit(7).result() == 7.0
    assert Table.name_and.map([1]) == Table("").name_and.map([1]) == [("Table", 1)]
    assert Table.triple.map([1, 2]) == [3, 6]


def test_a_closure_is_copied_once():
    big = np.ones(2_000_000)

    @forkshm.parallel(workers=2)
    def element(x):
        return big[x]

    pool = _settings.executor_of(element._settings).pool
    before = pool.statistics().bytes_copied
    assert element.map(range(40), chunksize=1) == [1.0] * 40
    assert 16e6 <= pool.statistics().bytes_copied - before < 17e6


def test_state_is_made_once_in_each_process():
    made.clear()
    here = state_of(0)
    assert here == (os.getpid(), (os.getpid(), 1))
    assert state_of(0) == here
    for worker, (maker, _) in set(state_of.map(range(20), chunksize=1)):
        assert worker == maker != os.getpid()
    assert made == [1]
    with pytest.raises(AttributeError, match="it was decorated without worker_init"):
        double.state  # noqa: B018


def test_an_initializer_that_raises_fails_the_call_and_not_the_next(tmp_path):
    flag = tmp_path / "flag"

    def initialise():
        if not flag.exists():
            raise LookupError("no flag")

    @forkshm.parallel(workers=1, initializer=initialise)
    def works(x):
        return x

    with pytest.raises(LookupError, match="no flag"):
        works.map([1])
    flag.touch()
    assert works.map([1]) == [1]


def test_timeout_and_retries_are_the_pools():
    if "retries" not in inspect.signature(forkshm.Pool).parameters:
        pytest.skip("this Pool has no task_timeout and retries")

    @forkshm.parallel(workers=1, task_timeout=0.2 if CAN_FORK else 10.0, retries=1, on_error="return")
    def slow(path):
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if path.endswith("slow"):
            time.sleep(600)
        return "done"

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        done, late = slow.map([f"{directory}/fast", f"{directory}/slow"])
    assert done == "done"
    assert isinstance(late, forkshm.TaskTimeoutError)


def test_spawned_workers(run_script):
    said = run_script("""
import forkshm
@forkshm.parallel(workers=1, start_method="spawn", worker_init=list)
def where(x):
    where.state.append(x)
    return where.state, forkshm.current_process().name[:15]
if __name__ == "__main__":
    print(where.map([1]), where.map([2]))
""")
    assert said == "[([1], 'SpawnPoolWorker')] [([1, 2], 'SpawnPoolWorker')]\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'return', 'skip', got 'ignore'"),
        ({"chunksize": 0}, "chunksize must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"on_error": "return", "out": bytearray(1)}, "out cannot hold exceptions"),
    ],
)
def test_wrong_options_are_told_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        forkshm.parallel(**options)(abs)


def test_invalid_functions_and_options_are_refused():
    async def coroutine():
        pass

    with pytest.raises(TypeError, match=r"cannot decorate the coroutine function .*: a worker cannot await it"):
        forkshm.parallel(coroutine)
    with pytest.raises(TypeError, match=r"functions and methods, got 3\. .*@parallel\(workers=4\)"):
        forkshm.parallel(3)
    with pytest.raises(TypeError, match=r"@parallel has no option 'n_jobs'\. The options are workers, "):
        forkshm.parallel(n_jobs=2)
    with pytest.raises(
        TypeError, match=r"unknown options of a call: workers. .*pass other options to the decorator, .* starmap"
    ):
        double.map([1], workers=3)
    with pytest.raises(ValueError, match="Use map or starmap with out"):
        forkshm.parallel(workers=1, out=forkshm.zeros(1))(double.__wrapped__).imap([1])


# -- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_progress(kind, capfd, monkeypatch):
    library = pytest.importorskip(kind)
    if kind == "tqdm":
        monkeypatch.setattr(library.tqdm, "monitor_interval", 0)  # otherwise tqdm keeps a thread
    assert double.map(range(30), progress=kind, chunksize=7) == [2 * x for x in range(30)]
    said = "".join(capfd.readouterr())
    assert "30/30" in said
    assert "MB copied" in said
    assert list(double.imap(iter(range(3)), progress=kind)) == [0, 2, 4]
    assert "3" in "".join(capfd.readouterr())
    assert asyncio.run(double.amap(range(3), progress=kind)) == [0, 2, 4]
    assert "3/3" in "".join(capfd.readouterr())


def test_progress_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(
        forkshm.errors.MissingDependencyError, match=r"progress=True needs tqdm: pip install 'forkshm\[progress"
    ):
        double.map([1], progress=True)
    with pytest.raises(ValueError, match="progress must be True, False, 'tqdm' or 'rich', got 'bar'"):
        double.map([1], progress="bar")


# -- origin of functions ------------------------------------------------------------------------


@pytest.mark.needs("inheritance")
def test_functions_of_the_script_see_the_globals_that_an_initializer_set(run_script):
    said = run_script("""
import forkshm

def initialise():
    global factor
    factor = 10

@forkshm.parallel(workers=2, initializer=initialise)
def times(x):
    return x * factor

print(times.map(range(4)))

@forkshm.parallel(workers=2, initializer=initialise)   # the same workers, which do not have this one
def later(x):
    return x + 1 if x else later.__name__

print(later.map([0, 1]))
later.old = later
@forkshm.parallel(workers=2, initializer=initialise)
def later(x):
    return "redefined"
print(later.map([0]))
""")
    assert said == "[0, 10, 20, 30]\n['later', 2]\n['redefined']\n"


def test_the_program_waits_for_submitted_calls_and_ends_its_workers(run_script):
    said = run_script("""
import forkshm, time
@forkshm.parallel(workers=2)
def late(x):
    time.sleep(0.2)
    print("late", flush=True)
late.submit(1)
print("main", flush=True)
""")
    assert said == "main\nlate\n"


def test_recursive_and_dynamic_functions_cross(pool):
    module = types.ModuleType("made_here")

    @forkshm.parallel(workers=1)
    def factorial(x):
        return 1 if x < 2 else x * factorial(x - 1)

    module.factorial = factorial
    assert pool.apply(factorial, (5,)) == 120
    assert factorial.map([5]) == [120]


def test_worker_exit_gets_the_worker_state(tmp_path):
    @forkshm.parallel(workers=2, worker_init=lambda: [os.getpid()], worker_exit=lambda state: ended(state))
    def note(x):
        note.state.append(x)
        return os.getpid()

    def ended(state):
        (tmp_path / str(state[0])).write_text(str(len(state) - 1))

    pids = note.map(range(20), chunksize=1)
    assert list(tmp_path.iterdir()) == []
    note.close()
    assert {int(path.name): int(path.read_text()) for path in tmp_path.iterdir()} == {
        pid: pids.count(pid) for pid in set(pids)
    }


def test_worker_exit_of_the_program_itself_is_called_at_its_end(run_script):
    said = run_script("""
import forkshm, os

@forkshm.parallel(worker_init=lambda: "state", worker_exit=print)
def f(x):
    return f.state, x

print(f(1))
if hasattr(os, "fork"):
    if os.fork() == 0:
        raise SystemExit  # not the child's
    os.wait()
""")
    assert said == "('state', 1)\nstate\n"


@pytest.mark.needs("affinity")
def test_cores_are_given_to_the_workers():
    mine = frozenset(os.sched_getaffinity(0))

    @forkshm.parallel(workers=1, cpu_ids=[min(mine)])
    def cores():
        return frozenset(os.sched_getaffinity(0))

    assert (cores(), cores.submit().result()) == (mine, {min(mine)})
    cores.close()


def test_worker_exit_without_a_state_is_refused():
    with pytest.raises(ValueError, match="cannot use worker_exit without worker_init"):
        forkshm.parallel(worker_exit=print)
