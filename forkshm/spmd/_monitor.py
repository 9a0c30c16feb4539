"""Watches the processes of a team, in the process that started them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from typing import TYPE_CHECKING

from forkshm import _system
from forkshm._interrupts import is_of_kernel
from forkshm.backend import UNKNOWN, kernel
from forkshm.channel import Kind, Received, pair, read_header, read_message, write_message
from forkshm.errors import (
    NotUnpicklableError,
    RemoteTraceback,
    TeamBrokenError,
    WorkerDiedError,
    remote_text,
    safe_repr,
    set_cause,
    without_frames,
)
from forkshm.pickler import pack, pack_exception
from forkshm.spmd._team_state import DIED, FAILED, LEFT, TeamState

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.backend import Identity
    from forkshm.channel import Sender
    from forkshm.pickler import ImportableNames

__all__ = ("GRACE_SECONDS", "TeamMonitor", "report", "wait_for", "wait_gone")

GRACE_SECONDS = 1.0
"""Time that other members get to leave after one has failed, before SIGTERM; and again before SIGKILL."""


def wait_for(pid: int) -> int | None:
    """Reap a child that has ended, and return its exit code; None if other code in this process reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


# Time that a killed process gets to end. The kernel may hold it up for longer; then nothing waits for it.
_GONE_MILLISECONDS = 10_000

# A signal may arrive after Python has checked for signals and before it waits. This bounds the delay of its handler.
_LONGEST_SECONDS = 0.5


def wait_gone(sentinel: int) -> None:
    """Wait, for a bounded time, until a process that has ended or was killed can be reaped."""
    gone = kernel.poller()
    gone.register(sentinel, kernel.READABLE)
    gone.poll(_GONE_MILLISECONDS)


