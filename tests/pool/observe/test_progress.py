"""``progress=`` on every mapping call of a pool."""

import asyncio
import gc
import threading
import time

import functions as f
import pytest

import forkshm
from forkshm import aio

pytestmark = pytest.mark.usefixtures("_warm_up")


@pytest.fixture(params=["tqdm", "rich"])
def kind(request, monkeypatch):
    library = pytest.importorskip(request.param)
    if request.param == "tqdm":
        monkeypatch.setattr(library.tqdm, "monitor_interval", 0)  # otherwise tqdm keeps a thread
    monkeypatch.setenv("COLUMNS", "200")
    return request.param


def first_element(array):
    return float(array[0])


def said_by(capfd):
    captured = capfd.readouterr()
    # A terminal of 80 columns may break lines.
    return " ".join((captured.out + captured.err).split())


def test_a_map_shows_its_progress(pool, kind, capfd):
    items = list(range(30))
    squares = [x * x for x in items]
    assert pool.map(f.square, items, 7, progress=kind) == squares
    assert "30/30" in said_by(capfd)
    assert pool.starmap(f.add, [(x, 1) for x in items], progress=kind) == [x + 1 for x in items]
    said = said_by(capfd)
    assert "30/30" in said
    assert "0.0 MB copied, 0.0 MB shared" in said
    assert "/s" in said  # the speed
    assert pool.map(f.square, [], progress=kind) == []
    assert "0/0" in said_by(capfd) or kind == "tqdm"


def test_asynchronous_maps_show_progress_without_a_waiting_caller(pool, kind, capfd, wait_until):
    result = pool.map_async(f.square, range(30), 4, progress=kind)
    wait_until(result.is_answered)  # does not drive the pool
    assert "30/30" in said_by(capfd)
    assert result.get() == [x * x for x in range(30)]
    seen = []
    result = pool.starmap_async(f.add, [(1, 2)] * 5, callback=seen.append, progress=kind)
    assert result.get() == [3] * 5 == seen[0]
    assert "5/5" in said_by(capfd)
    assert pool.map_async(f.square, [], progress=kind).get() == []


def test_iterators_show_the_results_taken(pool, kind, capfd):
    assert list(pool.imap(f.square, range(10), progress=kind)) == [x * x for x in range(10)]
    assert "10/10" in said_by(capfd)
    assert sorted(pool.imap_unordered(f.square, iter(range(10)), 3, progress=kind)) == [x * x for x in range(10)]
    assert "10" in said_by(capfd)  # the total is unknown
    results = pool.imap(f.fail_on_three, range(6), progress=kind)
    for _ in range(3):
        next(results)
    with pytest.raises(ValueError, match="three"):
        results.next()
    assert list(results) == [4, 5]
    assert "6/6" in said_by(capfd)


def test_the_bar_shows_bytes_copied_and_shared(pool, kind, capfd):
    shared = forkshm.ones(500_000)
    assert pool.map(first_element, [shared] * 4, 1, progress=kind) == [1.0] * 4
    assert "0.0 MB copied, 16.0 MB shared" in said_by(capfd)


def test_failures_end_the_bar(pool, kind, capfd):
    for call in (pool.map, lambda *args, **options: pool.map_async(*args, **options).get()):
        with pytest.raises(ValueError, match="three"):
            call(f.fail_on_three, range(6), 1, progress=kind)
        assert "6/6" in said_by(capfd)
        with pytest.raises(TypeError, match="cannot pickle"):
            call(f.square, [threading.Lock()], progress=kind)
    # A live display of rich that stays active would refuse another one, and keep its thread.
    assert pool.map(f.square, [1], progress=kind) == [1]


def test_stopping_early_leaves_no_bar(pool, kind):
    for results in (pool.imap(f.square, range(6), progress=kind), pool.imap_unordered(f.square, [1], progress=kind)):
        next(results)
    pool.close()
    pool.join()
    del results
    gc.collect()


def test_a_pool_that_ends_ends_the_bar(kind, capfd):
    with forkshm.Pool(1) as pool:
        result = pool.map_async(time.sleep, [60, 60], 1, progress=kind)
    with pytest.raises(forkshm.PoolClosedError):
        result.get()
    assert said_by(capfd)


def test_asyncio_pools_show_progress(kind, capfd):
    async def main():
        async with aio.Pool(2) as pool:
            assert await pool.map(f.square, range(9), 2, progress=kind) == [x * x for x in range(9)]
            assert "9/9" in said_by(capfd)
            assert await pool.starmap(f.add, [(1, 2)] * 3, progress=kind) == [3, 3, 3]
            assert "3/3" in said_by(capfd)
            assert [x async for x in pool.imap(f.square, range(4), progress=kind)] == [0, 1, 4, 9]
            assert "4/4" in said_by(capfd)
            results = pool.imap_unordered(f.square, range(7), progress=kind)
            async for _ in results:
                break
            await results.aclose()
            assert "1/7" in said_by(capfd)

    asyncio.run(main())


def test_without_its_library_nothing_is_begun(pool, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rich", None)
    for call in (pool.map, pool.starmap, pool.map_async, pool.starmap_async, pool.imap, pool.imap_unordered):
        with pytest.raises(forkshm.errors.MissingDependencyError, match="progress='rich' needs rich: pip install"):
            call(f.square, [(1,)], progress="rich")
        with pytest.raises(ValueError, match="progress must be True, False, 'tqdm' or 'rich', got 'bar'"):
            call(f.square, [(1,)], progress="bar")
    assert pool.statistics().tasks == 0
