"""forkshm.Executor: futures over a pool; the standard library's own tests are in test_ancestor_executor.py."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import signal
import threading

import numpy as np
import pytest

import forkshm

pytestmark = pytest.mark.usefixtures("_warm_up")


@pytest.fixture
def executor():
    with forkshm.Executor(2) as made:
        yield made


def die(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(fd, value):
    os.read(fd, 1)
    return value


@pytest.fixture
def gate():
    """A pipe; tasks that read of it wait until somebody writes."""
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def test_it_is_an_executor(executor):
    assert isinstance(executor, concurrent.futures.Executor)
    assert executor.submit(pow, 2, exp=5).result() == 32
    assert list(executor.map(pow, [2, 3], [3, 2])) == [8, 9]


def test_one_dead_worker_fails_one_future(executor):
    futures = [executor.submit(die if x == 7 else abs, -x) for x in range(20)]
    assert isinstance(futures[7].exception(), forkshm.WorkerDiedError)
    assert [future.result() for x, future in enumerate(futures) if x != 7] == [x for x in range(20) if x != 7]
    assert executor.submit(abs, -1).result() == 1


def test_shared_arrays_are_shared_and_others_copied_once(executor):
    shared, plain = forkshm.zeros(10), np.ones(100_000)

    def fill(array, value):
        array[:] = value
        return array.sum()

    assert executor.submit(fill, shared, 2).result() == 20
    assert shared[0] == 2
    assert executor.submit(fill, plain, 2).result() == 200_000
    assert plain[0] == 1


def test_what_was_not_begun_can_be_cancelled(gate):
    read_end, write_end = gate
    with forkshm.Executor(1) as executor:
        futures = [executor.submit(wait_for, read_end, x) for x in range(40)]
        assert not futures[0].cancel()
        assert futures[-1].cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            futures[-1].result()
        executor.shutdown(wait=False, cancel_futures=True)
        cancelled = [future.cancelled() for future in futures]
        assert cancelled == sorted(cancelled)
        os.write(write_end, b"." * 40)
        assert [future.result() for future in futures if not future.cancelled()] == list(range(cancelled.count(False)))
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(abs, 1)


def test_what_cannot_be_pickled_fails_its_future_only(executor):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle"):
        executor.submit(id, lock).result()
    assert executor.submit(abs, -1).result() == 1


def test_an_initializer_that_raises_breaks_it():
    def initialise():
        raise LookupError("no model")

    with forkshm.Executor(2, initializer=initialise) as executor:
        with pytest.raises(concurrent.futures.BrokenExecutor, match="no model") as raised:
            executor.submit(abs, 1).result()
        assert isinstance(raised.value.__cause__, LookupError)
        with pytest.raises(concurrent.futures.BrokenExecutor, match="make a new one"):
            executor.submit(abs, 1)


def test_each_worker_takes_so_many_tasks():
    with forkshm.Executor(1, max_tasks_per_child=2) as executor:
        assert len(set(executor.map(lambda _: os.getpid(), range(6)))) == 3


def test_a_context_of_multiprocessing_says_how_workers_start(run_script):
    said = run_script("""
import forkshm, multiprocessing
if __name__ == "__main__":
    with forkshm.Executor(1, multiprocessing.get_context("spawn")) as executor:
        print(executor.submit(lambda: forkshm.current_process().name).result())
""")
    assert said.startswith("SpawnPoolWorker")


def test_buffersize_takes_input_as_it_is_needed(executor):
    taken = []
    items = (taken.append(x) or x for x in range(100))
    results = executor.map(abs, items, buffersize=4)
    assert len(taken) == 4
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) == 6
    assert list(results) == list(range(2, 100))
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="buffersize must be"):
            executor.map(abs, [1], buffersize=wrong)


def test_chunks(executor):
    assert list(executor.map(pow, range(10), range(10), chunksize=3)) == [x**x for x in range(10)]
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        executor.map(abs, [1], chunksize=0)


def test_map_with_a_timeout(executor, gate):
    results = executor.map(wait_for, [gate[0]] * 2, [1, 2], timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    os.write(gate[1], b"..")


def test_a_callback_may_submit_and_shut_down(executor):
    done = threading.Event()
    results = []

    def next_one(future):
        results.append(future.result())
        if len(results) < 5:
            executor.submit(abs, len(results)).add_done_callback(next_one)
        else:
            executor.shutdown()  # would wait for itself
            done.set()

    executor.submit(abs, 0).add_done_callback(next_one)
    assert done.wait(20)
    assert results == [0, 1, 2, 3, 4]


def test_collected_it_finishes_what_was_submitted(gate):
    executor = forkshm.Executor(2)
    futures = [executor.submit(wait_for, gate[0], x) for x in range(30)]
    del executor
    gc.collect()
    os.write(gate[1], b"." * 30)
    assert [future.result() for future in futures] == list(range(30))
    del futures


def test_a_forked_child_is_told(executor, in_child):
    executor.submit(abs, 1).result()

    def child():
        with pytest.raises(forkshm.PoolClosedError, match="this is its child"):
            executor.submit(abs, 1)
        executor.shutdown()

    assert in_child(child) == 0
    assert executor.submit(abs, -1).result() == 1


def test_the_program_waits_for_what_was_submitted(run_script):
    said = run_script("""
import forkshm, time
def late():
    time.sleep(0.2)
    print("late", flush=True)
forkshm.Executor(2).submit(late)
print("main", flush=True)
""")
    assert said == "main\nlate\n"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
        ({"max_tasks_per_child": "1"}, TypeError, "max_tasks_per_child must be an integer"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        forkshm.Executor(**options)


def test_progress(executor, capfd, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # else it keeps a thread
    assert list(executor.map(abs, range(30), progress=True)) == list(range(30))
    assert "30/30" in capfd.readouterr().err
