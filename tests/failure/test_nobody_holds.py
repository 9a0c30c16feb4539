"""Unreferenced pools: their asynchronous results still arrive, and then the pools end."""

import functools
import gc
import os
import time
import warnings

import functions as f
import pytest
import started

import forkshm
from forkshm.backend import kernel

pytestmark = pytest.mark.filterwarnings("ignore:unclosed running:ResourceWarning")

METHODS = started.methods("fork", "forkserver")
WANTED = [0, 1, 4, 9, 16]


class Holder:
    def __init__(self, context):
        self.pool = context.Pool(2)
        self.itself = self  # only the collector finds this

    def run(self):
        return self.pool.imap(f.square, range(5))


def generator(context):
    yield from context.Pool(2).imap_unordered(f.square, range(5))


def closed(context):
    pool = context.Pool(2)
    result = pool.map_async(f.square, range(5))
    pool.close()
    return result


CALLS = {
    "for x in imap()": lambda context: [x for x in context.Pool(2).imap(f.square, range(5))],  # noqa: C416
    "imap() of many": lambda context: list(context.Pool(2).imap(f.square, range(100)))[:5],
    "imap_unordered()": lambda context: sorted(context.Pool(2).imap_unordered(f.square, range(5))),
    "map_async()": lambda context: context.Pool(2).map_async(f.square, range(5)).get(60),
    "starmap_async()": lambda context: context.Pool(2).starmap_async(pow, [(x, 2) for x in range(5)]).get(60),
    "apply_async()": lambda context: [context.Pool(2).apply_async(f.square, (x,)).get(60) for x in range(5)],
    "wait() and get()": lambda context: waited(context.Pool(2).map_async(f.square, range(5))),
    "callback": lambda context: called_back(context),
    "generator": lambda context: sorted(generator(context)),
    "attribute in a cycle": lambda context: list(Holder(context).run()),
    "closed": lambda context: closed(context).get(60),
    "map()": lambda context: context.Pool(2).map(f.square, range(5)),
}


def waited(result):
    gc.collect()
    result.wait(60)
    gc.collect()
    assert result.successful()
    return result.get()


def called_back(context):
    got = []
    result = context.Pool(2).map_async(f.square, range(5), callback=got.extend)
    result.wait(60)
    return got


def workers_of(pool):
    return [worker.pid for worker in pool._worker_group.workers]


def gone(pids):
    gc.collect()
    return not any(kernel.is_running(pid) for pid in pids)


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", CALLS)
def test_results_of_a_dropped_pool_arrive(call, method):
    """Nothing is left behind either, which the fixture of all tests checks."""
    assert CALLS[call](forkshm.get_context(method)) == WANTED
    gc.collect()


def test_a_dropped_pool_ends_once_its_results_are_answered(wait_until):
    pool = forkshm.Pool(2)
    pids = workers_of(pool)
    result = pool.apply_async(f.square, (3,))
    del pool
    assert result.get(60) == 9
    wait_until(functools.partial(gone, pids))


@pytest.mark.parametrize("wait", ["ready", "wait", "get"])
def test_a_dropped_pool_ends_while_its_result_is_kept(wait, wait_until):
    pool = forkshm.Pool(1)
    pids = workers_of(pool)
    result = pool.apply_async(f.square, (3,))
    del pool
    wait_until(result.ready) if wait == "ready" else getattr(result, wait)(60)
    wait_until(functools.partial(gone, pids))
    assert result.get() == 9


def test_a_call_without_a_result_object_is_done(tmp_path, wait_until):
    pool = forkshm.Pool(1)
    pids = workers_of(pool)
    for name in range(3):
        pool.apply_async(f.touch_file, (tmp_path / "marks", name))
    del pool
    wait_until(functools.partial(gone, pids))
    assert (tmp_path / "marks").read_text().split() == ["0", "1", "2"]


def test_an_iterator_that_is_not_exhausted_keeps_nothing(wait_until):
    pool = forkshm.Pool(1)
    pids = workers_of(pool)
    results = pool.imap(f.square, iter(int, 1))  # without end
    del pool
    assert next(results) == 0
    del results
    wait_until(functools.partial(gone, pids))


def test_an_interrupted_call_of_a_dropped_pool_is_abandoned(wait_until):
    """No caller can ask for the result any more."""
    pool = forkshm.Pool(1)
    pids = workers_of(pool)

    def interrupt(*_):
        raise KeyboardInterrupt

    with started.interrupting(interrupt, 0.2), pytest.raises(KeyboardInterrupt):
        pool.map(time.sleep, [30] * 10)
    del pool
    wait_until(functools.partial(gone, pids), 10)


def test_an_interrupted_finalizer_still_ends_the_workers(monkeypatch, wait_until):
    pool = forkshm.Pool(1)
    pids = workers_of(pool)
    result = pool.apply_async(time.sleep, (60,))
    dispatcher = type(pool._dispatcher)
    fail_all = dispatcher.fail_all

    def interrupted(self, error):
        monkeypatch.setattr(dispatcher, "fail_all", fail_all)
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatcher, "fail_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool._finalizer()
    with pytest.raises(forkshm.PoolClosedError):
        result.get(60)
    wait_until(functools.partial(gone, pids))


def test_results_of_a_terminated_pool_raise():
    pool = forkshm.Pool(1)
    result = pool.apply_async(time.sleep, (60,))
    pool.terminate()
    del pool
    with pytest.raises(forkshm.PoolClosedError):
        result.get(60)


def test_a_dropped_pool_warns():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        result = forkshm.Pool(1).apply_async(f.square, (3,))
    assert [warning.category for warning in caught] == [ResourceWarning]
    assert result.get(60) == 9


def test_a_forked_child_leaves_the_pool_alone(in_child):
    pool = forkshm.Pool(1)
    result = pool.apply_async(time.sleep, (0.3,))

    def drop():
        nonlocal pool, result
        del pool, result
        gc.collect()
        return os.getpid() == 0

    assert in_child(drop) == 0
    assert result.get(60) is None
