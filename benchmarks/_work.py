"""Functions that workers run.

Every pool sends these functions by name, because they are in a module that workers can import. Functions of
``__main__`` would be slower, which says nothing about transport.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    Array = np.ndarray[Any, Any]

# Seconds that workers wait for each other before they give up.
PATIENCE = 60.0

# Objects that a worker creates once.
_kept: dict[int, Any] = {}


def noop(_: object = None) -> None:
    """Do nothing."""


def ends(array: Array) -> tuple[float, float, int]:
    """Look at an array without reading all of it, because reading is not transport."""
    return float(array[0]), float(array[-1]), array.size


def ends_of_many(arrays: dict[int, Array]) -> tuple[float, float, int]:
    firsts, lasts, sizes = zip(*map(ends, arrays.values()), strict=True)
    return sum(firsts), sum(lasts), sum(sizes)


def ends_of_bytes(data: bytes) -> tuple[int, int, int]:
    return data[0], data[-1], len(data)


def ones(count: int) -> Array:
    return np.ones(count)


def sum_of_many(arrays: list[Array]) -> float:
    return float(sum(array.sum() for array in arrays))


def many_ones(count: int) -> list[Array]:
    return [np.ones(10) for _ in range(count)]


def kept_bytes(nbytes: int) -> Any:
    """Create bytes once in each worker, so that only sending them is measured."""
    if nbytes not in _kept:
        _kept[nbytes] = b"x" * nbytes
    return _kept[nbytes]


def item(array: Array, index: int) -> float:
    return float(array[index])


def middle(array: Array) -> int:
    return int(array[array.size // 2])


def middle_of_memory(memory: Any, count: int) -> int:
    """Look at the middle of ``count`` integers in a SharedMemory that was sent by name."""
    found = int(np.ndarray(count, np.int64, memory.buf)[count // 2])
    memory.close()
    return found


def weigh_message(message: Any) -> float:
    """Return a number for a message of a queue, which is a number or an array."""
    return float(message[-1]) if isinstance(message, np.ndarray) else float(message)


def consume(take: Any, answer: Any) -> None:
    """Read messages of a queue, as many as the first one says, and answer their sum; stop at None."""
    while (count := take()) is not None:
        answer(sum(weigh_message(take()) for _ in range(count)))


def kept_shared_array(count: int) -> Array:
    """Return an array of integers in forkshm's shared memory, created once in each worker."""
    if count not in _kept:
        _kept[count] = importlib.import_module("forkshm").empty(count, np.int64)
        _kept[count][count // 2] = count
    return _kept[count]


def kept_memory(module: str, count: int) -> Any:
    """Return a SharedMemory of integers, which is sent by name, created once in each worker."""
    if count not in _kept:
        _kept[count] = importlib.import_module(module).SharedMemory(create=True, size=count * 8)
        np.ndarray(count, np.int64, _kept[count].buf)[count // 2] = count
    return _kept[count]


def read_together(array: Array, directory: str, readers: int, root: int, index: int) -> tuple[float, int]:
    """Read all of an array, wait until all readers have it, and let the first reader measure the memory of all.

    Returns:
        The sum of the array, and for the first reader the proportional set size in bytes of
        the process *root* and all its descendants; for the others 0.
    """
    total = float(array.sum())
    touch(directory, f"read-{index}")
    wait_for(directory, (f"read-{other}" for other in range(readers)))
    weight = 0
    if index == 0:
        weight = sum(pss(pid) for pid in descendants(root))
        touch(directory, "weighed")
    wait_for(directory, ["weighed"])
    return total, weight


def read_memory_together(
    memory: Any, count: int, directory: str, readers: int, root: int, index: int
) -> tuple[float, int]:
    """Do the same as `read_together` with ``count`` integers in a SharedMemory that was sent by name."""
    found = read_together(np.ndarray(count, np.int64, memory.buf), directory, readers, root, index)
    memory.close()
    return found


def touch(directory: str, name: str) -> None:
    with open(os.path.join(directory, name), "w"):
        pass


def wait_for(directory: str, names: Iterable[str]) -> None:
    missing = set(names)
    deadline = time.monotonic() + PATIENCE
    while missing := missing - set(os.listdir(directory)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:g} s for other workers: {sorted(missing)}")
        time.sleep(0.001)


def descendants(root: int) -> list[int]:
    """Return the pids of the process *root* and of all its descendants."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_fields(int(name))):
            parents[int(name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/pid/stat after the name, which may contain anything; none if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def pss(pid: int) -> int:
    """Return the memory of a process; a page mapped by n processes counts one nth in each."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError):
        return 0
