"""forkshm.aio: a pool that an event loop drives."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import threading

import functions
import numpy as np
import pytest

import forkshm
from forkshm import aio
from forkshm._system import CAN_FORK
from forkshm.backend import kernel

pytestmark = pytest.mark.usefixtures("_warm_up", "_warm_loops")


def loops():
    yield pytest.param(asyncio.new_event_loop, id="asyncio")
    try:
        import uvloop
    except ModuleNotFoundError:
        yield pytest.param(None, id="uvloop", marks=pytest.mark.skip("uvloop is not installed"))
    else:
        yield pytest.param(uvloop.new_event_loop, id="uvloop")


@pytest.fixture(scope="session")
def _warm_loops():
    # libuv keeps a pipe for the signals of the process.
    for parameter in loops():
        if parameter.values[0] is not None:
            loop = parameter.values[0]()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()


@pytest.fixture(params=loops())
def run(request):
    """Run a coroutine in a new event loop, with a deadline."""

    def run_it(coroutine):
        loop = request.param()
        try:
            return loop.run_until_complete(asyncio.wait_for(coroutine, 60))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run_it


def wait_for(gate, value=None):
    gate.acquire()
    return value


def die(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def touch_and_wait(path, gate):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    gate.acquire()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def test_calls_have_the_answers_of_the_pool(run):
    async def main():
        threads = threading.active_count()
        async with aio.Pool(2) as pool:
            assert await pool.call(pow, 2, exp=5) == 32
            assert await pool.apply(pow, (2,), {"exp": 5}) == 32
            assert await pool.apply(len, ((1, 2, 3),)) == 3
            assert await pool.apply(int) == 0
            assert await pool.map(abs, range(-50, 0)) == list(range(50, 0, -1))
            assert await pool.map(abs, []) == []
            assert await pool.starmap(pow, [(2, 3), (3, 2)], chunksize=1) == [8, 9]
            assert [x async for x in pool.imap(abs, iter(range(100)))] == list(range(100))
            assert sorted([x async for x in pool.imap_unordered(abs, range(100), chunksize=7)]) == list(range(100))
            assert await asyncio.gather(*(pool.call(abs, -x) for x in range(500))) == list(range(500))
            watchers = 0 if kernel.loops_watch_fds else 1
            assert threading.active_count() == threads + watchers, "no helper thread"

    run(main())


def test_the_loop_goes_on_meanwhile(run, gate):
    async def main():
        async with aio.Pool(1) as pool:
            waiting = asyncio.ensure_future(pool.call(wait_for, gate, "done"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
            gate.release()
            assert await waiting == "done"

    run(main())


def test_an_idle_pool_watches_nothing(run):
    async def main():
        async with aio.Pool(2) as pool:
            await pool.call(abs, 1)
            assert not pool._driver._watched
            assert pool._driver._timer is None
            for worker in pool._pool._worker_group.workers:
                os.kill(worker.pid, signal.SIGKILL)
            assert await pool.map(abs, range(10)) == list(range(10))

    run(main())


def test_shared_memory_crosses_as_descriptors(run):
    async def main():
        async with aio.Pool(2) as pool:
            shared = forkshm.zeros(1_000_000)

            def fill(array):
                array[:] = 1
                return np.arange(1_000_000)

            assert (await pool.call(fill, shared))[-1] == 999_999
            assert shared.sum() == 1_000_000
            assert pool.statistics().bytes_shared == 8_000_000

    run(main())


def test_exceptions_and_deaths(run):
    async def main():
        async with aio.Pool(2) as pool:
            with pytest.raises(ZeroDivisionError):
                await pool.call(divmod, 1, 0)
            with pytest.raises(TypeError, match="iterable of arguments, got 0"):
                await pool.apply(abs, 0)
            with pytest.raises(TypeError, match="cannot pickle"):
                await pool.call(id, threading.Lock())
            answers = await asyncio.gather(
                *(pool.call(die if x == 5 else abs, x) for x in range(20)), return_exceptions=True
            )
            assert isinstance(answers.pop(5), forkshm.WorkerDiedError)
            assert answers == [x for x in range(20) if x != 5]
            results = pool.imap(lambda x: 1 // x, [1, 0, 1])
            assert await anext(results) == 1
            with pytest.raises(ZeroDivisionError):
                await anext(results)
            assert [x async for x in results] == [1]

    run(main())


def test_cancelling_ends_the_worker_and_leaves_the_others(run, gate, tmp_path):
    path = tmp_path / "pid"

    async def main():
        async with aio.Pool(2) as pool:
            other = asyncio.ensure_future(pool.call(wait_for, gate, "other"))
            doomed = asyncio.ensure_future(pool.call(touch_and_wait, path, gate))
            await until(lambda: path.exists() and path.read_text())
            pid = int(path.read_text())
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            await until(lambda: pid not in [worker.pid for worker in pool._pool._worker_group.workers])
            assert not other.done()
            gate.release()
            assert await other == "other"
            assert await pool.map(abs, range(10)) == list(range(10))

    run(main())


def test_a_call_cancelled_before_its_start_never_runs(run, gate, tmp_path):
    """Some calls are in the pool's backlog; those in the kernel's queue are ended when a worker takes them."""

    async def main():
        async with aio.Pool(1) as pool:
            first = asyncio.ensure_future(pool.call(wait_for, gate, "first"))
            # Each call that a worker has taken costs the start of another worker, which takes a second if spawned.
            count = 200 if CAN_FORK else 12
            others = [asyncio.ensure_future(pool.call(touch_and_wait, tmp_path / f"{x}", gate)) for x in range(count)]
            await asyncio.sleep(0)
            for other in others:
                other.cancel()
            await asyncio.wait(others)
            last = asyncio.ensure_future(pool.call(abs, -1))
            gate.release()
            assert await first == "first"
            assert await last == 1
            # A call that had begun was ended; no other call was executed.
            assert len(list(tmp_path.iterdir())) < 200

    run(main())


def test_timeouts_of_asyncio_work(run, gate):
    async def main():
        async with aio.Pool(1) as pool:
            for _ in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(pool.call(wait_for, gate), 0.05)
            assert await pool.call(abs, -1) == 1

    run(main())


def test_imap_gives_the_results_before_an_item_that_cannot_be_pickled(run):
    async def main():
        async with aio.Pool(2) as pool:
            results, got = pool.imap(functions.itself, [1, 2, threading.Lock(), 4]), []
            with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock'"):
                async for value in results:
                    got.append(value)
            assert got == [1, 2]
            assert await pool.call(abs, -1) == 1

    run(main())


def test_imap_reads_input_as_needed(run):
    taken = []

    def items():
        for x in range(1000):
            taken.append(x)
            yield x
        raise LookupError("the input")

    async def main():
        async with aio.Pool(2) as pool:
            results = pool.imap(abs, items())
            assert await anext(results) == 0
            assert len(taken) < 20
            with pytest.raises(LookupError, match="the input"):
                async for value in results:
                    assert value == taken[value]
            assert len(taken) == 1000
            results = pool.imap(abs, range(1000))
            assert await anext(results) == 0
            await results.aclose()
            assert [x async for x in results] == []
            with pytest.raises(ValueError, match="chunksize must be at least 1, got 0"):
                pool.imap(abs, [1], chunksize=0)

    run(main())


def test_the_end_of_the_pool_answers_awaited_calls(run, gate):
    async def main():
        async with aio.Pool(1) as pool:
            waiting = asyncio.ensure_future(pool.call(wait_for, gate))
            await asyncio.sleep(0)
        with pytest.raises(forkshm.PoolClosedError):
            await waiting
        with pytest.raises(forkshm.PoolClosedError):
            await pool.call(abs, 1)
        with pytest.raises(forkshm.PoolClosedError):
            pool.imap(abs, [1])

    run(main())


def test_one_loop_after_the_other(run):
    pool = aio.Pool(1)

    async def main():
        return await pool.call(abs, -1)

    assert [run(main()), run(main())] == [1, 1]
    pool.terminate()


def test_a_loop_that_ended_in_the_middle_leaves_a_pool_that_works(gate):
    pool = aio.Pool(1)

    async def leave():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(pool.call(wait_for, gate), 0.01)

    asyncio.run(leave())

    async def main():
        return await pool.call(abs, -1)

    gate.release()  # in case its worker was not ended in time
    assert asyncio.run(asyncio.wait_for(main(), 30)) == 1
    pool.terminate()


def test_deaths_are_retried_and_cancelled_calls_are_not(run, gate):
    if "retries" not in inspect.signature(forkshm.Pool).parameters:
        pytest.skip("this Pool has no retries")

    async def main():
        async with aio.Pool(1, retries=5) as pool:
            for _ in range(12):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(pool.call(wait_for, gate), 0.05)
            assert await pool.call(abs, -1) == 1

    run(main())


def test_apply_has_the_signature_of_the_pools():
    ours, theirs = inspect.signature(forkshm.aio.Pool.apply), inspect.signature(forkshm.Pool.apply)
    assert [(one.name, one.default) for one in ours.parameters.values()] == [
        (one.name, one.default) for one in theirs.parameters.values()
    ]


def test_a_call_is_cancelled_after_its_pool_was_terminated(run, gate):
    async def main():
        pool = aio.Pool(1)
        call = asyncio.ensure_future(pool.call(wait_for, gate))
        await asyncio.sleep(0.05)
        pool.terminate()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(main())


def test_an_interrupt_at_the_end_of_a_block_leaves_no_worker(monkeypatch):
    group = None
    real = forkshm.pool._worker_group.WorkerGroup.kill

    def interrupted(self):
        monkeypatch.undo()
        raise KeyboardInterrupt

    async def main():
        nonlocal group
        async with aio.Pool(1) as pool:
            group = pool._pool._worker_group
            assert await pool.call(abs, -1) == 1
            monkeypatch.setattr(type(group), "kill", interrupted)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert type(group).kill is real
    assert not group.workers
