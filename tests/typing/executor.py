"""Types of executors and decorators, as mypy and pyright see them. This file is never run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import assert_type

import forkshm
from forkshm import aio


def never_called() -> None:
    @forkshm.parallel
    def bare(x: int, scale: float = 1.0) -> str:
        return f"{x * scale}"

    @forkshm.parallel(workers=2, on_error="skip", task_timeout=3.0)
    def with_options(name: str) -> dict[str, int]:
        return {name: len(name)}

    class Table:
        @forkshm.parallel
        def row(self, index: int) -> bytes:
            return bytes(index)

    assert_type(bare(1, scale=2), str)
    assert_type(bare.map(range(3)), list[str])
    assert_type(bare.starmap([(1, 2.0)], chunksize=1), list[str])
    assert_type(bare.imap([1], progress=True), Iterator[str])
    assert_type(bare.imap_unordered([1]), Iterator[str])
    assert_type(bare.submit(1, scale=3.0), Future[str])
    assert_type(bare.map([1], out=bytearray(1)), bytearray)
    assert_type(with_options.map(["a"]), list[dict[str, int]])
    assert_type(Table().row(3), bytes)
    assert_type(Table().row.map([1, 2]), list[bytes])
    assert_type(Table().row.submit(1), Future[bytes])
    bare("a")  # type: ignore[arg-type]
    bare.submit(1, factor=2)  # type: ignore[call-arg]
    bare.map([1], chunks=2)  # type: ignore[call-overload]
    Table().row("a")  # type: ignore[arg-type]

    async def asynchronous() -> None:
        assert_type(await bare.amap([1]), list[str])
        async with aio.Pool(2) as pool:
            assert_type(await pool.call(bare, 1), str)
            assert_type(await pool.map(len, ["a"]), list[int])
            assert_type([x async for x in pool.imap(len, ["a"])], list[int])
            await pool.call(bare, "a")  # type: ignore[arg-type]

    with forkshm.Pool(2, worker_init=dict[str, int], worker_exit=print, cpu_ids=[0, [0, 1]]) as pool:
        assert_type(pool.apply(len, ("a",)), int)
        assert_type(pool.map(len, ["a"], progress=True), list[int])
        assert_type(pool.starmap(str.replace, [("a", "b", "c")]), list[str])
        assert_type(pool.map_async(len, ["a"], progress="rich").get(), list[int])
        assert_type(pool.apply_async(len, ("a",)).get(timeout=1), int)
        assert_type(list(pool.imap(len, ["a"])), list[int])
        assert_type(pool.imap_unordered(len, ["a"]).next(), int)
        assert_type(pool.report().workers[0].busy, float)
        assert_type(pool.report().hints, tuple[str, ...])
        pool.map(3, ["a"])  # type: ignore[arg-type]
        pool.apply_sync(len)  # type: ignore[attr-defined]

    with forkshm.team(2) as team:
        assert_type(team.rank, int)
        assert_type(team.reduce(1.5, "max"), float)
        assert_type(list(team.iterate(["a"])), list[str])
        assert_type(list(team.range(3, schedule="guided")), list[int])
        team.range(3, schedule="fast")  # type: ignore[arg-type]

    with forkshm.Executor(2) as executor:
        assert_type(executor.submit(len, "abc"), Future[int])
        assert_type(executor.map(len, ["abc"], buffersize=3), Iterator[int])

    words = forkshm.SharedList(["a", "b"])
    assert_type(words, forkshm.SharedList[str])
    assert_type(words[0], str)
    assert_type(words[1:], list[str])
    lengths = forkshm.SharedDict({"a": 1})
    assert_type(lengths, forkshm.SharedDict[str, int])
    assert_type(lengths["a"], int)
    lengths["b"] = 2  # type: ignore[index]
