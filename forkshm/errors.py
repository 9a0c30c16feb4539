"""Every exception and warning of forkshm, split by what you should conclude.

*Closed* means you did it, *broken* or *gone* means the world did it, *busy* means
somebody still uses it. Each class also derives from the type that the standard
library or the kernel would have raised, so that ``except`` clauses written for
``multiprocessing`` keep working. All of them survive pickling with their attributes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal as _signal
import traceback
from typing import Any

from forkshm._multiprocess import BufferTooShort as _MultiprocessBufferTooShort
from forkshm._multiprocess import TimeoutError as _MultiprocessTimeoutError

__all__ = (
    "BufferTooShort",
    "ChannelBrokenError",
    "ChannelClosedError",
    "ChannelError",
    "CopiedError",
    "CrashLoopError",
    "DeadlockError",
    "ExperimentalWarning",
    "ForkshmError",
    "ForkshmWarning",
    "LockTimeoutError",
    "MainGuardError",
    "MissingDependencyError",
    "NotConstructedError",
    "NotOwnerError",
    "NotPicklableError",
    "NotRecoverableError",
    "NotUnpicklableError",
    "PoolClosedError",
    "RegionAccessError",
    "RegionAddressError",
    "RegionBusyError",
    "RegionClosedError",
    "RegionCreateError",
    "RegionError",
    "RegionExistsError",
    "RegionGoneError",
    "RegionNotFoundError",
    "RemoteTraceback",
    "SerializationError",
    "SyncError",
    "TaskTimeoutError",
    "TeamBrokenError",
    "UnplaceableTypeError",
    "UnsupportedError",
    "WildPointerError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerStartError",
)


def _rebuild(cls: type[ForkshmError], args: tuple[Any, ...], state: dict[str, Any]) -> ForkshmError:
    error = cls.__new__(cls)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


class ForkshmError(Exception):
    """Base of everything this library objects to."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if isinstance(self, OSError) and self.errno is not None:
            # The C part of OSError keeps these outside __dict__.
            state.update(errno=self.errno, strerror=self.strerror)
        return _rebuild, (type(self), self.args, state)


class RegionError(ForkshmError):
    """Something about mapped memory."""


class RegionCreateError(RegionError, OSError):
    """The kernel refused to create or map memory.

    Attributes:
        errno: What the kernel said; ``ENOMEM`` means address space or memory limits,
            ``EMFILE`` the limit on open files (``ulimit -n``).
        size: Bytes that were asked for.
    """

    size: int

    def __init__(self, errno: int, message: str, *, size: int) -> None:
        super().__init__(errno, message)
        self.size = size


class RegionExistsError(RegionError, FileExistsError):
    """``create_only`` was asked for, and there is an object of that name already."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionNotFoundError(RegionError, FileNotFoundError):
    """There is no object of that name."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionAccessError(RegionError, PermissionError):
    """The object is another user's, or its permissions or your mode do not allow this."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionAddressError(RegionError, OSError):
    """Memory could not be mapped at the address asked for: something is there.

    Attributes:
        address: Where it should have been mapped.
    """

    address: int

    def __init__(self, errno: int, message: str, *, address: int) -> None:
        super().__init__(errno, message)
        self.address = address


class RegionClosedError(RegionError, ValueError):
    """The region was closed in this process, by this process."""


class RegionBusyError(RegionError, BufferError):
    """``close()`` was called while views of the region are alive.

    Attributes:
        exports: How many buffers taken from ``region.buf`` are still alive. Release
            or delete them (and the arrays made from them), then close again.
    """

    exports: int

    def __init__(self, message: str, *, exports: int) -> None:
        super().__init__(message)
        self.exports = exports


class UnplaceableTypeError(RegionError, TypeError):
    """A type cannot live in a region: part of it means something in one process only.

    Attributes:
        path: The part, for example ``"Node.items[].next"``.
    """

    path: str

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class WildPointerError(RegionError, ValueError):
    """A pointer leads outside the region it lies in, or is null where a target is needed.

    Attributes:
        address: Where it leads in this process; 0 for null.
    """

    address: int

    def __init__(self, message: str, *, address: int) -> None:
        super().__init__(message)
        self.address = address


class RegionGoneError(RegionError, LookupError):
    """A descriptor names memory that this process cannot reach any more."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SerializationError(ForkshmError):
    """An object could not cross between processes."""


