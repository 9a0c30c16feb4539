"""The cost of a region beside that of the bare calls: mapping and closing, in one run.

    python benchmarks/regions.py

The peer is the ``mmap`` module of the standard library, and for named memory its
``SharedMemory``. Rounds of both take turns, so that noise hits both; each checks its answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import shared_memory

import forkshm

MIB = 2**20
ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: both ways, and the bound on their ratio."""

    name: str
    ours: Callable[[], None]
    peer: Callable[[], None]
    bound: float | None


class Mappable:
    """An fd as an object with ``fileno()``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd


def check(happened: bool) -> None:
    if not happened:
        raise SystemExit("a benchmark got a wrong answer")


def rows(size: int) -> list[Row]:
    fd = os.memfd_create("benchmark", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, b"x", size - 1)
    mappable = Mappable(fd)
    name = f"forkshm-benchmark-{os.getpid()}"

    def map_ours() -> None:
        region = forkshm.MappedRegion(mappable)
        check(region.size == size)
        region.close()

    def map_peer() -> None:
        region = mmap.mmap(fd, size)
        check(len(region) == size)
        region.close()

    def touch_ours() -> None:
        with forkshm.MappedRegion(mappable) as region:
            check(region.buf[-1] == 120)

    def touch_peer() -> None:
        with mmap.mmap(fd, size) as region:
            check(region[-1] == 120)

    def anonymous_ours() -> None:
        forkshm.anonymous_shared_memory(size).close()

    def anonymous_peer() -> None:
        mmap.mmap(-1, size).close()

    def named_ours() -> None:
        with forkshm.SharedMemoryObject("create_only", name) as shm:
            shm.truncate(4096)
            forkshm.MappedRegion(shm).close()
        check(forkshm.SharedMemoryObject.remove(name))

    def named_peer() -> None:
        shm = shared_memory.SharedMemory(name, create=True, size=4096)
        shm.close()
        shm.unlink()

    return [
        Row("map an fd and close", map_ours, map_peer, 3.0),
        Row("map an fd, read its last byte, close", touch_ours, touch_peer, 3.0),
        Row("anonymous memory (ours has an fd)", anonymous_ours, anonymous_peer, None),
        Row("4 KiB by name: create, map, remove", named_ours, named_peer, None),
    ]


def seconds(call: Callable[[], None], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=MIB, help="bytes to map (default: 1 MiB)")
    parser.add_argument("--times", type=int, default=1000, help="calls in a round")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, Linux {os.uname().release}; medians of {ROUNDS} rounds")
    print(f"regions of {options.size:,} bytes")
    print(f"{'':40} {'forkshm':>10} {'peer':>10} {'ratio':>7}")
    for row in rows(options.size):
        ours, peers = [], []
        for _ in range(ROUNDS):
            ours.append(seconds(row.ours, options.times))
            peers.append(seconds(row.peer, options.times))
        mine, theirs = statistics.median(ours) * 1e6, statistics.median(peers) * 1e6
        verdict = "" if row.bound is None else f"  <= {row.bound} {'ok' if mine <= row.bound * theirs else 'MISSED'}"
        print(f"{row.name:40} {mine:7.1f} us {theirs:7.1f} us {mine / theirs:6.2f}x{verdict}")


if __name__ == "__main__":
    main()
