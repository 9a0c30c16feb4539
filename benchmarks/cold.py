"""The cost of first use of memory, and of whole programs: most programs consist of one map.

    python benchmarks/cold.py                             # everything: some ten minutes
    python benchmarks/cold.py --rows first_argument,program --peers multiprocessing
    python benchmarks/cold.py --quick                     # tiny sizes: does it still work?
    python benchmarks/cold.py --json FILE                 # the numbers, with min, p90 and p99

README.md in this directory describes each row.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

import _limits
import _program
import _work
import numpy as np
from _peers import CannotDoError, Forkshm, PoolPeer
from _rows import MB, Row, Rows, Scale, TimesFaster, TimesLimit, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _peers import Peer

ROWS = Rows()

# Bytes of the arrays of a first use.
LARGE = 64 * MB


# -- first use ------------------------------------------------------------------------


@contextlib.contextmanager
def fresh(peer: Peer, workers: int = 2) -> Iterator[Callable[[], None]]:
    """Yield a call that replaces the workers by new ones that run and have moved no data."""
    with contextlib.ExitStack() as stack:

        def renew() -> None:
            stack.close()
            peer.before_start()
            stack.enter_context(peer.pool(workers))
            peer.apply(_work.noop)

        yield renew


@ROWS.row("first 64 MB array of a pool as argument", TimesLimit(4), limit=_limits.memcpy_of(LARGE), turns=9, burst=1)
def first_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    array = np.arange(scale.size(LARGE) // 8, dtype=float)
    expected = _work.ends(array)
    with fresh(peer) as renew:
        yield Work(lambda: peer.apply(_work.ends, array[:]), lambda answer: answer == expected, prepare=renew)


@ROWS.row("the same, and the task reads it", limit=_limits.memcpy_of(LARGE), turns=9, burst=1)
def first_argument_read(peer: Peer, scale: Scale) -> Iterator[Work]:
    array = np.ones(scale.size(LARGE) // 8)
    with fresh(peer) as renew:
        yield Work(lambda: peer.apply(np.sum, array[:]), lambda answer: answer == array.size, prepare=renew)


@ROWS.row("the same, every second element", limit=_limits.memcpy_of(LARGE), turns=9, burst=1)
def first_strided(peer: Peer, scale: Scale) -> Iterator[Work]:
    array = np.arange(2 * (scale.size(LARGE) // 8), dtype=float)[::2]
    expected = _work.ends(array)
    with fresh(peer) as renew:
        yield Work(lambda: peer.apply(_work.ends, array[:]), lambda answer: answer == expected, prepare=renew)


def make_and_copy_four_times(scale: Scale) -> Iterator[Work]:
    count = scale.size(LARGE) // 8
    copy = _limits.memcpy(8 * count, times=4)

    def call() -> None:
        _work.ones(count)
        copy()

    yield Work(call)


@ROWS.row("first 64 MB array of a pool as result", TimesLimit(1), limit=make_and_copy_four_times, turns=9, burst=1)
def first_result(peer: Peer, scale: Scale) -> Iterator[Work]:
    count = scale.size(LARGE) // 8
    with fresh(peer) as renew:
        yield Work(lambda: peer.apply(_work.ones, count), lambda answer: bool((answer == 1.0).all()), prepare=renew)


# -- after a pause --------------------------------------------------------------------


# On virtual machines, and under memory pressure, the first use of memory after a pause is slow for every program. So
# the limit is what the machine itself needs after the same pause: a copy of as many bytes, and an empty call.


def after_pause(scale: Scale, seconds: float, call: Callable[[], Any], is_right: Callable[[Any], bool]) -> Work:
    """Return work that begins when nothing was done for so long. The sides of a row pause at the same time."""
    pause = seconds / 100 if scale.quick else seconds
    ended = time.monotonic()

    def wait() -> None:
        time.sleep(max(0.0, ended + pause - time.monotonic()))

    def call_and_note() -> Any:
        nonlocal ended
        answer = call()
        ended = time.monotonic()
        return answer

    return Work(call_and_note, is_right, prepare=wait)


def machine_after_pause(scale: Scale, seconds: int = 10) -> Iterator[Work]:
    """Yield an empty call and a copy of 64 MB between two arrays that were not used meanwhile."""
    ours = Forkshm()
    copy = _limits.memcpy(scale.size(LARGE))

    def call() -> None:
        ours.apply(_work.noop)
        copy()

    with ours.ready():
        yield after_pause(scale, seconds, call, lambda _: True)


def makers_after_pause(scale: Scale, seconds: int = 10) -> Iterator[Work]:
    """Yield the same, and making an array of 64 MB in new memory."""
    ours = Forkshm()
    count = scale.size(LARGE) // 8
    copy = _limits.memcpy(scale.size(LARGE))

    def call() -> None:
        ours.apply(_work.noop)
        _work.ones(count)
        copy()

    with ours.ready():
        yield after_pause(scale, seconds, call, lambda _: True)


def check_is_ours(peer: Peer) -> None:
    if peer.name != Forkshm.name:
        raise CannotDoError("it keeps nothing warm between calls")


@ROWS.row("64 MB argument after {seconds} s of pause", TimesLimit(1.5), limit=machine_after_pause, turns=3, burst=1)
def argument_after_pause(peer: Peer, scale: Scale, seconds: int = 10) -> Iterator[Work]:
    check_is_ours(peer)
    array = np.arange(scale.size(LARGE) // 8, dtype=float)
    expected = _work.ends(array)
    with peer.ready():
        yield after_pause(
            scale, seconds, lambda: peer.apply(_work.ends, array[:]), lambda answer: bool(answer == expected)
        )


@ROWS.row("64 MB result after {seconds} s of pause", TimesLimit(1.5), limit=makers_after_pause, turns=3, burst=1)
def result_after_pause(peer: Peer, scale: Scale, seconds: int = 10) -> Iterator[Work]:
    check_is_ours(peer)
    count = scale.size(LARGE) // 8
    with peer.ready():
        yield after_pause(
            scale, seconds, lambda: peer.apply(_work.ones, count), lambda answer: bool(answer.size == count)
        )


# -- programs -------------------------------------------------------------------------


@ROWS.row("start {workers} workers, map over 8 arrays of 8 MB, end", TimesFaster(5), turns=7, burst=1)
def program(peer: Peer, scale: Scale, workers: int = 2) -> Iterator[Work]:
    arrays = [np.full(scale.size(8 * MB) // 8, float(number)) for number in range(8)]
    expected = [_work.ends(array) for array in arrays]

    def call() -> Any:
        with peer.make(workers) as peer.workers:
            return peer.map(_work.ends, [array[:] for array in arrays], chunksize=1)

    yield Work(call, lambda answer: answer == expected, prepare=peer.before_start)


@ROWS.row("start 2 workers, a noop, end them, with {resident} MB in this process", TimesFaster(1), turns=7, burst=1)
def start_with_memory(peer: Peer, scale: Scale, resident: int = 500) -> Iterator[Work]:
    kept = np.ones(scale.size(resident * MB) // 8)
    yield Work(peer.start_and_end, prepare=peer.before_start)
    del kept


# -- text, containers and iterators, warm ---------------------------------------------


@ROWS.row("64 MB str as argument", TimesLimit(2), limit=_limits.memcpy_of(LARGE, times=2))
def text_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    text = "x" * scale.size(LARGE)
    with peer.ready():
        yield Work(lambda: peer.apply(len, text), lambda answer: answer == len(text))


def small_arrays(peer: Peer, arrays: list[_work.Array]) -> Iterator[Work]:
    expected = float(sum(array.sum() for array in arrays))
    with peer.ready():
        yield Work(lambda: peer.apply(_work.sum_of_many, arrays), lambda answer: answer == expected)


@ROWS.row("list of 20,000 arrays of 80 B as argument", TimesFaster(1 / 0.7))
def many_arrays(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from small_arrays(peer, [np.full(10, float(number % 7)) for number in range(scale.size(20_000))])


@ROWS.row("list of 5,000 strided arrays as argument", TimesFaster(1 / 0.7))
def many_strided(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from small_arrays(peer, [np.full(40, float(number % 7))[::2] for number in range(scale.size(5_000))])


@ROWS.row("list of 5,000 arrays of 80 B as result", TimesFaster(1 / 0.7))
def many_arrays_back(peer: Peer, scale: Scale) -> Iterator[Work]:
    count = scale.size(5_000)
    with peer.ready():
        yield Work(lambda: peer.apply(_work.many_ones, count), lambda answer: sum(map(np.sum, answer)) == 10 * count)


def iterated(peer: Peer, scale: Scale, method: str, *, is_sized: bool = True) -> Iterator[Work]:
    if not isinstance(peer, PoolPeer):
        raise CannotDoError("it has no imap")
    count = scale.size(2_000)
    with peer.ready_to_map():

        def call() -> int:
            items = range(count) if is_sized else (number for number in range(count))
            return sum(1 for _ in getattr(peer.workers, method)(_work.noop, items))

        yield Work(call, lambda answer: answer == count, count)


@ROWS.row("imap of 2,000 noops, each", TimesFaster(1 / 0.3), burst=2)
def imap(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from iterated(peer, scale, "imap")


@ROWS.row("imap_unordered of 2,000 noops, each", TimesFaster(1 / 0.3), burst=2)
def imap_unordered(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from iterated(peer, scale, "imap_unordered")


@ROWS.row("imap of a generator of 2,000 items, each", TimesFaster(1 / 0.3), burst=2)
def imap_generator(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from iterated(peer, scale, "imap", is_sized=False)


# Parameters of the rows that have them.
_STEPS: dict[str, list[dict[str, Any]]] = {
    "argument_after_pause": [{"seconds": 10}, {"seconds": 60}],
    "result_after_pause": [{"seconds": 10}, {"seconds": 60}],
    "program": [{"workers": count} for count in (1, 2, 4, 8, 16)],
    "start_with_memory": [{"resident": 500}, {"resident": 2000}],
}


def steps(row: Row, scale: Scale) -> list[dict[str, Any]]:
    """Return the parameters of each measurement of a row."""
    found = _STEPS.get(row.name, [{}])
    return found[:1] if scale.quick else found


def enough(side: str, row: Row, parameters: dict[str, Any]) -> str:
    """Return why a side skips a step; empty if it does not."""
    if row.name == "program" and parameters["workers"] != 2 and side not in ("forkshm", "multiprocessing", "ray"):
        return "with other numbers of workers only forkshm and multiprocessing are measured"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    return _program.run("cold", ROWS, __doc__ or "", chart, arguments, steps=steps, enough=enough)


def chart(report: dict[str, Any], path: str) -> None:
    import _charts

    _charts.draw_transport(report, path)


if __name__ == "__main__":
    sys.exit(main())