class NotPicklableError(SerializationError, pickle.PicklingError):
    """An argument, function or result cannot be sent; ``__cause__`` says why."""


class NotUnpicklableError(SerializationError, pickle.UnpicklingError):
    """Something arrived, and could not be turned back into an object."""


class ChannelError(ForkshmError):
    """Something about messages between processes."""


class ChannelClosedError(ChannelError, OSError, ValueError):
    """This end was closed in this process."""


class ChannelBrokenError(ChannelError, BrokenPipeError, EOFError):
    """The other end is gone, or what it sent is not a message of ours."""


class BufferTooShort(ChannelError, _MultiprocessBufferTooShort, multiprocessing.BufferTooShort):  # type: ignore[misc]  # noqa: N818 - multiprocessing's name; two classes at run time
    """A message does not fit the buffer given to ``recv_bytes_into``; ``args[0]`` is the message."""


class WorkerError(ForkshmError):
    """Something about the processes of a pool."""


class WorkerStartError(WorkerError, OSError):
    """The kernel refused to start a worker; ``errno`` says why."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class WorkerDiedError(WorkerError):
    """The process that ran a task died before it answered.

    Only the task it was running fails with this; the worker is replaced and the
    pool goes on.

    Attributes:
        pid: Process id of the dead worker.
        exitcode: As in ``Process.exitcode``: negative means killed by that signal. None
            when something else in this process collected it.
        signal: The signal's name, for example ``"SIGKILL"``, or None.
        task: What it was running, for example ``"resize(ndarray float64 (8, 8))"``.
        index: Of a map, which item of its input that was, counted from 0; else None.
        attempts: How many workers have died of this task, more than one with ``retries``.
        rank: Of a process that has one, which it was; None for a worker of a pool.
    """

    pid: int
    exitcode: int | None
    signal: str | None
    task: str | None
    index: int | None
    attempts: int
    rank: int | None = None

    def __init__(
        self,
        pid: int,
        exitcode: int | None,
        *,
        name: str = "worker",
        task: str | None = None,
        index: int | None = None,
        attempts: int = 1,
        hint: str | None = None,
    ) -> None:
        self.pid = pid
        self.exitcode = exitcode
        self.signal = signal_name(exitcode)
        self.task = task
        self.index = index
        self.attempts = attempts
        if self.signal:
            how = f"was killed by {self.signal}"
        elif exitcode is not None:
            how = f"exited with code {exitcode}"
        else:
            how = "ended (another wait in this process took its exit code)"
        doing = f"while running {task}" if task else "before it could run a task"
        if attempts > 1:
            doing += f", of which {attempts} workers have died"
        if exitcode == NO_MAIN_GUARD:
            hint = about_main_guard("the main module")
        if hint is None and self.signal == "SIGKILL":
            hint = "the usual cause is the kernel's out-of-memory killer"
        super().__init__(f"{name} (pid {pid}) {how} {doing}{f'; {hint}' if hint else ''}")


class MainGuardError(WorkerError, RuntimeError):
    """The main module starts processes while it is imported, which a new process does first of all.

    Where processes are not forked from this one, each of them imports the main module of the program. Put what starts
    processes below ``if __name__ == "__main__":``, which is false there.
    """


class CrashLoopError(WorkerError):
    """Workers under `forkshm.supervise` failed again and again; ``__cause__`` says how the last one ended.

    Attributes:
        rank: Whose place it was.
    """

    rank: int

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class TeamBrokenError(WorkerError):
    """A member of a team waited for another that failed, died or left, and would never have come.

    What happened to that one is raised where the team was started.

    Attributes:
        rank: Of the one that does not come; None when it died with the team's lock.
    """

    rank: int | None

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class PoolClosedError(ForkshmError, ValueError):
    """The pool was closed or terminated, or belongs to another process."""


class TaskTimeoutError(ForkshmError, _MultiprocessTimeoutError, multiprocessing.TimeoutError):  # type: ignore[misc]  # two classes at run time
    """No result within the time given.

    Attributes:
        task: What took longer than the ``task_timeout`` of the pool, which ended its worker.
            None when only the waiting is over, as with ``get(timeout)``: the task goes on.
        index: Of a map, which item of its input that was, counted from 0; else None.
        seconds: The limit.
        pid: Process id of the worker that was ended.
    """

    task: str | None
    index: int | None
    seconds: float | None
    pid: int | None

    def __init__(
        self,
        *args: object,
        task: str | None = None,
        index: int | None = None,
        seconds: float | None = None,
        pid: int | None = None,
    ) -> None:
        self.task = task
        self.index = index
        self.seconds = seconds
        self.pid = pid
        super().__init__(*args)


class UnsupportedError(ForkshmError, NotImplementedError):
    """This system lacks what was asked for.

    Attributes:
        capability: The missing capability, in one word.
    """

    capability: str

    def __init__(self, message: str, *, capability: str) -> None:
        super().__init__(message)
        self.capability = capability


class MissingDependencyError(ForkshmError, ImportError):
    """An optional library is needed for this.

    Attributes:
        extra: The extra that installs it: ``pip install 'forkshm[<extra>]'``.
    """

    extra: str

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


class SyncError(ForkshmError):
    """Something about the locks in a region."""


class DeadlockError(SyncError, RuntimeError):
    """This thread holds the lock already; waiting for it would be for ever."""


class LockTimeoutError(SyncError, TimeoutError):
    """``with lock.read(timeout)`` or ``with lock.write(timeout)`` did not get the lock in time."""


class NotConstructedError(SyncError, LookupError):
    """There is no such lock at that place of the region: not yet, or another one."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NotOwnerError(SyncError, RuntimeError):
    """This thread does not hold the lock that it wanted to release, repair or wait with."""


