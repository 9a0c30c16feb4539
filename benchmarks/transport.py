"""The cost of getting work to other processes and back: forkshm, its peers, and the machine.

    python benchmarks/transport.py                             # everything: some seven minutes
    python benchmarks/transport.py --rows apply,array_argument --peers multiprocessing,joblib
    python benchmarks/transport.py --quick                     # tiny sizes: does it still work?
    python benchmarks/transport.py --json FILE --chart FILE    # the numbers and a picture of them
    python benchmarks/transport.py --from FILE --chart FILE    # the same of an earlier run

README.md in this directory describes each row.
"""

from __future__ import annotations

import sys
import tempfile
from typing import TYPE_CHECKING, Any

import _limits
import _program
import _work
import numpy as np
from _peers import Forkshm
from _rows import GB, MB, AtMost, LimitPlus, Rows, Scale, TimesFaster, TimesLimit, Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _peers import Peer

ROWS = Rows()

# Numbers of readers in the row about memory.
READERS, FEW_READERS = 8, 3


@ROWS.row("apply(noop), round trip", TimesLimit(4), limit=_limits.ping_pong, turns=20, burst=100)
def apply(peer: Peer, _: Scale) -> Iterator[Work]:
    with peer.ready():
        yield Work(lambda: peer.apply(_work.noop))


@ROWS.row("map of 2,000 noops, chunksize=1, per task", AtMost(12e-6), TimesFaster(4), burst=2)
def map_single(peer: Peer, scale: Scale) -> Iterator[Work]:
    items = list(range(scale.size(2_000)))
    with peer.ready_to_map():
        yield Work(
            lambda: peer.map(_work.noop, items, chunksize=1), lambda answer: answer == [None] * len(items), len(items)
        )


@ROWS.row("map of 100,000 noops, per task", TimesFaster(1), burst=2)
def map_chunks(peer: Peer, scale: Scale) -> Iterator[Work]:
    items = range(scale.size(100_000))
    with peer.ready_to_map():
        yield Work(lambda: peer.map(_work.noop, items), lambda answer: answer == [None] * len(items), len(items))


