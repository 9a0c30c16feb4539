"""Executors, event loops and pools of the standard library with forkshm's contexts."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

METHODS = ["fork", "spawn", "forkserver"]

HEAD = """
import asyncio, concurrent.futures, multiprocessing, multiprocessing.pool, os, sys
import numpy as np
import forkshm

METHOD = sys.argv[1]
STATE = None

def square(x):
    return x * x

def remember(x):
    global STATE
    STATE = x

def recall(_=None):
    return STATE

def fill(array, value):
    array[:] = value
    return float(array.sum())

def fail(x):
    raise ValueError(f"bad {x}")

if __name__ == "__main__":
    ctx = forkshm.get_context(METHOD)
"""


def program(body):
    import textwrap

    return HEAD + textwrap.indent(textwrap.dedent(body), "    ")


@pytest.mark.needs("foreign_channels")
@pytest.mark.parametrize("method", METHODS)
def test_process_pool_executor(run_script, method):
    run_script(
        program("""
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=ctx, initializer=remember, initargs=(5,)) as executor:
            assert list(executor.map(square, range(50), chunksize=7)) == [x * x for x in range(50)]
            assert executor.submit(recall).result() == 5
            shared, plain = forkshm.zeros(1000), np.zeros(1000)
            assert executor.submit(fill, shared, 2).result() == 2000 == shared.sum()
            assert executor.submit(fill, plain, 2).result() == 2000 and plain.sum() == 0
            try:
                executor.submit(fail, 3).result()
            except ValueError as error:
                assert str(error) == "bad 3" and "in fail" in str(error.__cause__)
            else:
                raise SystemExit("no error")
            try:
                executor.submit(lambda: 3).result()
            except Exception as error:
                assert "pickle" in str(error).lower(), error
            assert executor.submit(square, 3).result() == 9
            died = executor.submit(os._exit, 3)
            try:
                died.result()
            except concurrent.futures.process.BrokenProcessPool:
                pass
        assert not multiprocessing.active_children() and not forkshm.active_children()
        """),
        method,
    )


@pytest.mark.needs("foreign_channels")
@pytest.mark.parametrize("method", METHODS)
def test_asyncio_runs_calls_in_an_executor(run_script, method):
    run_script(
        program("""
        async def main():
            loop = asyncio.get_running_loop()
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=ctx) as executor:
                shared = forkshm.ones(1000)
                parts = [loop.run_in_executor(executor, np.sum, shared[i::4]) for i in range(4)]
                assert await asyncio.gather(*parts) == [250.0] * 4
                try:
                    await loop.run_in_executor(executor, fail, 1)
                except ValueError as error:
                    assert str(error) == "bad 1"
                else:
                    raise SystemExit("no error")

        asyncio.run(main())
        """),
        method,
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_standard_librarys_own_pool(run_script, method):
    run_script(
        program("""
        with multiprocessing.pool.Pool(2, remember, (7,), context=ctx) as pool:
            assert pool.map(square, range(50), chunksize=3) == [x * x for x in range(50)]
            assert set(pool.map(recall, range(4))) == {7}
            assert pool.apply_async(square, (4,)).get() == 16
            assert sorted(pool.imap_unordered(square, range(5))) == [0, 1, 4, 9, 16]
            try:
                pool.apply(fail, (3,))
            except ValueError as error:
                assert str(error) == "bad 3"
            else:
                raise SystemExit("no error")
            pool.close()
            pool.join()
        assert not forkshm.active_children()
        """),
        method,
    )