class NotRecoverableError(SyncError):
    """A holder died, and the next one released the lock without making it consistent.

    What the lock guards is in an unknown state. Construct both anew.
    """


class CopiedError(ForkshmError, AssertionError):
    """More was copied in a block of `forkshm.assert_zero_copy` than it allows.

    Attributes:
        nbytes: Bytes copied.
        max_bytes: Bytes allowed.
        copies: For each copy its bytes, what it was, and where it was sent or asked for.
    """

    nbytes: int
    max_bytes: int
    copies: list[tuple[int, str]]

    def __init__(self, message: str, *, nbytes: int, max_bytes: int, copies: list[tuple[int, str]]) -> None:
        super().__init__(message)
        self.nbytes = nbytes
        self.max_bytes = max_bytes
        self.copies = copies


class ForkshmWarning(UserWarning):
    """Base of the warnings of forkshm."""


class ExperimentalWarning(ForkshmWarning):
    """Warn at import that this system, or this build of Python, is not one on which forkshm is supported.

    To silence it, call ``warnings.filterwarnings("ignore", message="forkshm on ")`` before the import, or start
    Python with ``-W "ignore:forkshm on "``.
    """


class RemoteTraceback(Exception):  # noqa: N818 - multiprocessing's name
    """The worker's traceback as text; found in ``__cause__`` of what a task raised."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


def signal_name(exitcode: int | None) -> str | None:
    """Name of the signal that ended a process with *exitcode*, or None."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return _signal.Signals(-exitcode).name
    except ValueError:  # Windows has no SIGKILL, and forkshm ends processes there as if it had
        return "SIGKILL" if exitcode == -9 else f"signal {-exitcode}"


#: The exit code of a new process whose main module has started processes while it was imported.
NO_MAIN_GUARD = 79


def about_main_guard(main: str) -> str:
    """Return what to say when the main module starts processes while a new process imports it."""
    return (
        f"cannot start workers: each new process imports {main}, and that starts processes while it is imported. "
        "Put the part of it that starts processes into a function, and call that below a guard:\n\n"
        '    if __name__ == "__main__":\n'
        "        main()\n\n"
        "(or use the start method 'fork', which imports nothing anew)"
    )


_LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def remote_text(error: BaseException) -> str:
    """Return the traceback of *error* as text, from the first frame on that is not forkshm's own."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_LIBRARY):
        first = first.tb_next
    if first is None:  # it was raised by forkshm itself
        first = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, first))
