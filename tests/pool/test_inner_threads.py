"""The number of threads of BLAS and OpenMP in workers."""

from __future__ import annotations

import os
import time

import functions as f
import pytest
from started import methods

import forkshm
from forkshm._multiprocess import fork_server
from forkshm.backend import kernel
from forkshm.pool import _inner_threads

threadpoolctl = pytest.importorskip("threadpoolctl")
np = pytest.importorskip("numpy")


@pytest.fixture(autouse=True, scope="module")
def _warm():
    with pytest.MonkeyPatch.context() as patch:
        for name in _inner_threads.VARIABLES:
            patch.delenv(name, raising=False)
        if methods("forkserver"):
            # A fork server started by other tests may have a variable in its environment.
            fork_server()._forkserver._stop()
        # The fork server and the resource tracker stay.
        for method in methods("fork", "forkserver", "spawn"):
            with forkshm.get_context(method).Pool(1) as pool:
                pool.apply(int)


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    for name in _inner_threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # Gives the results of a machine with four cores.
    monkeypatch.setattr(type(kernel), "usable_cores", lambda _: 4)
    with threadpoolctl.threadpool_limits(4):
        yield


@pytest.mark.parametrize("method", methods("fork", "forkserver", "spawn"))
@pytest.mark.parametrize(("inner", "count"), [("share", 2), (3, 3), (1, 1)])
def test_threads_are_limited(method, inner, count):
    with forkshm.get_context(method).Pool(2, inner_threads=inner) as pool:
        threads, variable = pool.apply(f.inner_threads)
    assert variable == str(count)
    # A newly loaded library has at most as many threads as there are cores.
    assert threads == ({count} if method == "fork" else {min(count, os.cpu_count() or 1)})


def test_nothing_is_limited_when_asked_for():
    with forkshm.Pool(2, inner_threads=None) as pool:
        assert pool.apply(f.inner_threads) == ({4}, None)


def test_one_worker_may_use_all_cores():
    with forkshm.Pool(1) as pool:
        assert pool.apply(f.inner_threads) == ({4}, None)


def test_the_parent_keeps_its_threads():
    with forkshm.Pool(2) as pool:
        pool.apply(f.inner_threads)
        assert f.inner_threads() == ({4}, None)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_limits_set_by_the_user_are_kept(monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with forkshm.Pool(2) as pool:
        threads, _ = pool.apply(f.inner_threads)
        assert threads == {4}
    with forkshm.Pool(2, inner_threads=2) as pool:  # unless the caller passes a number
        assert pool.apply(f.inner_threads) == ({2}, "2")


@pytest.mark.parametrize("method", methods("fork", "forkserver", "spawn"))
def test_a_limit_that_the_program_sets_is_kept_by_each_start_method(monkeypatch, method):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # after the fork server has started
    with forkshm.get_context(method).Pool(2) as pool:
        assert pool.apply(f.inner_threads)[1] == "3"


def test_workers_with_cores_of_their_own_use_as_many_threads():
    cores = list(kernel.use_cpus(None))
    with forkshm.Pool(2, cpu_ids=[cores[0]]) as pool:
        assert pool.apply(f.inner_threads) == ({1}, "1")


def test_a_replaced_worker_is_limited():
    with forkshm.Pool(2, maxtasksperchild=1) as pool:
        assert {str(pool.apply(f.inner_threads)) for _ in range(4)} == {"({2}, '2')"}


def inner_of_inner(_):
    with forkshm.Pool(1, inner_threads="share") as pool:
        return pool.apply(f.inner_threads)


def test_a_pool_in_a_worker_does_not_widen_the_limit():
    with forkshm.Pool(2) as pool:
        assert pool.map(inner_of_inner, [0]) == [({2}, "2")]


def test_an_executor_passes_the_number_on():
    with forkshm.Executor(2, inner_threads=3) as executor:
        assert executor.submit(f.inner_threads).result() == ({3}, "3")


def test_a_number_may_be_numpys():
    with forkshm.Pool(2, inner_threads=np.int64(3)) as pool:
        assert pool.apply(f.inner_threads) == ({3}, "3")


@pytest.mark.parametrize("inner", [0, -1, "2"])
def test_numbers_below_one_and_words_are_refused(inner):
    with pytest.raises(ValueError, match="inner_threads must be at least 1, 'share', or None for no limit; got"):
        forkshm.Pool(1, inner_threads=inner)


def test_without_threadpoolctl_variables_are_set(monkeypatch):
    monkeypatch.setattr(_inner_threads, "_modules", 0)  # forces a new look
    monkeypatch.setattr(_inner_threads.importlib.util, "find_spec", lambda name: None)
    with forkshm.Pool(2) as pool:
        assert pool.apply(f.inner_threads) == ({4}, "2")


def test_a_process_and_a_team_are_not_limited():
    results = forkshm.Queue()
    process = forkshm.Process(target=lambda: results.put(f.inner_threads()))
    process.start()
    assert results.get() == ({4}, None)
    process.join()
    with forkshm.team(2) as team:
        found = team.reduce([f.inner_threads()])
    assert found == [({4}, None)] * 2


def threads_and_time():
    """Return the number of threads of this process, and its CPU usage while it sleeps."""
    began = time.process_time()
    time.sleep(0.15)
    return len(os.listdir("/proc/self/task")), time.process_time() - began


@pytest.mark.needs("fork")
def test_a_limit_starts_no_threads_that_keep_a_core_busy():
    _inner_threads.prepare()
    if not _inner_threads._numbers:
        pytest.skip("no OpenBLAS, or one that does not show its number of threads")
    with forkshm.Pool(1, inner_threads=1) as pool:
        threads, seconds = pool.apply(threads_and_time)
    assert threads == (1 if kernel.name == "linux" else 2)  # elsewhere a thread waits for the parent's end
    assert seconds < 0.1
    with forkshm.Pool(1, inner_threads=2) as pool:
        product = pool.apply(np.dot, (np.ones((300, 300)), np.ones((300, 300))))
    assert (product == 300).all()
