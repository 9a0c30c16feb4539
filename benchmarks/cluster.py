"""Tasks on one large array, on a cluster of two local nodes: forkshm's executor beside plain Dask, in one run.

    pip install 'forkshm[dask]' && python benchmarks/cluster.py
    python benchmarks/cluster.py --megabytes 40 --tasks 16

Prints the time, the bytes that crossed the loopback interface and the memory (PSS) that each node took for the array.
Exits with 1 when a result is wrong, when more than two copies crossed, or when a node took more than 1.1 copies.
Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import numpy as np
from distributed import Client, LocalCluster, wait

import forkshm


def crossed() -> int:
    """Return the bytes that the loopback interface has received."""
    with open("/proc/net/dev") as file:
        (line,) = (line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def children(pid: int) -> list[int]:
    """Return the pids of the descendants of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            pids = [int(child) for child in file.read().split()]
    except OSError:
        return []
    return [each for child in pids for each in (child, *children(child))]


def pss(pid: int) -> int:
    """Return the bytes of a process and its descendants, with shared pages divided among those that share them."""
    total = 0
    for each in (pid, *children(pid)):
        try:
            with open(f"/proc/{each}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except OSError:  # the process has ended
            continue
    return total


def work(array: np.ndarray, number: int) -> int:
    """Read the whole array."""
    return float(array[number::64].sum())


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--tasks", type=int, default=64)
    given = parser.parse_args()
    array = np.random.default_rng(1).integers(0, 1000, given.megabytes * 125_000)
    wanted = [work(array, number) for number in range(given.tasks)]
    is_right = True
    rows = []
    for name in ("dask", "forkshm"):
        with (
            LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            pids = list(client.run(os.getpid).values())
            if name == "forkshm":
                with forkshm.Executor(cluster=client) as executor:
                    list(executor.map(abs, range(8)))  # starts the pools
                    before, memory, begun = crossed(), [pss(pid) for pid in pids], time.perf_counter()
                    results = list(executor.map(work, [array] * given.tasks, range(given.tasks), chunksize=1))
                    seconds = time.perf_counter() - begun
                    moved, taken = crossed() - before, [pss(pid) - held for pid, held in zip(pids, memory, strict=True)]
            else:
                client.gather(client.map(abs, range(8)))
                before, memory, begun = crossed(), [pss(pid) for pid in pids], time.perf_counter()
                there = client.scatter(array, broadcast=True)
                futures = [client.submit(work, there, number, pure=False) for number in range(given.tasks)]
                wait(futures)
                results = client.gather(futures)
                seconds = time.perf_counter() - begun
                moved, taken = crossed() - before, [pss(pid) - held for pid, held in zip(pids, memory, strict=True)]
        is_right &= results == wanted
        rows.append((name, seconds, moved / array.nbytes, max(taken) / array.nbytes))
    print(f"{given.tasks} tasks on an array of {given.megabytes} MB, two nodes of two workers")
    print(f"{'':10} {'seconds':>8} {'copies crossed':>15} {'copies on a node (PSS)':>24}")
    for name, seconds, copies, memory_share in rows:
        print(f"{name:10} {seconds:8.2f} {copies:15.2f} {memory_share:24.2f}")
    if not is_right:
        print("a result is wrong", file=sys.stderr)
    _, _, copies, memory_share = rows[-1]
    return 0 if is_right and copies <= 2.1 and memory_share <= 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
