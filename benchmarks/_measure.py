"""Measurement: sides take turns, and the load of other processes is recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _peers import PEERS
from _rows import LIMIT, OURS, REFERENCE, Row, Scale
from _work import descendants, stat_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HERE = Path(__file__).parent

# A side that does not answer within this time counts as hung.
PATIENCE_SECONDS = 180.0
# A side that was told to end is killed after this time.
END_SECONDS = 15.0


class SideError(Exception):
    """A side cannot be started, gave a wrong answer, died or hung."""


class Timings:
    """The times of the calls of one side, sorted."""

    def __init__(self, taken: Sequence[float]) -> None:
        self.taken = sorted(taken)
        self.median = statistics.median(taken)

    def percentile(self, percent: int) -> float | None:
        """Return a percentile; None if there are too few measurements for it."""
        if len(self.taken) < 100 / (100 - percent):
            return None
        return self.taken[math.ceil(len(self.taken) * percent / 100) - 1]

    def as_json(self) -> dict[str, Any]:
        return {
            "count": len(self.taken),
            "min": self.taken[0],
            "median": self.median,
            "p90": self.percentile(90),
            "p99": self.percentile(99),
        }


class Side:
    """The process that measures one side (see ``_side.py``)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = ""
        self.restless = name in PEERS and PEERS[name].restless
        near, far = socket.socketpair()
        with far:
            self._process = subprocess.Popen(
                [sys.executable, HERE / "_side.py", str(far.fileno()), name],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                # Output of libraries would disturb the table.
                stdout=subprocess.DEVNULL,
                # A process group of its own, so that processes it leaves behind can be found.
                start_new_session=True,
                # Needed by workers that are not forked.
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
            )
        self._connection = Connection(near.detach())

    def start(self) -> None:
        """Wait until the process has imported the library to measure.

        Raises:
            SideError: It cannot; the message has the reason.
        """
        self.version = self._answer()

    def set_up(self, module: str, row: str, scale: Scale, parameters: Mapping[str, Any]) -> str | None:
        """Prepare a row; return the reason if that is impossible, otherwise None."""
        reason: str | None = self._ask("set up", module, row, scale, dict(parameters))
        return reason

    def turn(self, calls: int, seconds: float) -> list[float]:
        taken: list[float] = self._ask("turn", calls, seconds)
        return taken

    def tear_down(self) -> None:
        self._ask("tear down")

    def _ask(self, *command: Any) -> Any:
        try:
            self._connection.send(command)
        except OSError as error:
            raise SideError(f"died: {error}") from error
        return self._answer()

    def _answer(self) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        # Workers may hold the other end open, so the end of the stream is not enough.
        while not self._connection.poll(0.2):
            if self._process.poll() is not None and not self._connection.poll():
                raise SideError(f"died: exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                # Otherwise it would answer the next command with the answer to this one.
                self._kill()
                raise SideError(f"did not answer for {PATIENCE_SECONDS:g} s")
        try:
            is_good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise SideError(f"died: exit code {self._process.wait(END_SECONDS)}") from error
            raise SideError("closed its end") from error
        if not is_good:
            raise SideError(answer.strip())
        return answer

    def tell_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(("end",))

    def end(self) -> None:
        """Wait until the process has ended, and kill the processes it leaves behind."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._connection.close()
        self._kill()

    def _kill(self) -> None:
        # Kills the workers of a dead process, or all processes of one that hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def started(names: Sequence[str]) -> Iterator[tuple[list[Side], dict[str, str]]]:
    """Yield the sides that could be started, and the reasons for the others."""
    sides = [Side(name) for name in names]
    left_out = {}
    try:
        for side in sides:
            try:
                side.start()
            except SideError as error:
                left_out[side.name] = last_line(error)
        yield [side for side in sides if side.name not in left_out], left_out
    finally:
        for side in sides:
            side.tell_to_end()
        for side in sides:
            side.end()


def last_line(error: Exception) -> str:
    """Return the last line of a traceback, which names the error."""
    return (str(error).splitlines() or [""])[-1]


@dataclasses.dataclass(frozen=True)
class Effort:
    """The effort to spend on a measurement."""

    # A side has no more turns in a row once its calls took this many seconds in total.
    budget: float = 1.0
    # The same for forkshm, the limit, and sides that bounds refer to.
    budget_of_ours: float = 3.0
    # A side whose first call takes longer is measured only once.
    once: float = 2.0
    # Maximum seconds of one turn of one side.
    turn: float = 0.4
    # Calls that do not count, unless the first takes longer than *once*; they also end after some seconds in total.
    warm_ups: int = 3
    warm_up_seconds: float = 0.3
    # Maximum number of turns; None for the number that the row gives.
    turns: int | None = None


FULL = Effort()
QUICK = Effort(budget=0.05, budget_of_ours=0.05, once=0.2, turn=0.02, warm_ups=1, turns=2)


@dataclasses.dataclass
class Measured:
    """Measurements of the sides of one row."""

    timings: dict[str, Timings] = dataclasses.field(default_factory=dict)
    # Sides that cannot do this work, with the reason.
    cannot: dict[str, str] = dataclasses.field(default_factory=dict)
    # Sides that failed, with the error.
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    # Fraction of all cores that other processes used meanwhile: above 0.1, measure again.
    others: float = 0.0


class Turns:
    """The turns of one side in one row."""

    def __init__(self, side: Side, row: Row, effort: Effort) -> None:
        self.side, self.row, self.effort = side, row, effort
        self.taken: list[float] = []
        self.spent = 0.0
        self.budget = effort.budget_of_ours if side.name in (OURS, REFERENCE, LIMIT) else effort.budget

    def warm_up(self) -> None:
        if self.row.turns == 1:
            return
        first = self._measure(calls=1)
        if self.spent > self.effort.once:
            self.taken, self.budget = first, 0.0
            return
        for _ in range(1, self.effort.warm_ups):
            if self.spent < self.effort.warm_up_seconds:
                self._measure(calls=1)
        self.spent = 0.0

    def take(self) -> None:
        """Take a turn, unless the budget is used up."""
        if not self.taken or self.spent < self.budget:
            self.taken += self._measure(self.row.burst)

    def _measure(self, calls: int) -> list[float]:
        began = time.perf_counter()
        taken = self.side.turn(calls, self.effort.turn)
        self.spent += time.perf_counter() - began
        return taken


def measure_row(
    sides: Sequence[Side],
    module: str,
    row: Row,
    scale: Scale,
    effort: Effort,
    parameters: Mapping[str, Any],
    measured: Measured,
) -> None:
    """Measure a row, and add to *measured*: all sides are set up, take turns, and are torn down.

    A side that cannot do the work, or fails, is omitted from this row and named.
    """
    with others() as share:
        for group in [sides] if row.together else [[side] for side in sides]:
            measure_together(group, module, row, scale, effort, parameters, measured)
    measured.others = max(measured.others, share[0])


def measure_together(
    sides: Sequence[Side],
    module: str,
    row: Row,
    scale: Scale,
    effort: Effort,
    parameters: Mapping[str, Any],
    measured: Measured,
) -> None:
    """Run the sides in turns; add the results to *measured*."""

    def tried(side: Side, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except SideError as error:
            if os.environ.get("BENCHMARKS_DEBUG"):
                print(error, file=sys.stderr)
            measured.failed[side.name] = last_line(error)

    for side in sides:
        reason = tried(side, functools.partial(side.set_up, module, row.name, scale, parameters))
        if reason:
            measured.cannot[side.name] = reason
    taking = [Turns(side, row, effort) for side in sides if side.name not in measured.cannot | measured.failed]
    for turns in taking:
        tried(turns.side, turns.warm_up)
    for _ in range(row.turns if effort.turns is None else min(effort.turns, row.turns)):
        for turns in taking:
            if turns.side.name not in measured.failed:
                tried(turns.side, turns.take)
    for side in sides:
        tried(side, side.tear_down)
    for turns in taking:
        if turns.side.name not in measured.failed:
            measured.timings[turns.side.name] = Timings(turns.taken)


@contextlib.contextmanager
def others() -> Iterator[list[float]]:
    """Yield a list that holds, after the block, the fraction of all cores that other processes used (0 to 1)."""

    def look() -> tuple[float, float, float]:
        """Return three times, summed over all cores: elapsed, not idle, and used by this program."""
        with open("/proc/stat") as lines:
            ticks = [int(word) for word in lines.readline().split()[1:9]]
        # User and system time, including that of children that were waited for.
        ours = sum(sum(map(int, stat_fields(pid)[11:15])) for pid in descendants(os.getpid()))
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], ours

    share: list[float] = []
    began = look()
    yield share
    passed, busy, ours = (now - then for now, then in zip(look(), began, strict=True))
    share.append(max(0.0, min(1.0, (busy - ours) / passed)) if passed else 0.0)
