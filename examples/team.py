"""A team: the temperature of a plate, by Jacobi iteration, in several processes.

    python examples/team.py --size 400 --sweeps 400 --workers 2

Each point becomes the mean of its four neighbors, repeatedly. The members of a team divide the rows. Their results are
in shared memory, and a barrier follows each sweep. The result equals that of the serial run, to the last bit. If pymp
is installed (pip install pymp-pypi), it runs as well: it has no barrier, so it needs a parallel region for each sweep.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time

import numpy as np

import forkshm


def sweep(old: np.ndarray, new: np.ndarray, rows: range) -> float:
    """Compute rows of the next state; return the largest change."""
    if not rows:
        return 0.0
    low, high = rows.start + 1, rows.stop + 1  # the edge does not change
    part = new[low:high, 1:-1]
    part[:] = old[low - 1 : high - 1, 1:-1]
    part += old[low + 1 : high + 1, 1:-1]
    part += old[low:high, :-2]
    part += old[low:high, 2:]
    part *= 0.25
    return float(np.abs(part - old[low:high, 1:-1]).max())


def heat(plates: list[np.ndarray]) -> None:
    for plate in plates:
        plate[:] = 0
        plate[0] = 100  # one edge is hot


def serial(plates: list[np.ndarray], sweeps: int) -> float:
    change = 0.0
    for number in range(sweeps):
        change = sweep(plates[number % 2], plates[1 - number % 2], range(len(plates[0]) - 2))
    return change


def in_a_team(plates: list[np.ndarray], sweeps: int, workers: int) -> float:
    with forkshm.team(workers) as t:
        change = 0.0
        rows = t.range(len(plates[0]) - 2)
        for number in range(sweeps):
            change = sweep(plates[number % 2], plates[1 - number % 2], rows)
            t.barrier()
        return t.reduce(change, "max")


def with_pymp(plates: list[np.ndarray], sweeps: int, workers: int) -> None:
    import pymp

    for number in range(sweeps):
        with pymp.Parallel(workers) as p:
            sweep(plates[number % 2], plates[1 - number % 2], p.range(len(plates[0]) - 2))


def lose_a_member(workers: int) -> str:
    """Show the error of a team when one of its members is killed."""
    try:
        with forkshm.team(workers) as t:
            if t.rank == t.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            t.barrier()
    except forkshm.WorkerDiedError as error:
        return str(error)
    return "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=800, help="points on each side of the plate")
    parser.add_argument("--sweeps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=max(len(os.sched_getaffinity(0)), 2))
    options = parser.parse_args()
    shape = (options.size, options.size)
    print(f"a plate of {options.size} x {options.size} points, {options.sweeps} sweeps")

    alone = [np.empty(shape), np.empty(shape)]
    heat(alone)
    began = time.perf_counter()
    change = serial(alone, options.sweeps)
    taken = time.perf_counter() - began
    print(f"serial                 {taken:7.2f} s   last change {change:.3g}")

    shared = [forkshm.empty(shape), forkshm.empty(shape)]
    heat(shared)
    began = time.perf_counter()
    same = in_a_team(shared, options.sweeps, options.workers)
    taken = time.perf_counter() - began
    print(f"forkshm.team({options.workers})        {taken:7.2f} s   last change {same:.3g}")
    if same != change or any(not np.array_equal(*pair) for pair in zip(alone, shared, strict=True)):
        print("team: the team's result differs from the serial one", file=sys.stderr)
        return 1

    if importlib.util.find_spec("pymp"):
        import pymp

        theirs = [pymp.shared.array(shape, dtype="float64") for _ in range(2)]
        heat(theirs)
        few = max(options.sweeps // 50, 1)
        began = time.perf_counter()
        with_pymp(theirs, few, options.workers)
        taken = (time.perf_counter() - began) * options.sweeps / few
        print(f"pymp                   {taken:7.2f} s   taken from {few} sweeps")
    print("results equal to the serial run: yes")
    print(f"a killed member is told: {lose_a_member(options.workers)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
