"""Programs that check for the standard library's pool, executor or process accept forkshm's."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import multiprocessing.pool
import operator
import os
import signal
import time

import pytest
from capability_skips import has

import forkshm


def test_a_pool_is_one_of_the_standard_librarys_and_tells_its_size():
    with forkshm.Pool(2) as pool:
        assert isinstance(pool, multiprocessing.pool.Pool)
        assert not isinstance(pool, multiprocessing.pool.ThreadPool)
        assert pool._ctx is forkshm.get_context()
        assert pool.size == pool._processes == len(pool._pool) == 2
        # None of the standard library's threads and queues exists.
        assert not hasattr(pool, "_taskqueue")
        assert not hasattr(pool, "_worker_handler")


def test_no_method_of_the_standard_librarys_pool_is_reached():
    theirs = {name for name, value in vars(multiprocessing.pool.Pool).items() if callable(value) and name[0] != "_"}
    assert theirs <= set(vars(forkshm.Pool)) | {"Process"}


class Sized(forkshm.Pool):
    def __init__(self, processes):
        super().__init__(processes)
        self.size = self._processes


def test_a_subclass_may_have_a_size_of_its_own():
    with Sized(2) as pool:
        assert pool.size == pool._processes == 2


def test_the_processes_of_an_executor_count_as_a_number():
    with forkshm.Executor(2) as executor:
        assert (100 // executor._processes + (100 % executor._processes != 0)) * executor._processes == 100
        assert operator.index(executor._processes) == 2


def test_an_executor_is_one_of_processes():
    with forkshm.Executor(2) as executor:
        assert isinstance(executor, concurrent.futures.ProcessPoolExecutor)
        assert executor._max_workers == 2
        assert executor._processes == {}
        pid = executor.submit(os.getpid).result()
        assert pid in executor._processes
        assert len(executor._processes) == 2


@pytest.mark.parametrize("method", ["terminate_workers", "kill_workers"])
def test_an_executors_workers_can_be_ended(method):
    executor = forkshm.Executor(2)
    done = executor.submit(abs, -1)
    assert done.result() == 1
    running = [executor.submit(time.sleep, 600) for _ in range(5)]
    pids = list(executor._processes)
    getattr(executor, method)()
    for future in running:
        with pytest.raises(forkshm.PoolClosedError):
            future.result(timeout=10)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    if has("signals"):
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    getattr(executor, method)()  # a second call does nothing


def test_ending_workers_that_never_started():
    executor = forkshm.Executor(2)
    executor.kill_workers()
    with pytest.raises(RuntimeError):
        executor.submit(abs, 1)


def _wait_for_an_interrupt(connection):
    # Overrides a handler that other tests have left in this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        connection.send("ready")
        time.sleep(600)
    except KeyboardInterrupt:
        connection.send("interrupted")


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("kind", ["default", "fork"])
def test_a_process_can_be_interrupted(kind):
    here, there = forkshm.Pipe()
    make = forkshm.Process if kind == "default" else forkshm.get_context(kind).Process
    process = make(target=_wait_for_an_interrupt, args=(there,))
    with pytest.raises(ValueError, match="not started"):
        process.interrupt()
    process.start()
    assert here.recv() == "ready"
    process.interrupt()
    assert here.poll(60)
    assert here.recv() == "interrupted"
    process.join()
    assert process.exitcode == 0
    process.close()
    here.close()
    there.close()
    with pytest.raises(ValueError, match="closed"):
        process.interrupt()


def test_dask_takes_pools_and_executors():
    pytest.importorskip("dask")
    import dask
    import dask.multiprocessing

    tasks = dask.delayed(sum)([dask.delayed(pow)(x, 2) for x in range(10)])
    pids = dask.delayed(os.getpid)()
    with forkshm.Pool(2) as pool, forkshm.Executor(2) as executor:
        for options in (
            {"scheduler": executor},
            {"scheduler": "processes", "pool": pool},
            {"scheduler": "processes", "pool": executor},
        ):
            assert tasks.compute(**options) == 285
            assert pids.compute(**options) != os.getpid()


def test_dask_hears_of_a_killed_worker():
    pytest.importorskip("dask")
    import dask

    with forkshm.Executor(1) as executor:
        doomed = dask.delayed(os.kill)(dask.delayed(os.getpid)(), getattr(signal, "SIGKILL", signal.SIGTERM))
        with pytest.raises(forkshm.WorkerDiedError):
            doomed.compute(scheduler=executor)
        assert dask.delayed(abs)(-2).compute(scheduler=executor) == 2


def test_adaptive_takes_an_executor():
    adaptive = pytest.importorskip("adaptive")
    learner = adaptive.Learner1D(abs, bounds=(-1, 1))
    with forkshm.Executor(2) as executor:
        adaptive.BlockingRunner(learner, npoints_goal=10, executor=executor)
    assert learner.npoints >= 10
