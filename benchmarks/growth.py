"""How the costs of forkshm and its peers grow with the size of arrays, and the number of tasks and of live regions.

    python benchmarks/growth.py                             # some three minutes
    python benchmarks/growth.py --rows tasks --peers multiprocessing,ray
    python benchmarks/growth.py --quick                     # tiny sizes: does it still work?
    python benchmarks/growth.py --json FILE --chart FILE    # the numbers and a picture of them

README.md in this directory describes each row.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import TYPE_CHECKING, Any

import _limits
import _program
import _work
import numpy as np
from _peers import CannotDoError
from _rows import LIMIT, OURS, Row, Rows, Scale, Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _measure import Measured
    from _peers import Peer

ROWS = Rows()

# The parameter of each row, in words, and its values: at full scale, and by --quick.
GROWS: dict[str, tuple[str, list[int], list[int]]] = {
    "by_value": ("bytes", [4096 * 8**step for step in range(6)] + [2**30], [4096, 65536]),
    "shared": ("bytes", [4096 * 16**step for step in range(6)], [4096, 65536]),
    "tasks": ("tasks", [10**power for power in range(2, 7)], [100, 1000]),
    "regions": ("regions", [10**power for power in range(5)], [1, 10]),
}

# A peer skips larger sizes if one call is expected to take longer than this.
LONGEST_SECONDS = 1.5


def memcpy(_: Scale, size: int) -> Iterator[Work]:
    yield Work(_limits.memcpy(size))


@ROWS.row("an array of {size:,} bytes as argument, by value", limit=memcpy, turns=9)
def by_value(peer: Peer, _: Scale, size: int) -> Iterator[Work]:
    array = np.ones(size // 8)
    with peer.ready():
        yield Work(lambda: peer.apply(_work.ends, array[:]), lambda answer: answer == (1.0, 1.0, size // 8))


def noop(scale: Scale, size: int) -> Iterator[Work]:
    yield from _limits.noop(scale)


@ROWS.row("a shared array of {size:,} bytes as argument", limit=noop, turns=9, burst=20)
def shared(peer: Peer, _: Scale, size: int) -> Iterator[Work]:
    count = size // 8
    with peer.ready(), peer.shared(count) as (array, look):
        array[count // 2] = count
        del array
        yield Work(look, lambda answer: answer == count)


@ROWS.row("a map of {size:,} noops, default chunks, per task", turns=7, burst=2)
def tasks(peer: Peer, _: Scale, size: int) -> Iterator[Work]:
    items = range(size)
    with peer.ready_to_map():
        yield Work(lambda: peer.map(_work.noop, items), lambda answer: answer == [None] * size, size)


@ROWS.row("one of {size:,} shared arrays as argument", turns=5, burst=100)
def regions(peer: Peer, _: Scale, size: int) -> Iterator[Work]:
    room_for_fds(size * peer.fds_of_shared + 500)
    with peer.ready(), contextlib.ExitStack() as stack:
        looks = []
        for index in range(size):
            array, look = stack.enter_context(peer.shared(512))
            array[256] = index
            looks.append(look)
            del array
        # A step of 7919 visits all regions in a scattered order, because it is prime to every number of regions.
        order = iter(range(0, 10**9, 7919))
        now = 0

        def choose() -> None:
            nonlocal now
            now = next(order) % size

        yield Work(lambda: looks[now](), lambda answer: answer == now, prepare=choose)


def room_for_fds(count: int) -> None:
    """Raise the limit on fds of this process; workers do not need it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise CannotDoError(f"it needs {count:,} fds, and a process may have {hard:,}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Enough:
    """Decides which sides continue to larger sizes."""

    def __init__(self) -> None:
        # The largest size so far and the seconds of a call, by side and row.
        self._took: dict[tuple[str, str], tuple[int, float]] = {}

    def reason(self, side: str, row: Row, parameters: dict[str, Any]) -> str:
        """Return the reason for a side to skip a step; empty if it should not."""
        size, took = self._took.get((side, row.name), (1, 0.0))
        expected = took * parameters["size"] / size
        if side in (OURS, LIMIT) or expected <= LONGEST_SECONDS:
            return ""
        return f"one call would take some {expected:.2g} s"

    def note(self, row: Row, parameters: dict[str, Any], measured: Measured) -> None:
        """Record the time of a call."""
        size = parameters["size"]
        for side, taken in measured.timings.items():
            self._took[side, row.name] = size, taken.median * (size if row.name == "tasks" else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    def steps(row: Row, scale: Scale) -> list[dict[str, Any]]:
        _, full, few = GROWS[row.name]
        return [{"size": size} for size in (few if scale.quick else full)]

    enough = Enough()
    return _program.run(
        "growth", ROWS, __doc__ or "", chart, arguments, steps=steps, enough=enough.reason, done=enough.note
    )


def chart(report: dict[str, Any], path: str) -> None:
    import _charts

    _charts.draw_growth(report, path)


if __name__ == "__main__":
    sys.exit(main())
