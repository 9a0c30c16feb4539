"""Exceptions, arguments and results are freed with their last reference, not only by a garbage collection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import queue
import time
import weakref

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm.region.blocks._claim import claims

SIZE = 100_000


class Bad(Exception):
    """An exception that weak references can refer to."""


def fails(*_):
    raise Bad


def ones(*_):
    return np.ones(SIZE)


def iter_of(array):
    return (each for each in [array])


def stop_collection(_):
    gc.collect()
    gc.disable()


def claims_here(_):
    return len(claims)


@contextlib.contextmanager
def no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_async(call):
    async def main():
        async with forkshm.aio.Pool(1) as pool:
            return await call(pool)

    return asyncio.run(main())


# Each calls a function with one argument in a worker, and returns the result.
DOORS = {
    "apply": lambda pool, function, x: pool.apply(function, (x,)),
    "apply_async": lambda pool, function, x: pool.apply_async(function, (x,)).get(),
    "map": lambda pool, function, x: pool.map(function, [x])[0],
    "starmap": lambda pool, function, x: pool.starmap(function, [(x,)])[0],
    "imap": lambda pool, function, x: next(pool.imap(function, [x])),
    "imap of a generator": lambda pool, function, x: next(pool.imap(function, iter([x]))),
    "imap_unordered": lambda pool, function, x: next(pool.imap_unordered(function, [x])),
}
EXECUTOR = {
    "submit": lambda executor, function, x: executor.submit(function, x).result(),
    "Executor.map": lambda executor, function, x: [*executor.map(function, [x])].pop(),
    "Executor.map, a cancelled rest": lambda executor, function, x: next(executor.map(function, [x, x, x])),
}
AIO = {
    "aio.Pool.call": lambda pool, function, x: pool.call(function, x),
    "aio.Pool.map": lambda pool, function, x: pool.map(function, [x]),
    "aio.Pool.starmap": lambda pool, function, x: pool.starmap(function, [(x,)]),
    "aio.Pool.imap": lambda pool, function, x: anext(pool.imap(function, [x])),
}


@pytest.fixture
def executor():
    with forkshm.Executor(1) as made:
        made.submit(int).result()
        yield made


@pytest.fixture(params=[*DOORS, *EXECUTOR])
def door(request, pool):
    if request.param in DOORS:
        return lambda *call: DOORS[request.param](pool, *call)
    executor = request.getfixturevalue("executor")
    return lambda *call: EXECUTOR[request.param](executor, *call)


def exception_of(call, *arguments):
    with no_collection():
        try:
            call(*arguments)
        except Exception as error:
            return weakref.ref(error)
    raise AssertionError("nothing was raised")


def test_the_exception_of_a_call_is_freed(door):
    assert exception_of(door, fails, 1)() is None


def test_the_result_of_a_call_is_freed(door):
    with no_collection():
        result = door(ones, 1)
        assert result.sum() == SIZE
        seen = weakref.ref(result)
        del result
        assert seen() is None


def test_the_argument_of_a_call_is_freed(door, wait_until):
    with no_collection():
        array = np.ones(SIZE)
        seen = weakref.ref(array)
        door(len, array)
        del array
        wait_until(lambda: seen() is None)  # a thread that reads input ends by itself


def test_arguments_that_cannot_be_pickled_are_freed(door, wait_until):
    with no_collection(), open(os.devnull) as file:
        array = np.ones(SIZE)
        seen = weakref.ref(array)
        with contextlib.suppress(TypeError):
            door(len, [array, file])
            raise AssertionError("it was pickled")
        del array
        wait_until(lambda: seen() is None)


def test_the_memory_of_a_result_that_cannot_be_pickled_is_freed(pool):
    array = np.ones(SIZE)
    pool.map(stop_collection, range(8), chunksize=1)
    with pytest.raises(forkshm.ResultNotPicklableError):
        pool.apply(iter_of, (array,))
    assert sum(pool.map(claims_here, range(8), chunksize=1)) == 0


@pytest.mark.parametrize("name", AIO)
def test_arguments_results_and_exceptions_of_awaited_calls_are_freed(name):
    async def main(pool):
        await pool.call(int)
        with no_collection():
            array = np.ones(SIZE)
            seen = [weakref.ref(array)]
            result = await AIO[name](pool, np.copy, array)
            result = result[0] if isinstance(result, list) else result
            seen.append(weakref.ref(result))
            try:
                await AIO[name](pool, fails, 1)
            except Bad as error:
                seen.append(weakref.ref(error))
            del array, result
            await asyncio.sleep(0.01)  # the loop's own references
            assert [each() for each in seen] == [None] * 3

    run_async(main)


def test_other_exceptions_are_freed():
    channel, full = forkshm.Queue(), forkshm.Queue(1)
    receiver, sender = forkshm.Pipe(duplex=False)
    sender.close()
    full.put(1)
    calls = {
        "get": channel.get_nowait,
        "get with a timeout": lambda: channel.get(timeout=0.01),
        "put": lambda: full.put(2, timeout=0.01),
        "recv": receiver.recv,
        "barrier": lambda: forkshm.Barrier(2).wait(0.01),
    }
    assert [name for name, call in calls.items() if exception_of(call)() is not None] == []
    channel.close()
    full.close()
    receiver.close()


def test_exceptions_about_time_and_death_are_freed(pool):
    calls = {
        "get": lambda: pool.apply_async(time.sleep, (0.1,)).get(0.01),
        "next": lambda: pool.imap(time.sleep, [0.1]).next(0.01),
        "death": lambda: pool.apply(f.die, ("exit",)),
    }
    assert [name for name, call in calls.items() if exception_of(call)() is not None] == []


@pytest.mark.needs("fork")
def test_the_exception_of_a_team_is_freed():
    def members():
        with forkshm.team(2):
            raise Bad

    assert exception_of(members)() is None


def test_the_exception_of_a_managers_object_is_freed():
    with forkshm.Manager() as manager:
        given = manager.Queue()
        seen = exception_of(given.get_nowait)
        assert seen() is None
        with pytest.raises(queue.Empty):
            given.get_nowait()
        del given
