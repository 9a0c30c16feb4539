"""The cost of forkshm's interfaces beside their common alternatives: rows of both, which take turns in one run.

    pip install joblib && python benchmarks/interfaces.py
    python benchmarks/interfaces.py --only executor --rounds 15

The decorator is compared with joblib's ``Parallel(delayed)`` and its default backend, which keeps its workers as the
decorator does; the executor with ``ProcessPoolExecutor``, by fork; a `SharedList` with a list that is pickled to each
reader. Each side checks its answer. Exits with 1 if forkshm is slower in a row. Without joblib, only forkshm is
printed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator

import _work
import numpy as np
from _pairs import Pair, check, compare

import forkshm

try:
    import joblib
except ImportError:
    joblib = None

WORKERS = 2
READERS = 8

MB = 10**6


# -- functions that workers run, sent by name in both libraries -----------------------------------


def plus_one(x: int) -> int:
    return x + 1


def count_to(limit: int) -> int:
    return sum(range(limit))


class Arrays(list[object]):
    """A list whose arrays are compared by value."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and all(map(np.array_equal, self, other))


def total(array: _work.Array) -> float:
    return float(array.sum())


def element(array: _work.Array, index: int) -> float:
    return float(array[index])


def ones(count: int) -> _work.Array:
    return np.ones(count)


# -- the decorator --------------------------------------------------------------------------------


def of_decorator(scale: float) -> Iterator[Pair]:
    def pair(
        name: str,
        function: Callable[..., object],
        items: list[object],
        expected: list[object],
        held: tuple[object, ...] = (),
    ) -> Pair:
        def holding(item: object) -> object:
            return function(*held, item)

        ours = forkshm.parallel(workers=WORKERS)(holding if held else function)

        def by_decorator() -> None:
            check(ours.map(items) == expected)

        def by_joblib() -> None:
            call = joblib.delayed(function)
            check(joblib.Parallel(n_jobs=WORKERS)(call(*held, item) for item in items) == expected)

        return Pair(f"decorator: {name}", by_decorator, None if joblib is None else by_joblib)

    def sized(count: int) -> int:
        return max(2, int(count * scale))

    few, many = sized(100), sized(2000)
    yield pair(f"{many:,} tiny calls", plus_one, list(range(many)), list(range(1, many + 1)))
    limit = sized(50_000)
    each = sum(range(limit))
    yield pair(f"{few:,} calls of about 1 ms", count_to, [limit] * few, [each] * few)
    count = sized(MB)
    arrays = [np.full(count, float(value)) for value in range(4)]
    totals = [count * float(value) for value in range(4)]
    yield pair(f"4 arrays of {count * 8 / MB:g} MB as arguments", total, list(arrays), list(totals))
    yield pair(f"4 arrays of {count * 8 / MB:g} MB as results", ones, [count] * 4, Arrays([np.ones(count)] * 4))
    large = np.arange(float(sized(4 * MB)))
    expected = [float(index) for index in range(16)]
    yield pair(f"16 calls that share {large.nbytes / MB:g} MB", element, list(range(16)), list(expected), (large,))


# -- the executor ---------------------------------------------------------------------------------


def of_executor(scale: float) -> Iterator[Pair]:
    def sized(count: int) -> int:
        return max(2, int(count * scale))

    fork = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        # The standard library's executor comes first: it forks once, before forkshm's workers exist.
        theirs = stack.enter_context(concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=fork))
        list(theirs.map(plus_one, range(100)))
        ours = stack.enter_context(forkshm.Executor(WORKERS))

        def pair(name: str, call: Callable[[concurrent.futures.Executor], object], per: int = 1) -> Pair:
            return Pair(f"executor: {name}", lambda: call(ours), lambda: call(theirs), per=per)

        trips = sized(100)

        def submit(executor: concurrent.futures.Executor) -> None:
            for number in range(trips):
                check(executor.submit(plus_one, number).result() == number + 1)

        def submit_many(executor: concurrent.futures.Executor) -> None:
            futures = [executor.submit(plus_one, number) for number in range(many)]
            check([future.result() for future in futures] == list(range(1, many + 1)))

        def as_completed(executor: concurrent.futures.Executor) -> None:
            futures = {executor.submit(plus_one, number): number for number in range(many)}
            done = concurrent.futures.as_completed(futures)
            check(all(future.result() == futures[future] + 1 for future in done))

        def map_by(chunksize: int, executor: concurrent.futures.Executor) -> None:
            check(list(executor.map(plus_one, range(many), chunksize=chunksize)) == list(range(1, many + 1)))

        many = sized(1000)
        yield pair("submit, and wait for the result", submit, trips)
        yield pair(f"submit {many:,}, then wait for all", submit_many)
        yield pair(f"submit {many:,}, as they are completed", as_completed)
        yield pair(f"map of {many:,}, one by one", functools.partial(map_by, 1))
        yield pair(f"map of {many:,}, in chunks of 100", functools.partial(map_by, 100))
        count = sized(MB)
        array = np.ones(count)

        def argument(executor: concurrent.futures.Executor) -> None:
            check(executor.submit(total, array).result() == count)

        def result(executor: concurrent.futures.Executor) -> None:
            check(executor.submit(ones, count).result().size == count)

        yield pair(f"{count * 8 / MB:g} MB array as argument", argument)
        yield pair(f"{count * 8 / MB:g} MB array as result", result)

    def start_ours() -> None:
        with forkshm.Executor(WORKERS) as executor:
            check(executor.submit(plus_one, 1).result() == 2)

    def start_theirs() -> None:
        with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=fork) as executor:
            check(executor.submit(plus_one, 1).result() == 2)

    yield Pair("executor: start, one call, and end", start_ours, start_theirs)


# -- shared containers ----------------------------------------------------------------------------

_kept: list[object] = []


def keep(words: object) -> None:
    """Keep the words, and look at each."""
    if isinstance(words, bytes):
        words = pickle.loads(words)
    _kept.append(words)
    check(sum(map(len, words)) > 0)  # type: ignore[call-overload]


def of_containers(scale: float) -> Iterator[Pair]:
    words = [f"word {number}" for number in range(max(100, int(200_000 * scale)))]

    def weigh(pool: object) -> float:
        pids = [process.pid for process in pool._pool]  # type: ignore[attr-defined]
        return sum(map(_work.pss, pids)) / MB

    def grown(kind: Callable[..., object], thing: object) -> float:
        """Return the MB by which eight processes that have the words grow, compared to having nothing."""
        with kind(READERS, keep, (["a"],)) as pool:  # type: ignore[attr-defined]
            pool.map(plus_one, range(READERS * 4), chunksize=1)
            before = weigh(pool)
        with kind(READERS, keep, (thing,)) as pool:  # type: ignore[attr-defined]
            pool.map(plus_one, range(READERS * 4), chunksize=1)
            return max(0.001, weigh(pool) - before)

    shared, pickled = forkshm.SharedList(words), pickle.dumps(words)
    yield Pair(
        f"containers: {READERS} readers of {len(words):,} strings, PSS",
        lambda: grown(forkshm.Pool, shared),
        lambda: grown(multiprocessing.get_context("fork").Pool, pickled),
        unit="MB",
    )


PARTS = {"decorator": of_decorator, "executor": of_executor, "containers": of_containers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="only these rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes: 0.01 is quick")
    options = parser.parse_args()
    # One after the other: each part ends its workers before the next begins.
    slower = [
        compare(part(options.scale), "peer", options.rounds)
        for name, part in PARTS.items()
        if options.only in (None, name)
    ]
    return max(slower)


if __name__ == "__main__":
    sys.exit(main())
