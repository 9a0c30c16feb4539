"""Starting, watching and ending processes."""

from __future__ import annotations

import abc
import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ("Processes",)


class Processes(abc.ABC):
    """Starting, watching and ending processes."""

    #: How long a process that has ended may take until it can be collected, in seconds.
    COLLECT_SECONDS: float = 0.0
    #: Whether `exit_of` can tell an exit code before it is reaped.
    can_look_at_exits: bool = False

    @abc.abstractmethod
    def forking(self) -> AbstractContextManager[int]:
        """Fork one child inside: gives what `open_process` may need in order to watch it, or -1."""

    def spawning(self) -> AbstractContextManager[tuple[int, int]]:
        """Start one child anew inside: gives the same, and an fd for the child's `hold_birth`; or -1 twice."""
        return contextlib.nullcontext((-1, -1))

    def hold_birth(self, fd: int) -> None:  # noqa: B027
        """In a process that was started anew: hold that fd to the end, and close it in processes forked from here."""

    @abc.abstractmethod
    def open_process(self, pid: int, sentinel: int = -1) -> int:
        """Return an fd that becomes readable when the process ends; at once when it was reaped already.

        Args:
            pid: The process.
            sentinel: What ``multiprocess`` watches it by, or what `forking` or `spawning` gave; it stays the caller's.
        """

    def exit_of(self, pid: int, *, reap: bool) -> int | None:
        """Return the exit code of a child that has ended, with the signal's number negated; None while it runs.

        Without *reap* it can be asked again. Where `can_look_at_exits`.

        Args:
            pid: The child.
            reap: Let the kernel forget it.

        Raises:
            ChildProcessError: It was reaped before, or SIGCHLD is ignored and it has ended.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def signal_process(self, process: int, pid: int, number: int) -> None:
        """Send a signal to a process that `open_process` has opened; ``ProcessLookupError`` when it has ended."""

    @abc.abstractmethod
    def is_stopped(self, pid: int) -> bool | None:
        """Whether a child was stopped by a signal; None when it has ended, or it cannot be told."""

    @abc.abstractmethod
    def is_running(self, pid: int) -> bool:
        """Whether there is such a process, and it has not ended."""

    def step_back(self) -> None:  # noqa: B027 - nothing, where there is nothing for it
        """Let others that wait for this core go first, where the system has that."""

    @abc.abstractmethod
    def start_time(self, pid: int) -> int:
        """Return when *pid* was started, in a unit of the kernel: tells a reused pid."""

    def process_token(self) -> int:
        """Return a number of 64 bits by which other processes know this one; bit 31 is not set, and it is not 0.

        It is that of no other process, also when the pid is used again, and not that of the process that forked this.
        """
        pid = os.getpid()
        return (self.start_time(pid) & 0xFFFFFFFF) << 32 | pid

    def is_alive(self, token: int) -> bool:
        """Whether the process with that `process_token` has not ended; it need not have been collected."""
        pid = token & 0x7FFFFFFF
        try:
            return self.is_running(pid) and self.start_time(pid) & 0xFFFFFFFF == token >> 32
        except OSError:
            return False

    @abc.abstractmethod
    def create_lifeline(self) -> tuple[int, int]:
        """Return two fds: for `die_with`, and one that must stay open for as long as they are to live."""

    @abc.abstractmethod
    def die_with(self, lifeline: int) -> int:
        """Have the kernel kill this process when the other end of *lifeline* is closed.

        Args:
            lifeline: The first of `create_lifeline`.

        Returns:
            An fd that must stay open for as long as the arrangement is wanted.
        """