def array_as_argument(peer: Peer, nbytes: int) -> Iterator[Work]:
    array = np.arange(nbytes // 8, dtype=float)
    expected = _work.ends(array)
    with peer.ready():
        # A new view each time, because joblib does not copy an array again that it has seen before, even if it was
        # changed.
        yield Work(lambda: peer.apply(_work.ends, array[:]), lambda answer: answer == expected)


@ROWS.row("100 MB array as argument, by value", TimesLimit(1.15), limit=_limits.memcpy_of(100 * MB))
def array_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from array_as_argument(peer, scale.size(100 * MB))


def make_and_copy(scale: Scale) -> Iterator[Work]:
    count = scale.size(64 * MB) // 8
    target = np.ones(count)

    def call() -> None:
        np.copyto(target, _work.ones(count))

    yield Work(call)


@ROWS.row("64 MB array as result", TimesLimit(1.35), limit=make_and_copy)
def array_result(peer: Peer, scale: Scale) -> Iterator[Work]:
    count = scale.size(64 * MB) // 8
    with peer.ready():
        yield Work(lambda: peer.apply(_work.ones, count), lambda answer: answer.size == count and answer.sum() == count)


def compute_warm(scale: Scale) -> Iterator[Work]:
    target = np.ones(scale.size(64 * MB) // 8)
    yield Work(lambda: target.fill(1.0))


@ROWS.row("64 MB array as result, born shared", TimesLimit(1.1), limit=compute_warm)
def array_born_shared(peer: Peer, scale: Scale) -> Iterator[Work]:
    count = scale.size(64 * MB) // 8
    with peer.born_shared_pool():
        yield Work(lambda: peer.apply(_work.ones, count), lambda answer: answer.size == count and answer.sum() == count)


@ROWS.row("1 MB array as argument, by value", LimitPlus(60e-6), limit=_limits.memcpy_of(1 * MB), burst=20)
def small_array_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from array_as_argument(peer, scale.size(1 * MB))


@ROWS.row("64 MB bytes as argument", TimesLimit(2), limit=_limits.memcpy_of(64 * MB, times=2))
def bytes_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    data = _work.kept_bytes(scale.size(64 * MB))
    expected = _work.ends_of_bytes(data)
    with peer.ready():
        yield Work(lambda: peer.apply(_work.ends_of_bytes, data), lambda answer: answer == expected)


@ROWS.row("64 MB bytes as result", TimesLimit(2), limit=_limits.memcpy_of(64 * MB, times=2))
def bytes_result(peer: Peer, scale: Scale) -> Iterator[Work]:
    expected = _work.kept_bytes(scale.size(64 * MB))
    with peer.ready():
        yield Work(lambda: peer.apply(_work.kept_bytes, len(expected)), lambda answer: answer == expected)


@ROWS.row("dict of 100 arrays of 1 MB as argument", TimesLimit(1.5), limit=_limits.memcpy_of(100 * MB))
def dict_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    arrays = {key: np.full(scale.size(1 * MB) // 8, float(key)) for key in range(100)}
    expected = _work.ends_of_many(arrays)
    with peer.ready():
        yield Work(
            lambda: peer.apply(_work.ends_of_many, {key: array[:] for key, array in arrays.items()}),
            lambda answer: answer == expected,
        )


def shared_as_argument(peer: Peer, count: int) -> Iterator[Work]:
    with peer.ready(), peer.shared(count) as (array, look):
        # Only this element is touched, so the other pages of the 4 GB take no memory.
        array[count // 2] = count
        del array
        yield Work(look, lambda answer: answer == count)


@ROWS.row("1 MB shared array as argument", LimitPlus(15e-6), limit=_limits.noop, turns=20, burst=50)
def shared_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from shared_as_argument(peer, scale.size(1 * MB) // 8)


@ROWS.row("4 GB shared array as argument", LimitPlus(15e-6), limit=_limits.noop, turns=20, burst=50)
def large_shared_argument(peer: Peer, scale: Scale) -> Iterator[Work]:
    yield from shared_as_argument(peer, scale.size(4 * GB) // 8)


@ROWS.row("4 GB shared array as result", LimitPlus(15e-6), limit=_limits.noop, turns=20, burst=50)
def shared_result(peer: Peer, scale: Scale) -> Iterator[Work]:
    count = scale.size(4 * GB) // 8
    with peer.ready(), peer.shared_by_worker(count) as look:
        yield Work(look, lambda answer: answer == count)


def copy_and_map(scale: Scale) -> Iterator[Work]:
    copy = _limits.memcpy(scale.size(100 * MB))
    ours = Forkshm()

    def call() -> None:
        copy()
        ours.map(_work.noop, range(64), chunksize=1)

    with ours.ready_to_map():
        yield Work(call)


@ROWS.row("map of 64 tasks, the function holds 100 MB", TimesLimit(1.5), limit=copy_and_map)
def closure(peer: Peer, scale: Scale) -> Iterator[Work]:
    array = np.arange(scale.size(100 * MB) // 8, dtype=float)
    tasks = range(64)
    with peer.ready_to_map():
        yield Work(
            lambda: peer.map_holding(array[:], tasks), lambda answer: answer == [float(index) for index in tasks]
        )


@ROWS.row("queue of 2,000 small messages, each", TimesFaster(3), burst=2)
def queue_small(peer: Peer, scale: Scale) -> Iterator[Work]:
    messages = range(scale.size(2_000))
    with peer.exchange() as send:
        send([])  # waits until the other end runs
        yield Work(lambda: send(messages), lambda answer: answer == sum(messages), len(messages))


@ROWS.row("queue of 20 arrays of 1 MB, each", TimesFaster(10), burst=2)
def queue_arrays(peer: Peer, scale: Scale) -> Iterator[Work]:
    arrays = [np.full(scale.size(1 * MB) // 8, float(value)) for value in range(20)]
    with peer.exchange() as send:
        send([])  # waits until the other end runs
        yield Work(lambda: send(arrays), lambda answer: answer == sum(range(20)), len(arrays))


@ROWS.row("start 2 workers, a noop, end them", TimesFaster(1), limit=_limits.forks(2), burst=2)
def start(peer: Peer, _: Scale) -> Iterator[Work]:
    peer.before_start()
    yield Work(peer.start_and_end)


@ROWS.row("memory of 8 workers reading 1 GB, PSS", AtMost(1.05, "GB"), turns=1, burst=1, together=False, unit="GB")
def memory(peer: Peer, scale: Scale) -> Iterator[Work]:
    count = scale.size(1 * GB) // 8
    readers = FEW_READERS if scale.quick else READERS

    def weigh(count: int) -> float:
        """Return the bytes of all processes while they hold an array that they have read."""
        with peer.read_by_all(count) as read, tempfile.TemporaryDirectory() as directory:
            answers = read(directory, readers)
        if [total for total, _ in answers] != [count] * readers:
            raise ValueError(f"readers found sums {answers} in {count} ones")
        return float(sum(weight for _, weight in answers))

    with peer.pool(readers):
        # Subtract the memory of the processes themselves.
        weigh(1000)
        before = weigh(1000)
        yield Work(lambda: weigh(count) - before, lambda _: True, value=lambda more: more / GB)


def main(arguments: Sequence[str] | None = None) -> int:
    return _program.run("transport", ROWS, __doc__ or "", chart, arguments)


def chart(report: dict[str, Any], path: str) -> None:
    import _charts

    _charts.draw_transport(report, path)


if __name__ == "__main__":
    sys.exit(main())
