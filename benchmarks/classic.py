"""The cost of the classic names beside multiprocessing's: locks, `Value`, `Array`, `SharedMemory`; and of mapped files.

    python benchmarks/classic.py
    python benchmarks/classic.py --only locks --rounds 15

Both sides run by fork in one process, take turns, and check their answers. The last rows compare tasks that receive a
sparse `numpy.memmap` of 40 GB with empty tasks that map the file themselves. Exits with 1 if forkshm misses a bound.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from _pairs import Pair, check, compare

import forkshm

OURS = forkshm.get_context("fork")
THEIRS = get_context("fork")
GB = 10**9


def of_locks(steps: int) -> Iterator[Pair]:
    """Yield what one process does with each primitive while no other process wants it."""

    def cycle(lock: object) -> Callable[[], None]:
        acquire, release = lock.acquire, lock.release  # type: ignore[attr-defined]

        def run() -> None:
            for _ in range(steps):
                acquire()
                release()

        return run

    for name in ("Lock", "RLock", "Semaphore", "BoundedSemaphore"):
        ours, theirs = getattr(OURS, name)(), getattr(THEIRS, name)()
        yield Pair(f"{name}, acquire and release", cycle(ours), cycle(theirs), "us", steps, 2)

    def add(value: object) -> Callable[[], None]:
        def run() -> None:
            value.value = 0  # type: ignore[attr-defined]
            for _ in range(steps):
                with value.get_lock():  # type: ignore[attr-defined]
                    value.value += 1  # type: ignore[attr-defined]
            check(value.value == steps)  # type: ignore[attr-defined]

        return run

    yield Pair("value.value += 1 under its lock", add(OURS.Value("q")), add(THEIRS.Value("q")), "us", steps, 1.5)


def of_contention(steps: int) -> Iterator[Pair]:
    """Yield how long two processes take that want the same lock all the time."""

    def race(context: object) -> Callable[[], None]:
        value, barrier = context.Value("q"), context.Barrier(3)  # type: ignore[attr-defined]

        def work() -> None:
            barrier.wait()
            for _ in range(steps):
                with value.get_lock():
                    value.value += 1
            barrier.wait()

        def run() -> None:
            value.value = 0
            processes = [context.Process(target=work) for _ in range(2)]  # type: ignore[attr-defined]
            for process in processes:
                process.start()
            barrier.wait()
            barrier.wait()
            for process in processes:
                process.join()
            check(value.value == 2 * steps)

        return run

    yield Pair("two processes, value.value += 1", race(OURS), race(THEIRS), "us", 2 * steps, 1)

    def exchange(context: object, name: str) -> Callable[[], None]:
        # Each side releases what the other one waits for. A lock begins acquired, a semaphore without permits.
        mine, other = (getattr(context, name)(*[0] * (name == "Semaphore")) for _ in range(2))
        if name == "Lock":
            mine.acquire()
            other.acquire()

        def work() -> None:
            for _ in range(steps):
                mine.acquire()
                other.release()

        def run() -> None:
            process = context.Process(target=work)  # type: ignore[attr-defined]
            process.start()
            for _ in range(steps):
                mine.release()
                other.acquire()
            process.join()
            check(process.exitcode == 0)

        return run

    for name in ("Lock", "Semaphore"):
        yield Pair(f"{name}, handed over and back", exchange(OURS, name), exchange(THEIRS, name), "us", steps, 1)


def of_memory(steps: int) -> Iterator[Pair]:
    """Yield how long it takes to make and drop shared memory."""

    def arrays(context: object) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                array = context.Array("d", 1000)  # type: ignore[attr-defined]
                array[999] = 1.0
                check(array[999] == 1.0)

        return run

    def locks(context: object) -> Callable[[], None]:
        return lambda: check(len([context.Lock() for _ in range(steps)]) == steps)  # type: ignore[attr-defined]

    def blocks(of: Callable[..., SharedMemory]) -> Callable[[], None]:
        content = b"\1" * 1_000_000

        def run() -> None:
            for _ in range(steps):
                block = of(create=True, size=1_000_000)
                block.buf[:] = content
                attached = of(name=block.name)
                check(attached.buf[999_999] == 1)
                attached.close()
                block.close()
                block.unlink()

        return run

    yield Pair("a Lock, made and dropped", locks(OURS), locks(THEIRS), "us", steps, 1)
    yield Pair("an Array of 8 kB, made and dropped", arrays(OURS), arrays(THEIRS), "us", steps, 2)
    ours = forkshm.shared_memory.SharedMemory
    yield Pair("1 MB of SharedMemory: make, fill, attach", blocks(ours), blocks(SharedMemory), "us", steps, 2)


def last(array: np.ndarray) -> float:
    return float(array[-1])


def map_and_read(path: str) -> float:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        return float(np.frombuffer(mapping[-8:])[0])


def of_files(tasks: int, size: int) -> Iterator[Pair]:
    """Yield tasks that get a mapped file as an argument, beside tasks that map it themselves."""
    with tempfile.TemporaryDirectory() as folder, OURS.Pool(2) as pool:
        path = os.path.join(folder, "sparse")
        np.memmap(path, dtype=float, mode="w+", shape=(size // 8,))[-1] = 7.0
        array = np.memmap(path, dtype=float, mode="r", shape=(size // 8,))

        def ours() -> None:
            for _ in range(tasks):
                check(pool.apply(last, (array,)) == 7.0)

        def theirs() -> None:
            for _ in range(tasks):
                check(pool.apply(map_and_read, (path,)) == 7.0)

        yield Pair(f"task with a memmap of {size / GB:g} GB; it maps it", ours, theirs, "us", tasks)


GROUPS = ("locks", "contention", "memory", "files")


def rows(only: list[str], scale: float) -> Iterator[Pair]:
    if "locks" in only:
        yield from of_locks(int(20_000 * scale))
    if "contention" in only:
        yield from of_contention(int(5_000 * scale))
    if "memory" in only:
        yield from of_memory(int(300 * scale))
    if "files" in only:
        yield from of_files(100, int(40 * GB * scale) // 8 * 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS, action="append", help="the groups to measure; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the sizes: checks that it still works")
    options = parser.parse_args()
    scale = 0.01 if options.quick else 1
    return compare(rows(options.only or list(GROUPS), scale), "multiprocessing", options.rounds)


if __name__ == "__main__":
    sys.exit(main())
