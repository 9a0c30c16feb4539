"""The cost of a team beside pymp: rows of both, in one run.

    pip install pymp-pypi && python benchmarks/team.py

Rounds of both take turns, so that noise affects both; each side checks its answer. Exits with 1 if forkshm is slower in
a row. Without pymp, only forkshm is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
from _pairs import Pair, check, compare

import forkshm

try:
    import pymp
except ImportError:
    pymp = None


def rows(workers: int, steps: int, side: int) -> list[Pair]:
    ours = forkshm.zeros(steps)
    plate = [forkshm.zeros((side, side)) for _ in range(2)]
    if pymp is not None:
        theirs = pymp.shared.array((steps,), dtype="float64")
        their_plate = [pymp.shared.array((side, side), dtype="float64") for _ in range(2)]
    items = list(range(steps))
    sweeps = 10

    def verify(results: np.ndarray) -> None:
        check(np.array_equal(results, np.arange(steps)))
        results[:] = 0

    def start_ours() -> None:
        with forkshm.team(workers):
            pass

    def start_peer() -> None:
        with pymp.Parallel(workers):
            pass

    def static_ours() -> None:
        with forkshm.team(workers) as t:
            for i in t.range(steps):
                ours[i] = i
        verify(ours)

    def static_peer() -> None:
        with pymp.Parallel(workers) as p:
            for i in p.range(steps):
                theirs[i] = i
        verify(theirs)

    def dynamic_ours() -> None:
        with forkshm.team(workers) as t:
            for i in t.range(steps, schedule="dynamic"):
                ours[i] = i
        verify(ours)

    def dynamic_peer() -> None:
        with pymp.Parallel(workers) as p:
            for i in p.xrange(steps):
                theirs[i] = i
        verify(theirs)

    def iterate_ours() -> None:
        with forkshm.team(workers) as t:
            for i in t.iterate(items):
                ours[i] = i
        verify(ours)

    def iterate_peer() -> None:
        with pymp.Parallel(workers) as p:
            for i in p.iterate(items):
                theirs[i] = i
        verify(theirs)

    def lock_ours() -> None:
        with forkshm.team(workers) as t:
            for _ in t.range(steps):
                with t.lock:
                    ours[0] += 1
        check(ours[0] == steps)
        ours[0] = 0

    def lock_peer() -> None:
        with pymp.Parallel(workers) as p:
            for _ in p.range(steps):
                with p.lock:
                    theirs[0] += 1
        check(theirs[0] == steps)
        theirs[0] = 0

    def sweep(plates: list[np.ndarray], number: int, lines: range) -> None:
        old, new = plates[number % 2], plates[1 - number % 2]
        low, high = lines.start + 1, lines.stop + 1
        new[low:high, 1:-1] = old[low - 1 : high - 1, 1:-1] + old[low + 1 : high + 1, 1:-1] + 1

    def jacobi_ours() -> None:
        for each in plate:
            each[:] = 0
        with forkshm.team(workers) as t:
            lines = t.range(side - 2)
            for number in range(sweeps):
                sweep(plate, number, lines)
                t.barrier()
        check(plate[0][side // 2, side // 2] == 2**sweeps - 1 or side < 2 * sweeps)

    def jacobi_peer() -> None:
        for each in their_plate:
            each[:] = 0
        for number in range(sweeps):  # it has no barrier
            with pymp.Parallel(workers) as p:
                sweep(their_plate, number, p.range(side - 2))
        check(their_plate[0][side // 2, side // 2] == 2**sweeps - 1 or side < 2 * sweeps)

    def pair(name: str, mine: Callable[[], None], peers: Callable[[], None]) -> Pair:
        return Pair(name, mine, None if pymp is None else peers)

    return [
        pair("start and end a team", start_ours, start_peer),
        pair(f"{steps:,} steps, static", static_ours, static_peer),
        pair(f"{steps:,} steps, dynamic", dynamic_ours, dynamic_peer),
        pair(f"{steps:,} elements of a list", iterate_ours, iterate_peer),
        pair(f"{steps:,} steps with the lock", lock_ours, lock_peer),
        pair(f"{sweeps} sweeps over {side} x {side} points", jacobi_ours, jacobi_peer),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--side", type=int, default=500, help="of the plate that is swept over")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    return compare(rows(options.workers, options.steps, options.side), "pymp", options.rounds)


if __name__ == "__main__":
    sys.exit(main())
