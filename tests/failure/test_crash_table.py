"""Deaths of a worker in each phase and in each way: only its own task fails, and the pool continues."""

import os
import signal

import functions as f
import pytest
import started

import forkshm
from forkshm import TaskTimeoutError, WorkerDiedError
from forkshm.backend import kernel
from forkshm.pool._status import IDLE

pytestmark = pytest.mark.slow

# The phase, and the call that dies in it. {how} is the way to die.
LIVES = {
    "while its arguments are unpickled": lambda how: (f.nothing, (f.DieAtUnpickle(how),)),
    "while it runs": lambda how: (f.die, (how,)),
    "while its result is pickled": lambda how: (f.make, (f.DieAtPickle, how, os.getpid())),
    "while it sends its result": lambda how: (f.die_at_sending, (how,)),
}
WAYS = {
    "SIGKILL": (-9, "SIGKILL"),
    "SIGSEGV": (-signal.SIGSEGV, "SIGSEGV"),
    "bad memory access": (-signal.SIGSEGV, "SIGSEGV") if started.CAN_FORK else (0xC0000005, None),
    "SIGTERM": (-signal.SIGTERM, "SIGTERM"),
    "exit": (17, None),
    "sys.exit": (17, None),
}
METHODS = started.methods("fork", "forkserver")
# In the user's code, ``sys.exit`` is an exception like others, which the caller gets: test_exceptions_that_end.py.
TABLE = [(where, how) for where in LIVES for how in WAYS if how != "sys.exit" or where == "while it sends its result"]
# Starting a process of these methods takes a second, so only part of the table is tested.
SPAWNED = [("spawn", where, "SIGKILL") for where in LIVES]
# Most ways to end a process do not depend on its start method.
EITHER_WAY = [(METHODS[0], how) for how in WAYS] + [(METHODS[1], how) for how in ("SIGKILL", "sys.exit")]


@pytest.fixture(autouse=True)
def _no_crash_reports(monkeypatch):
    # A worker that segfaults on purpose would print the stacks of faulthandler.
    import faulthandler

    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if enabled:
        faulthandler.enable()


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(
    ("method", "where", "how"),
    list(dict.fromkeys([(method, where, how) for method in METHODS for where, how in TABLE] + SPAWNED)),
)
def test_only_the_task_whose_worker_died_fails(method, where, how):
    exitcode, name = WAYS[how]
    function, args = LIVES[where](how)
    with forkshm.get_context(method).Pool(2) as pool:
        others = [pool.apply_async(f.square, (x,)) for x in range(50)]
        with pytest.raises(WorkerDiedError) as caught:
            pool.apply(function, args)
        error = caught.value
        assert error.exitcode == exitcode
        assert error.signal == name
        assert error.pid > 0
        assert function.__name__ in error.task
        assert str(error.pid) in str(error)
        assert (name or f"code {exitcode}") in str(error)
        assert [other.get() for other in others] == [x * x for x in range(50)]
        assert pool.map(f.square, range(100)) == [x * x for x in range(100)]
        assert pool.statistics().workers_replaced == 1


@pytest.mark.needs("signals")
@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("where", LIVES)
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_stopped_forever_fails_its_task_in_time(method, where):
    function, args = LIVES[where]("SIGSTOP")
    with forkshm.get_context(method).Pool(2, task_timeout=1.0) as pool:
        others = [pool.apply_async(f.square, (x,)) for x in range(50)]
        with pytest.raises(TaskTimeoutError) as caught:
            pool.apply(function, args)
        assert function.__name__ in caught.value.task
        assert [other.get() for other in others] == [x * x for x in range(50)]


