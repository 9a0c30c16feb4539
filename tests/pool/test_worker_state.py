"""State of workers (``worker_init``, ``worker_exit``, `worker_state`), and their cores (``cpu_ids``)."""

import os
import re
import signal
import threading

import functions as f
import pytest

import forkshm
from forkshm import WorkerDiedError, aio
from forkshm.pool import _worker_state

pytestmark = pytest.mark.usefixtures("_warm_up")


class Notes:
    """Creates a state, and records which workers ended normally."""

    def __init__(self, directory):
        self.directory = directory

    def init(self):
        return {"pid": os.getpid(), "done": 0}

    def exit(self, state):
        assert state["pid"] == os.getpid()
        (self.directory / str(state["pid"])).write_text(str(state["done"]))

    def written(self):
        return {int(path.name): int(path.read_text()) for path in self.directory.iterdir()}


@pytest.fixture
def notes(tmp_path):
    directory = tmp_path / "notes"
    directory.mkdir()
    return Notes(directory)


def work(_):
    state = forkshm.worker_state()
    state["done"] += 1
    return state["pid"]


def made(notes, workers=2, **options):
    return forkshm.Pool(workers, worker_init=notes.init, worker_exit=notes.exit, **options)


def test_each_worker_has_a_state_that_worker_exit_receives(notes):
    pool = made(notes)
    pids = pool.map(work, range(40), chunksize=1)
    assert set(pids) <= {process.pid for process in pool._pool}
    pool.close()
    pool.join()
    written = notes.written()
    assert len(written) == 2
    assert {pid: count for pid, count in written.items() if count} == {pid: pids.count(pid) for pid in set(pids)}


def test_a_worker_that_makes_room_ends_in_order(notes):
    with made(notes, 1, maxtasksperchild=2) as pool:
        pids = [pool.apply(work, (0,)) for _ in range(5)]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    assert notes.written() == {pids[0]: 2, pids[2]: 2, pids[4]: 1}


def test_worker_exit_runs_in_idle_workers_at_the_end_of_a_with_block(notes, tmp_path, wait_until):
    begun = tmp_path / "begun"
    with made(notes) as pool:
        pids = {process.pid for process in pool._pool}
        hanging = pool.apply_async(f.hang, (begun,))
        wait_until(begun.exists)
        never = [pool.apply_async(f.hang, (tmp_path / "never",)) for _ in range(3)]
        wait_until((tmp_path / "never").exists)
    assert notes.written() == {}  # both workers were running a task
    with made(notes) as pool:
        pids = {process.pid for process in pool._pool}
        begun.unlink()
        hanging = pool.apply_async(f.hang, (begun,))
        wait_until(begun.exists)
        (idle,) = {pool.apply(work, (0,))}
    assert notes.written() == {idle: 1}
    assert idle in pids
    for result in (hanging, *never):
        with pytest.raises(forkshm.PoolClosedError):
            result.get()


def test_queued_tasks_of_a_terminated_pool_are_not_begun(notes, tmp_path):
    with made(notes, 1) as pool:
        pid = pool.apply(work, (0,))
        os.kill(pid, signal.SIGSTOP)
        pool.map_async(f.touch_file, [tmp_path / "queued"], 1)
        threading.Timer(0.2, os.kill, (pid, signal.SIGCONT)).start()
    assert not (tmp_path / "queued").exists()
    assert set(notes.written()) <= {pid}


def test_a_killed_worker_runs_no_worker_exit(notes):
    with made(notes, 1) as pool:
        first = pool.apply(work, (0,))
        with pytest.raises(WorkerDiedError):
            pool.apply(f.die, ("SIGKILL",))
        second = pool.apply(work, (0,))
    assert first != second
    assert notes.written() == {second: 1}


def test_an_exception_of_worker_exit_is_printed(capfd):
    with forkshm.Pool(1, worker_exit=f.fail) as pool:
        pool.apply(f.nothing)
    said = capfd.readouterr().err
    assert re.search(r"worker_exit raised in (Fork|Spawn)PoolWorker-\d", said)
    assert "ValueError: bad None" in said


