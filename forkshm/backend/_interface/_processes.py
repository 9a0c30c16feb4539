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

    COLLECT_SECONDS: float = 0.0
    """Maximum seconds until an ended process can be collected."""
    can_look_at_exits: bool = False
    """Whether `exit_of` can return the exit code of a child before it is reaped."""

    @abc.abstractmethod
    def forking(self) -> AbstractContextManager[int]:
        """Return a context in which to fork one child; it gives the fd `open_process` may need to watch it, or -1."""

    def spawning(self) -> AbstractContextManager[tuple[int, int]]:
        """Return a context in which to spawn one child; it gives that fd and one for `hold_birth`, or -1 twice."""
        return contextlib.nullcontext((-1, -1))

    def hold_birth(self, fd: int) -> None:  # noqa: B027
        """Hold *fd* until this spawned process ends, and close it in processes forked from here."""

    @abc.abstractmethod
    def open_process(self, pid: int, sentinel: int = -1) -> int:
        """Return an fd that becomes readable when the process ends; at once if it was already reaped.

        Args:
            pid: The process.
            sentinel: The sentinel of ``multiprocess``, or the fd of `forking` or `spawning`; the caller keeps it.
        """

    def exit_of(self, pid: int, *, reap: bool) -> int | None:
        """Return the exit code of an ended child, or the negated signal number; None while it runs.

        Without *reap* the code can be read again. Only if `can_look_at_exits`.

        Args:
            pid: The child.
            reap: Also reap the child.

        Raises:
            ChildProcessError: The child was already reaped, or it has ended while SIGCHLD is ignored.
        """
        raise NotImplementedError

    def exit_of_reaped(self, process: int) -> int | None:
        """Return the exit code of a process that other code has reaped; None if the system does not keep it.

        Args:
            process: An fd of `open_process` that was opened before.
        """
        return None

    @abc.abstractmethod
    def signal_process(self, process: int, pid: int, number: int) -> None:
        """Send a signal to a process opened by `open_process`; ``ProcessLookupError`` if it has ended."""

    @abc.abstractmethod
    def is_stopped(self, pid: int) -> bool | None:
        """Return whether a child was stopped by a signal; None if it has ended, or the system cannot tell."""

    @abc.abstractmethod
    def is_running(self, pid: int) -> bool:
        """Return whether the process exists and has not ended."""

    def step_back(self) -> None:  # noqa: B027 - does nothing where the system has no such call
        """Yield this core to waiting processes, where the system supports it."""

    @abc.abstractmethod
    def start_time(self, pid: int) -> int:
        """Return the start time of *pid* in a unit of the kernel, to detect a reused pid."""

    def process_token(self) -> int:
        """Return a 64-bit number that identifies this process; bit 31 is not set, and it is not 0.

        No other process has the same number: neither one that reuses the pid, nor the parent.
        """
        pid = os.getpid()
        return (self.start_time(pid) & 0xFFFFFFFF) << 32 | pid

    def is_alive(self, token: int) -> bool:
        """Return whether the process with that `process_token` has not ended; an unreaped one has ended."""
        pid = token & 0x7FFFFFFF
        try:
            return self.is_running(pid) and self.start_time(pid) & 0xFFFFFFFF == token >> 32
        except OSError:
            return False

    @abc.abstractmethod
    def create_lifeline(self) -> tuple[int, int]:
        """Return two fds: one for `die_with`, and one that must stay open while the processes are to live."""

    @abc.abstractmethod
    def die_with(self, lifeline: int) -> int:
        """Arrange that the kernel kills this process when the other end of *lifeline* is closed.

        Args:
            lifeline: The first of `create_lifeline`.

        Returns:
            An fd that must stay open for the arrangement to last.
        """
