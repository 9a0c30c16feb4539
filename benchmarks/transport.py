"""What it costs to get work to a pool and back: forkshm, multiprocessing, and the machine.

One run measures all three, turn by turn, so that noise hits each of them::

    python benchmarks/transport.py                         # some two minutes
    python benchmarks/transport.py --rows apply,array_argument
    python benchmarks/transport.py --quick                 # tiny sizes: does it still work?

README.md in this directory says what each row means.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

import forkshm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Check: TypeAlias = Callable[[Any], bool]

KB, MB, GB = 10**3, 10**6, 10**9
WORKERS = 2
SPIN_SECONDS = 200e-6

peers = multiprocessing.get_context("fork")


# -- what workers run -----------------------------------------------------------------
#
# These cross by name, because the program runs as the module ``transport`` (see the last
# lines). Functions of ``__main__`` would be at a disadvantage that says nothing about
# transport: forkshm sends those by value, which takes cloudpickle some 40 us for each call.


def noop(_: object = None) -> None:
    """Do nothing."""


def ends(array: np.ndarray[Any, Any]) -> tuple[float, float, int]:
    """Look at an array without reading all of it: that is not transport."""
    return float(array[0]), float(array[-1]), array.size


def ends_of_many(arrays: dict[int, np.ndarray[Any, Any]]) -> tuple[float, float, int]:
    firsts, lasts, sizes = zip(*map(ends, arrays.values()), strict=True)
    return sum(firsts), sum(lasts), sum(sizes)


def middle(array: np.ndarray[Any, Any]) -> int:
    return int(array[array.size // 2])


def ones(count: int) -> np.ndarray[Any, Any]:
    return np.ones(count)


def ends_of_bytes(data: bytes) -> tuple[int, int, int]:
    return data[0], data[-1], len(data)


@functools.cache
def kept_bytes(nbytes: int) -> bytes:
    """Make bytes once in each worker, so that only sending them is measured."""
    return b"x" * nbytes


def item(array: np.ndarray[Any, Any], index: int) -> float:
    return float(array[index])


# -- measuring ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much to do."""

    quick: bool

    def size(self, full: int) -> int:
        """Bytes, or items."""
        return max(1, full // 100) if self.quick else full

    def times(self, full: int) -> int:
        """Repetitions."""
        return max(2, full // 20) if self.quick else full


class Timings:
    """Seconds that one side took, sorted."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = sorted(seconds)
        self.median = statistics.median(seconds)

    def percentile(self, percent: int) -> float | None:
        """Return a percentile; None when there are too few measurements to have one."""
        if len(self.seconds) < 100 / (100 - percent):
            return None
        return self.seconds[math.ceil(len(self.seconds) * percent / 100) - 1]

    def as_json(self) -> dict[str, Any]:
        return {
            "count": len(self.seconds),
            "min": self.seconds[0],
            "median": self.median,
            "p90": self.percentile(90),
            "p99": self.percentile(99),
        }


def by_turns(
    sides: dict[str, Callable[[], Any]],
    is_right: Check,
    *,
    repetitions: int,
    burst: int = 1,
    per: int = 1,
    warm_ups: int = 3,
    once: Sequence[str] = (),
) -> dict[str, Timings]:
    """Measure all sides in turn: ours, the peer, the limit, ours, the peer, ...

    Args:
        sides: What to time, by the name of the side.
        is_right: Looks at each answer, but for the limit's. Not timed, and neither is
            freeing the answer.
        repetitions: Turns.
        burst: Calls in one turn, each timed; for short ones, which differ between the
            first after a pause and those that follow.
        per: Tasks in a call: what to divide its time by.
        warm_ups: Turns that do not count.
        once: Sides that are so slow that they have one turn and no warm-up.

    Raises:
        RuntimeError: An answer is wrong.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    gc.collect()
    for turn in range(-warm_ups, repetitions):
        for side, call in sides.items():
            if side in once and turn != 0:
                continue
            for _ in range(burst):
                began = time.perf_counter()
                answer = call()
                took = time.perf_counter() - began
                if side != "limit" and not is_right(answer):
                    raise RuntimeError(f"{side} gave a wrong answer: {answer!r:.200}")
                del answer
                if turn >= 0:
                    seconds[side].append(took / per)
    return {side: Timings(taken) for side, taken in seconds.items()}


@contextlib.contextmanager
def both_pools() -> Iterator[tuple[forkshm.Pool, Any]]:
    # Ours first: the peer starts threads, and forking those is asking for trouble.
    with forkshm.Pool(WORKERS) as ours, peers.Pool(WORKERS) as peer:
        yield ours, peer


def memcpy(nbytes: int, times: int = 1) -> Callable[[], None]:
    """Return a call that copies *nbytes* into memory that has been used before."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)

    def copy() -> None:
        for _ in range(times):
            np.copyto(target, source)

    return copy


def receive_spinning(end: socket.socket) -> bytes:
    """Look again and again, and sleep only when nothing came for a while."""
    give_up = time.perf_counter() + SPIN_SECONDS
    while True:
        try:
            return end.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if time.perf_counter() > give_up:
                return end.recv(64)


@contextlib.contextmanager
def ping_pong() -> Iterator[Callable[[], bytes]]:
    """Yield the shortest way to another process and back: a message, and two that look for it."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            # Told to stop: no end of file will come, as workers inherit the near end.
            while (message := receive_spinning(far)) not in (b"stop", b""):
                far.send(message)
        finally:
            os._exit(0)

    def round_trip() -> bytes:
        near.send(b"ping")
        return receive_spinning(near)

    try:
        yield round_trip
    finally:
        near.send(b"stop")
        os.waitpid(pid, 0)
        near.close()
        far.close()


class Others:
    """How much of the machine other processes take, and what a hypervisor keeps from it."""

    def __init__(self) -> None:
        self._began = self._look()

    @staticmethod
    def _look() -> tuple[float, float, float]:
        """Return seconds, added up over all cores: passed, not idle, and ours."""
        with open("/proc/stat") as lines:
            ticks = [int(word) for word in lines.readline().split()[1:9]]
        # Children count once they were waited for, so look after the pools are gone.
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        idle = ticks[3] + ticks[4]
        hertz = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / hertz, (sum(ticks) - idle) / hertz, sum(used.ru_utime + used.ru_stime for used in usages)

    def share(self) -> float:
        """Return their part of all cores since this was made, from 0 to 1."""
        passed, busy, ours = (now - then for now, then in zip(self._look(), self._began, strict=True))
        return max(0.0, min(1.0, (busy - ours) / passed)) if passed else 0.0


# -- bounds ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TimesLimit:
    """At most so many times the limit."""

    factor: float

    def __str__(self) -> str:
        return f"<= {self.factor:g}x limit"

    def is_kept(self, sides: dict[str, Timings]) -> bool:
        return sides["ours"].median <= self.factor * sides["limit"].median


@dataclasses.dataclass(frozen=True)
class LimitPlus:
    """At most so much longer than the limit."""

    seconds: float

    def __str__(self) -> str:
        return f"<= limit + {self.seconds * 1e6:g} us"

    def is_kept(self, sides: dict[str, Timings]) -> bool:
        return sides["ours"].median <= sides["limit"].median + self.seconds


@dataclasses.dataclass(frozen=True)
class TimesFaster:
    """At least so many times faster than the peer."""

    factor: float

    def __str__(self) -> str:
        return f">= {self.factor:g}x peer" if self.factor != 1 else "<= peer"

    def is_kept(self, sides: dict[str, Timings]) -> bool:
        return self.factor * sides["ours"].median <= sides["peer"].median


Bound: TypeAlias = "TimesLimit | LimitPlus | TimesFaster"


# -- rows -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured for one kind of work."""

    name: str
    title: str
    bound: Bound
    #: By "ours", and as far as there are such, "peer" and "limit".
    sides: dict[str, Timings]
    #: Why there is no peer; empty when there is one.
    no_peer: str
    #: Part of all cores that other processes took meanwhile: above 0.1, measure again.
    others: float
    #: Tiny sizes say nothing about bounds.
    judged: bool

    @property
    def verdict(self) -> str:
        if not self.judged:
            return "-"
        return "ok" if self.bound.is_kept(self.sides) else "MISSED"

    def ratio(self, over: str, under: str) -> float | None:
        if over not in self.sides or under not in self.sides:
            return None
        return self.sides[over].median / self.sides[under].median

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "seconds": {side: timings.as_json() for side, timings in self.sides.items()},
            "peer_over_ours": self.ratio("peer", "ours"),
            "ours_over_limit": self.ratio("ours", "limit"),
            "bound": str(self.bound),
            "verdict": self.verdict,
            "no_peer": self.no_peer,
            "others": self.others,
        }


#: Rows by name: each runs its measurement at a scale.
ROWS: dict[str, Callable[[Scale], Row]] = {}

Measurement: TypeAlias = "Callable[[Scale], dict[str, Timings]]"


def row(
    title: str, bound: Bound, no_peer: Callable[[Scale], str] = lambda _: ""
) -> Callable[[Measurement], Measurement]:
    """Register a measurement under the name of its function."""

    def register(measure: Measurement) -> Measurement:
        def run(scale: Scale) -> Row:
            others = Others()
            sides = measure(scale)
            share = others.share()
            return Row(measure.__name__, title, bound, sides, no_peer(scale), share, judged=not scale.quick)

        ROWS[measure.__name__] = run
        return measure

    return register


@row("apply(noop), round trip", TimesFaster(3))
def apply(scale: Scale) -> dict[str, Timings]:
    with ping_pong() as round_trip, both_pools() as (ours, peer):
        return by_turns(
            {"ours": lambda: ours.apply(noop), "peer": lambda: peer.apply(noop), "limit": round_trip},
            lambda answer: answer is None,
            repetitions=scale.times(40),
            burst=scale.times(100),
        )


@row("map(noop, 2,000 items, chunksize=1), per task", TimesFaster(2))
def map_single(scale: Scale) -> dict[str, Timings]:
    items = list(range(scale.size(2_000)))
    with both_pools() as (ours, peer):
        return by_turns(
            {"ours": lambda: ours.map(noop, items, chunksize=1), "peer": lambda: peer.map(noop, items, chunksize=1)},
            lambda answer: answer == [None] * len(items),
            repetitions=scale.times(21),
            per=len(items),
        )


@row("map(noop, range(100_000)), per task", TimesFaster(1))
def map_chunks(scale: Scale) -> dict[str, Timings]:
    items = range(scale.size(100_000))
    with both_pools() as (ours, peer):
        return by_turns(
            {"ours": lambda: ours.map(noop, items), "peer": lambda: peer.map(noop, items)},
            lambda answer: answer == [None] * len(items),
            repetitions=scale.times(21),
            per=len(items),
        )


def array_as_argument(nbytes: int, repetitions: int, burst: int = 1) -> dict[str, Timings]:
    array = np.arange(nbytes // 8, dtype=float)
    expected = ends(array)
    with both_pools() as (ours, peer):
        return by_turns(
            {
                "ours": lambda: ours.apply(ends, (array,)),
                "peer": lambda: peer.apply(ends, (array,)),
                "limit": memcpy(array.nbytes),
            },
            lambda answer: answer == expected,
            repetitions=repetitions,
            burst=burst,
        )


@row("100 MB array as argument, by value", TimesLimit(1.5))
def array_argument(scale: Scale) -> dict[str, Timings]:
    return array_as_argument(scale.size(100 * MB), scale.times(15))


@row("64 MB array as result", TimesLimit(1.6))
def array_result(scale: Scale) -> dict[str, Timings]:
    count = scale.size(64 * MB) // 8
    target = np.ones(count)

    def make_and_copy() -> np.ndarray[Any, Any]:
        made = ones(count)
        np.copyto(target, made)
        return made

    with both_pools() as (ours, peer):
        return by_turns(
            {
                "ours": lambda: ours.apply(ones, (count,)),
                "peer": lambda: peer.apply(ones, (count,)),
                "limit": make_and_copy,
            },
            lambda answer: answer.size == count and answer.sum() == count,
            repetitions=scale.times(15),
        )


@row(
    "64 MB array as result, born shared",
    TimesLimit(1.1),
    no_peer=lambda _: "multiprocessing copies every result, see the row above",
)
def born_result(scale: Scale) -> dict[str, Timings]:
    count = scale.size(400 * MB if scale.quick else 64 * MB) // 8  # born shared from 1 MiB on
    target = np.ones(count)

    def compute() -> None:
        np.copyto(target, 1)

    with forkshm.Pool(WORKERS, born_shared=True) as ours:
        timings = by_turns(
            {"ours": lambda: ours.apply(ones, (count,)), "limit": compute},
            lambda answer: answer.size == count and answer.sum() == count,
            repetitions=scale.times(15),
        )
        if copied := ours.statistics().bytes_copied:
            raise RuntimeError(f"{copied:,} bytes were copied")
        return timings


@row("1 MB array as argument, by value", LimitPlus(60e-6))
def small_array_argument(scale: Scale) -> dict[str, Timings]:
    return array_as_argument(scale.size(1 * MB), scale.times(20), burst=scale.times(20))


@row("64 MB bytes as argument", TimesLimit(2))
def bytes_argument(scale: Scale) -> dict[str, Timings]:
    data = kept_bytes(scale.size(64 * MB))
    expected = ends_of_bytes(data)
    with both_pools() as (ours, peer):
        return by_turns(
            {
                "ours": lambda: ours.apply(ends_of_bytes, (data,)),
                "peer": lambda: peer.apply(ends_of_bytes, (data,)),
                "limit": memcpy(len(data), times=2),
            },
            lambda answer: answer == expected,
            repetitions=scale.times(15),
        )


@row("64 MB bytes as result", TimesLimit(2))
def bytes_result(scale: Scale) -> dict[str, Timings]:
    nbytes = scale.size(64 * MB)
    with both_pools() as (ours, peer):
        return by_turns(
            {
                "ours": lambda: ours.apply(kept_bytes, (nbytes,)),
                "peer": lambda: peer.apply(kept_bytes, (nbytes,)),
                "limit": memcpy(nbytes, times=2),
            },
            lambda answer: answer == b"x" * nbytes,
            repetitions=scale.times(15),
        )


@row("dict of 100 arrays of 1 MB as argument", TimesLimit(1.5))
def dict_argument(scale: Scale) -> dict[str, Timings]:
    arrays = {key: np.full(scale.size(1 * MB) // 8, float(key)) for key in range(100)}
    expected = ends_of_many(arrays)
    with both_pools() as (ours, peer):
        return by_turns(
            {
                "ours": lambda: ours.apply(ends_of_many, (arrays,)),
                "peer": lambda: peer.apply(ends_of_many, (arrays,)),
                "limit": memcpy(sum(array.nbytes for array in arrays.values())),
            },
            lambda answer: answer == expected,
            repetitions=scale.times(15),
        )


@row(
    "1 GB SharedArray as argument (limit: noop)",
    LimitPlus(30e-6),
    no_peer=lambda _: "multiprocessing cannot pass memory that is shared, only copies",
)
def shared_argument(scale: Scale) -> dict[str, Timings]:
    # Made after the pool, so that it does not cross by fork.
    with forkshm.Pool(WORKERS) as ours:
        array = forkshm.empty(scale.size(1 * GB) // 8, np.int64)
        array[:] = np.arange(array.size)
        return by_turns(
            {"ours": lambda: ours.apply(middle, (array,)), "limit": lambda: ours.apply(noop)},
            lambda answer: answer == array.size // 2,
            repetitions=scale.times(40),
            burst=scale.times(50),
        )


@row(
    "map of 64 tasks, the function holds 100 MB",
    TimesLimit(1.5),
    no_peer=lambda scale: "skipped by --quick: it pickles the array again for each task" if scale.quick else "",
)
def closure(scale: Scale) -> dict[str, Timings]:
    array = np.arange(scale.size(100 * MB) // 8, dtype=float)
    tasks = range(64)
    copy = memcpy(array.nbytes)
    with both_pools() as (ours, peer):

        def copy_and_run() -> None:
            copy()
            ours.map(noop, tasks, chunksize=1)

        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours.map(lambda index: float(array[index]), tasks, chunksize=1),
            # The peer cannot send closures; this is what one writes for it instead.
            "peer": lambda: peer.map(functools.partial(item, array), tasks, chunksize=1),
            "limit": copy_and_run,
        }
        if scale.quick:
            del sides["peer"]
        return by_turns(
            sides,
            lambda answer: answer == [float(index) for index in tasks],
            repetitions=scale.times(15),
            once=("peer",),
        )


@row("start and end Pool(2) (limit: 2 forks)", TimesFaster(1))
def start(scale: Scale) -> dict[str, Timings]:
    def make(pool: Callable[[int], Any]) -> None:
        with pool(WORKERS):
            pass

    def fork_and_wait() -> None:
        children = []
        for _ in range(WORKERS):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)

    return by_turns(
        {"ours": lambda: make(forkshm.Pool), "peer": lambda: make(peers.Pool), "limit": fork_and_wait},
        lambda answer: answer is None,
        repetitions=scale.times(40),
    )


# -- telling --------------------------------------------------------------------------


def machine() -> dict[str, str]:
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "forkshm": forkshm.__version__,
        "load": f"{os.getloadavg()[0]:.2f}",
    }


HEADINGS = (
    *("row", "unit", "forkshm", "p90", "p99", "peer", "limit"),
    *("peer/forkshm", "forkshm/limit", "bound", "verdict", "others"),
)


def cells(row: Row) -> list[str]:
    ours, peer, limit = row.sides["ours"], row.sides.get("peer"), row.sides.get("limit")
    unit, name = (1e-6, "us") if ours.median < 1e-3 else (1e-3, "ms")

    def number(value: float | None, pattern: str = "{:,.2f}") -> str:
        return "-" if value is None else pattern.format(value)

    def in_unit(seconds: float | None) -> str:
        return number(seconds and seconds / unit)

    to_limit = number(row.ratio("ours", "limit"), "{:.2f}x")
    if limit is not None and isinstance(row.bound, LimitPlus):
        to_limit = f"{(ours.median - limit.median) * 1e6:+.1f} us"
    return [
        row.title,
        name,
        in_unit(ours.median),
        in_unit(ours.percentile(90)),
        in_unit(ours.percentile(99)),
        in_unit(peer and peer.median),
        in_unit(limit and limit.median),
        number(row.ratio("peer", "ours"), "{:,.2f}x"),
        to_limit,
        str(row.bound),
        row.verdict,
        f"{row.others:.0%}",
    ]


def print_table(lines: list[list[str]]) -> None:
    """Print with rich, or without when it is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(HEADINGS, *lines, strict=True)]
        for line in [HEADINGS, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        is_text = heading in ("row", "unit", "bound", "verdict")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "row")
    for line in lines:
        table.add_row(*line, style="bold red" if line[-2] == "MISSED" else None)
    # A file has no width; there, lines are as long as they have to be.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure forkshm.Pool beside multiprocessing.Pool and the machine.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repetitions; bounds are not judged")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well, in seconds")
    parser.add_argument("--rows", metavar="NAME,...", help=f"only these of: {', '.join(ROWS)}")
    options = parser.parse_args(arguments)
    options.rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    described = machine()
    print("; ".join(f"{name} {value}" for name, value in described.items()))
    rows = []
    for name in options.rows:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows.append(ROWS[name](Scale(options.quick)))
    print_table([cells(row) for row in rows])
    print(
        f"Medians; peer: multiprocessing.Pool({WORKERS}), started by fork; p90 and p99: forkshm's; "
        "others: the part of the machine that other processes took meanwhile."
    )
    for row in rows:
        if row.no_peer:
            print(f"{row.title}: no peer, {row.no_peer}.")
    if options.quick:
        print("Sizes were a hundredth of what the rows say, so bounds were not judged.")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"machine": described, "quick": options.quick, "rows": [row.as_json() for row in rows]}, file, indent=2
            )
    return 0


if __name__ == "__main__":
    # Once more, as a module, so that its functions have a name that workers can import.
    import transport

    sys.exit(transport.main())