@pytest.mark.needs("memory_limits")
@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("where", LIVES)
@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_is_an_exception_or_a_death_of_that_task_only(method, where):
    """Under a limit on memory, a process that needs more gets an error or is killed."""
    function, args = LIVES[where]("MemoryError")
    with forkshm.get_context(method).Pool(2) as pool:
        with pytest.raises((MemoryError, OSError, forkshm.SerializationError, WorkerDiedError)):
            pool.apply(function, args)
        assert pool.map(f.square, range(100)) == [x * x for x in range(100)]


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "SIGTERM"])
@pytest.mark.parametrize("method", METHODS)
def test_the_death_of_an_idle_worker_affects_no_task(method, how):
    with forkshm.get_context(method).Pool(2) as pool:
        assert pool.map(f.square, range(10)) == [x * x for x in range(10)]
        for worker in list(pool._worker_group.workers):
            os.kill(worker.pid, getattr(signal, how))
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]


@pytest.mark.needs("signals")
@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(("method", "how"), [*EITHER_WAY, (METHODS[0], "MemoryError"), (METHODS[1], "MemoryError")])
def test_the_exit_of_an_idle_worker_affects_no_task(method, how, wait_until):
    """The death is in a signal handler, in a finalizer, or in a thread of the user."""
    with forkshm.get_context(method).Pool(1) as pool:
        pid = pool.apply(f.die_at_sigusr1, (how,))
        wait_until(lambda: pool._worker_group.status.states() == [IDLE])
        os.kill(pid, signal.SIGUSR1)
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]
        assert pool.apply(f.pid) != pid
        assert pool.statistics().workers_replaced == 1


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(
    ("method", "how"),
    [*EITHER_WAY, *((method, how) for method in METHODS for how in ("MemoryError", "SIGSTOP"))],
)
def test_a_task_that_was_received_and_not_named_is_done_by_another(method, how, tmp_path):
    """The task was not begun. The worker to be killed may or may not take the next task."""
    with forkshm.get_context(method).Pool(2, task_timeout=1.0 if how == "SIGSTOP" else None) as pool:
        pool.apply(f.die_with_the_next_task, (how, tmp_path / "mark"))
        results = [pool.apply_async(f.square, (x,)) for x in range(200)]
        assert [result.get(60) for result in results] == [x * x for x in range(200)]
        while not (tmp_path / "mark").exists():
            assert pool.apply(f.square, (3,)) == 9
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(
    ("method", "how"),
    [*(way for way in EITHER_WAY if way[1] != "sys.exit"), (METHODS[0], "SIGSTOP"), (METHODS[1], "SIGSTOP")],
)
def test_a_task_that_was_received_and_named_and_not_begun_fails(method, how, tmp_path):
    timeout, kind = (1.0, TaskTimeoutError) if how == "SIGSTOP" else (None, WorkerDiedError)
    with forkshm.get_context(method).Pool(1, task_timeout=timeout) as pool:
        pool.apply(f.die_before_the_next_begins, (how, tmp_path / "mark"))
        results = [pool.apply_async(f.square, (x,)) for x in range(20)]
        with pytest.raises(kind) as caught:
            results[0].get()
        assert how == "SIGSTOP" or caught.value.exitcode == WAYS[how][0]
        assert [result.get() for result in results[1:]] == [x * x for x in range(1, 20)]


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(("method", "how"), EITHER_WAY)
def test_a_worker_that_dies_in_the_initializer_is_replaced(method, how, tmp_path):
    with forkshm.get_context(method).Pool(2, f.initializer_dies_once, (tmp_path / "mark", how)) as pool:
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]