class TeamMonitor:
    """The processes of one team, and how they end.

    Guarantees: the first failure is recorded in the team state, which releases members that wait for the failed one.
    The other members get a grace period to leave; members that still run then are killed.
    """

    def __init__(self, team_state: TeamState, name: str, task: str, grace: float | None = None) -> None:
        self._team_state = team_state
        self._name = name
        self._task = task
        self._grace = GRACE_SECONDS if grace is None else grace
        # For each running process: its pid, a pidfd or -1, the function that reaps it, and the sentinel that `add` got.
        self._there: dict[int, tuple[int, int, Callable[[], int | None], int]] = {}
        # What each pidfd refers to, because its number may be closed and used again.
        self._files: dict[int, Identity] = {}
        self._received: list[tuple[int, Received]] = []
        self._deaths: list[WorkerDiedError] = []
        self._deadline = math.inf
        self._signals = [_system.SIGKILL, signal.SIGTERM]
        self.exit_codes: dict[int, int | None] = {}
        # Processes send their exceptions here.
        self.answers_in, self._answers = pair()
        self._poll = kernel.poller()
        self._poll.register(self._answers.fileno(), kernel.READABLE)

    def add(self, rank: int, pid: int, collect: Callable[[], int | None], sentinel: int) -> None:
        """Watch a process that was just started.

        Raises:
            OSError: The limit on open files is reached. The process is watched nevertheless.
        """
        self._there[rank] = pid, -1, collect, sentinel
        pidfd = kernel.open_process(pid, sentinel)
        self._there[rank] = pid, pidfd, collect, sentinel
        self._files[rank] = kernel.file_of(pidfd)
        self._poll.register(pidfd, kernel.READABLE)

    def pids(self) -> dict[int, int]:
        """Return the pid of each running process by rank."""
        return {rank: pid for rank, (pid, _, _, _) in self._there.items()}

    def forget(self) -> None:
        """Drop the processes in a forked child, because they are its parent's."""
        for rank, (_, pidfd, _, _) in self._there.items():
            kernel.close_own(kernel.closing(pidfd, self._files[rank]))
        self._there.clear()
        self._answers.close()

    def look(self) -> None:
        """Process what has happened, without waiting."""
        for fd, _ in self._poll.poll(0):
            self._take(fd)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all processes have ended, and end the others once one has failed; return False after *timeout*.

        Raises:
            ChannelClosedError: Other code in this process has closed the fds that this needs.
        """
        self._answers.check("wait for the other processes")
        until = math.inf if timeout is None else time.monotonic() + timeout
        while self._there:
            now = time.monotonic()
            if now >= self._deadline:
                self._signal(self._signals.pop())
                self._deadline = now + self._grace if self._signals else math.inf
            elif now >= until:
                return False
            left = min(self._deadline - now, until - now, _LONGEST_SECONDS)
            ready = self._poll.poll(math.ceil(max(left, 0.0) * 1000))
            if not ready:
                self._answers.check("wait for the other processes")
            for fd, _ in ready:
                self._take(fd)
        while self._receive():
            pass
        return True

    def fail(self) -> None:
        """Start the grace period of the other members."""
        self._deadline = min(self._deadline, time.monotonic() + self._grace)

    def pass_on(self, number: int) -> None:
        """Send all processes a signal that this process received."""
        self._signal(number)

    def failures(self) -> list[BaseException]:
        """Return the failures. Failures caused by other failures come last."""
        raised = [self._open(received, rank) for rank, received in self._received]
        self._received.clear()
        raised.sort(key=lambda error: isinstance(error, TeamBrokenError))
        return [*self._deaths, *raised]

    def close(self) -> None:
        """Kill and reap the remaining processes, in a bounded time."""
        self._signals.clear()
        self._signal(_system.SIGKILL)
        for rank in list(self._there):
            self._reap(rank)
        self.answers_in.close()
        self._answers.close()

    def _take(self, fd: int) -> None:
        """Process a ready fd: a message, or the end of a process."""
        if fd == self._answers.fileno():
            self._receive()
            return
        for rank, (_, pidfd, _, _) in self._there.items():
            if pidfd == fd:
                self._reap(rank)
                return

    def _receive(self) -> bool:
        try:
            received = self._answers.receive_nowait()
        except BlockingIOError as error:
            if not is_of_kernel(error):  # raised by a signal handler
                raise
            return False
        if received is None:
            return False
        self._received.append((read_header(received.data)[1], received))
        self.fail()
        return True

    def _reap(self, rank: int) -> None:
        # All steps can be repeated after an interruption.
        pid, pidfd, collect, sentinel = self._there[rank]
        file = self._files.get(rank, UNKNOWN)
        if pidfd >= 0:
            with contextlib.suppress(KeyError):
                self._poll.unregister(pidfd)
            if kernel.refers_to(pidfd, file):
                wait_gone(pidfd)
        elif sentinel >= 0:  # `add` did not complete
            wait_gone(sentinel)
        if rank not in self.exit_codes:
            self.exit_codes[rank] = collect()
        exitcode = self.exit_codes[rank]
        closing = kernel.closing(pidfd, file)
        # No call between these statements.
        del self._there[rank]
        if pidfd >= 0:
            kernel.close_own(closing)
        if self._team_state.states[rank] in (LEFT, FAILED):
            return
        self._team_state.end(rank, DIED)
        if len(self._signals) == 2:  # this process did not send it SIGTERM or SIGKILL
            error = WorkerDiedError(pid, exitcode, name=self._name.format(rank), task=self._task)
            error.rank = rank
            self._deaths.append(error)
            self.fail()

    def _signal(self, number: int) -> None:
        for rank, (pid, pidfd, _, _) in self._there.items():
            with contextlib.suppress(ProcessLookupError):
                # Without a pidfd, the pid may belong to another process by now.
                if pidfd >= 0 and kernel.refers_to(pidfd, self._files.get(rank, UNKNOWN)):
                    kernel.signal_process(pidfd, pid, number)
                else:
                    os.kill(pid, number)

    def _open(self, received: Received, rank: int) -> BaseException:
        who = self._name.format(rank)
        text = "its traceback did not arrive"
        try:
            incoming, sent_text = read_message(received).payloads
            if incoming is None or sent_text is None:
                raise NotUnpicklableError("a message arrived without its payloads: please report this")
            text = sent_text.open()
            raised: BaseException = incoming.open()
        except Exception as reason:
            raised = NotUnpicklableError(
                f"{who} raised an exception that cannot be unpickled here: {safe_repr(reason)}"
            )
        trace = RemoteTraceback(f"{who} raised:\n{text}")
        trace.__cause__ = raised.__cause__
        set_cause(raised, trace)
        return raised


def report(error: BaseException, rank: int, team_state: TeamState, answers_in: Sender, known: ImportableNames) -> None:
    """Report this process's failure to the process that started the team."""
    text = remote_text(error)
    without_frames(error)
    payloads = pack_exception(error, "a worker", known), pack(text)
    # The state is recorded first: it releases waiting members, and makes the process that started the team receive.
    team_state.end(rank, FAILED)
    answers_in.send(*write_message(Kind.ERROR, rank, *payloads))
    for packed in payloads:
        packed.close()