def test_worker_exit_has_a_bounded_time(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(_worker_state, "_SECONDS", 0.2)
    hang = tmp_path / "hang"
    with forkshm.Pool(1, maxtasksperchild=1, worker_init=lambda: hang, worker_exit=f.hang) as pool:
        # The second task waits for the replacement of the worker that hangs.
        assert pool.apply(f.pid) != pool.apply(f.pid)
        assert hang.exists()
    # A worker that was not forked does not see the patch.
    assert re.search(r"longer than (0\.2|10) seconds, so it is ended; it was at:", capfd.readouterr().err)


def test_worker_exit_that_hangs_does_not_keep_terminate(tmp_path):
    pool = forkshm.Pool(2, worker_init=lambda: tmp_path / "hang", worker_exit=f.hang)
    pool.apply(f.nothing)
    pool.terminate()
    pool.join()
    assert (tmp_path / "hang").exists()


def test_a_worker_init_that_raises_fails_the_pool():
    with forkshm.Pool(1, worker_init=lambda: f.fail("init")) as pool, pytest.raises(ValueError, match="bad init"):
        pool.apply(f.square, (1,))


def test_worker_state_without_a_state_raises(pool):
    with pytest.raises(RuntimeError, match=r"process \d+ has no worker state: it is not a worker of a pool made with"):
        forkshm.worker_state()
    with pytest.raises(RuntimeError, match="has no worker state"):
        pool.apply(forkshm.worker_state)


def in_child_of_worker(in_child):
    def ask():
        with pytest.raises(RuntimeError, match="has no worker state"):
            forkshm.worker_state()

    return in_child(ask)


def test_a_child_of_a_worker_has_no_state(notes, in_child):
    with made(notes, 1) as pool:
        assert pool.apply(in_child_of_worker, (in_child,)) == 0
    assert list(notes.written().values()) == [0]  # the process did not end like a worker


@pytest.mark.needs("affinity")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_have_a_state(run_script, method):
    source = f"""
import forkshm, os

if __name__ == "__main__":
    cpus = [min(os.sched_getaffinity(0))] if hasattr(os, "sched_getaffinity") else None
    with forkshm.get_context({method!r}).Pool(1, worker_init=lambda: [1], worker_exit=print, cpu_ids=cpus) as pool:
        assert pool.apply(lambda: forkshm.worker_state().append(2)) is None
        assert cpus is None or pool.apply(os.sched_getaffinity, (0,)) == set(cpus)
"""
    assert run_script(source) == "[1, 2]\n"


def test_the_executor_and_the_pool_of_asyncio_take_them(notes):
    import asyncio

    with forkshm.Executor(1, worker_init=notes.init, worker_exit=notes.exit) as executor:
        first = executor.submit(work, 0).result()

    async def main():
        async with aio.Pool(1, worker_init=notes.init, worker_exit=notes.exit) as pool:
            return await pool.call(work, 0)

    assert notes.written() == {first: 1}
    second = asyncio.run(main())
    assert notes.written() == {first: 1, second: 1}


@pytest.mark.parametrize("name", ["worker_init", "worker_exit"])
def test_worker_functions_must_be_callable(name):
    with pytest.raises(TypeError, match=f"{name} must be a callable, got 1"):
        forkshm.Pool(1, **{name: 1})


def cores(_):
    return os.getpid(), frozenset(os.sched_getaffinity(0))


@pytest.mark.needs("affinity")
def test_workers_run_on_the_cores_they_are_given():
    mine = sorted(os.sched_getaffinity(0))
    one, all_of_them = {mine[0]}, set(mine)
    with forkshm.Pool(2, cpu_ids=[mine[0], mine]) as pool:
        seen = {}
        while len(seen) < 2:
            seen.update(pool.map(cores, range(20), chunksize=1))
        slots = {worker.pid: worker.slot for worker in pool._worker_group.workers}
        assert {slots[pid]: cpus for pid, cpus in seen.items()} == {0: one, 1: all_of_them}
    with forkshm.Pool(3, cpu_ids=[mine[-1]]) as pool:
        assert {cpus for _, cpus in pool.map(cores, range(20), chunksize=1)} == {frozenset({mine[-1]})}
        with pytest.raises(WorkerDiedError):
            pool.apply(f.die, ("SIGKILL",))
        assert {cpus for _, cpus in pool.map(cores, range(20), chunksize=1)} == {frozenset({mine[-1]})}
    assert os.sched_getaffinity(0) == all_of_them


@pytest.mark.needs("affinity")
@pytest.mark.parametrize(
    ("cpu_ids", "error", "said"),
    [
        ([], ValueError, "cpu_ids names no core"),
        ([[]], ValueError, "cpu_ids names no core"),
        ([0, 10**6], ValueError, "cpu_ids names core 1000000, which this process cannot use"),
        ([[0, 1000]], ValueError, "cpu_ids names core 1000, which this process cannot use"),
        ([-1], ValueError, "cpu_ids names core -1, which"),
        ([10**30], ValueError, "which this process cannot use"),
        (["a"], TypeError, "an entry of cpu_ids must be a number or several, got 'a'"),
        ([None], TypeError, "an entry of cpu_ids must be a number or several, got None"),
    ],
)
def test_cores_that_cannot_be_used_are_refused_before_a_worker_starts(cpu_ids, error, said):
    before = os.sched_getaffinity(0)
    with pytest.raises(error, match=said):
        forkshm.Pool(1, cpu_ids=cpu_ids)
    assert os.sched_getaffinity(0) == before