@pytest.mark.needs("signals")
@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_stopped_in_the_initializer_is_replaced(method, tmp_path):
    with forkshm.get_context(method).Pool(
        1, f.initializer_dies_once, (tmp_path / "mark", "SIGSTOP"), task_timeout=1.0
    ) as pool:
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(("method", "how"), [*EITHER_WAY, (METHODS[0], "SIGSTOP"), (METHODS[1], "SIGSTOP")])
def test_a_worker_that_dies_at_maxtasksperchild_has_answered(method, how):
    """The worker dies in a finalizer, after the last of its tasks."""
    timeout = 1.0 if how == "SIGSTOP" else None
    with forkshm.get_context(method).Pool(2, f.die_at_exit, (how,), maxtasksperchild=2, task_timeout=timeout) as pool:
        assert pool.map(f.square, range(8), chunksize=1) == [x * x for x in range(8)]
        assert pool.statistics().workers_replaced >= 2


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize(("method", "how"), [*EITHER_WAY, (METHODS[0], "SIGSTOP"), (METHODS[1], "SIGSTOP")])
def test_terminate_while_workers_die(method, how, tmp_path, wait_until):
    """The worker dies in the handler of the signal that should end it."""
    pool = forkshm.get_context(method).Pool(2)
    results = [pool.apply_async(f.die_at_sigterm, (tmp_path / str(x), how)) for x in range(2)]
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    pids = [worker.pid for worker in pool._worker_group.workers]
    pool.terminate()
    pool.join()
    for result in results:
        with pytest.raises(forkshm.PoolClosedError):
            result.get()
    assert not any(kernel.is_running(pid) for pid in pids)


@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_a_map_raises_for_the_item_that_killed_its_worker(pool, how):
    with pytest.raises(WorkerDiedError, match=r"die_on_three\(3, '.*'\)|die_on_three") as caught:
        pool.starmap(f.die_on_three, [(x, how) for x in range(10)], chunksize=1)
    assert "3" in caught.value.task
    results = pool.imap(lambda x: f.die_on_three(x, how), range(8))
    got = []
    while True:
        try:
            got.append(next(results))
        except WorkerDiedError:
            got.append("died")
        except StopIteration:
            break
    assert got == [0, 1, 2, "died", 4, 5, 6, 7]


def test_the_error_names_the_item_of_a_chunk(pool):
    with pytest.raises(WorkerDiedError, match="item 3 of the input"):
        pool.map(lambda x: f.die_on_three(x, "SIGKILL"), range(10), chunksize=10)


def test_tasks_batched_behind_a_dead_task_are_done(pool, tmp_path):
    marks = tmp_path / "marks"

    def work(x):
        if x == 2500:
            f.end("SIGKILL")
        return f.touch_file(marks, x)

    # Fast enough, before and after, for several tasks to share a message.
    result = pool.map_async(work, range(3000), chunksize=1)
    with pytest.raises(WorkerDiedError, match="work"):
        result.get()
    done = [int(line) for line in marks.read_text().split()]
    assert sorted(done) == [x for x in range(3000) if x != 2500]


def test_every_worker_dying_at_once_fails_its_own_task_only():
    with forkshm.Pool(4) as pool:
        doomed = [pool.apply_async(f.die, ("SIGKILL",)) for _ in range(12)]
        fine = [pool.apply_async(f.square, (x,)) for x in range(30)]
        assert [each.get() for each in fine] == [x * x for x in range(30)]
        for each in doomed:
            with pytest.raises(WorkerDiedError):
                each.get()
        assert pool.statistics().workers_replaced == 12


def test_callbacks_hear_of_a_death(pool, wait_until):
    heard = []
    pool.apply_async(f.die, ("exit",), error_callback=heard.append)
    wait_until(lambda: heard)
    assert isinstance(heard[0], WorkerDiedError)


@pytest.mark.parametrize("how", ["SIGKILL", "exit", "sys.exit"])
def test_workers_that_die_in_the_initializer_end_the_pool_not_the_machine(how):
    with forkshm.Pool(2, f.initializer_dies, (how,)) as pool:
        with pytest.raises(WorkerDiedError, match="its initializer"):
            pool.map(f.square, range(10))
        with pytest.raises(WorkerDiedError):
            pool.apply(f.square, (1,))


def test_memory_of_a_dead_worker_comes_back(pool):
    import numpy as np

    from forkshm.region.blocks._arena import arena

    def die_with(array):
        f.end("SIGKILL")

    big = np.ones(1_000_000)
    for _ in range(5):
        with pytest.raises(WorkerDiedError, match=r"die_with\(ndarray float64 \(1000000,\)\)"):
            pool.apply(die_with, (big,))
    assert arena.statistics().blocks == 0
