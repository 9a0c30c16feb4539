"""Rows that compare two ways to do the same work. They take turns, and each checks its own answer."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclasses.dataclass(frozen=True)
class Pair:
    """One line of the table."""

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any] | None
    # Unit of the time, "ms" or "us", or of the values that the calls return.
    unit: str = "ms"
    # Number of operations in a call.
    per: int = 1
    # Largest ratio that is accepted.
    bound: float = 1


def check(happened: object) -> None:
    if not happened:
        raise SystemExit("a benchmark got a wrong answer")


def measure(pair: Pair, call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    answer = call()
    taken = (time.perf_counter() - began) * 1e3
    if pair.unit == "us":
        return taken * 1e3
    return taken if pair.unit == "ms" else float(answer)


def compare(pairs: Iterable[Pair], peer: str, rounds: int) -> int:
    """Measure and print each pair; return 1 as an exit code if forkshm missed the bound of a row.

    The two sides take turns, and alternate in beginning a round. The result is the median of the rounds' ratios,
    because other load on the machine affects both sides of a round.
    """
    print(f"Python {sys.version.split()[0]}, Linux {os.uname().release}, {len(os.sched_getaffinity(0))} cores")
    print(f"medians of {rounds} rounds, and of their ratios")
    print(f"{'':46} {'forkshm':>11} {peer:>11} {'ratio':>7}")
    slower = 0
    for pair in pairs:
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(-1, rounds):
            turns = [(ours, pair.ours)] if pair.peer is None else [(ours, pair.ours), (theirs, pair.peer)]
            for taken, call in turns[:: 1 if number % 2 else -1]:
                taken.append(measure(pair, call) / pair.per)
        # The first round starts workers and warms up.
        mine = statistics.median(ours[1:])
        if pair.peer is None:
            print(f"{pair.name:46} {mine:8.3f} {pair.unit} {'missing':>11}", flush=True)
            continue
        ratio = statistics.median(one / other for one, other in zip(ours[1:], theirs[1:], strict=True))
        slower += ratio > pair.bound
        verdict = "ok" if ratio <= pair.bound else "SLOWER" if pair.bound == 1 else f"MISSED, bound {pair.bound:g}"
        print(
            f"{pair.name:46} {mine:8.3f} {pair.unit} {statistics.median(theirs[1:]):8.3f} {pair.unit} {ratio:6.2f}x  "
            f"{verdict}",
            flush=True,
        )
    return 1 if slower else 0
