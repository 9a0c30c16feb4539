"""Every exception and warning of forkshm.

The names say who acted. *Closed*: this program closed the object. *Broken* or *gone*: another process ended, or memory
vanished. *Busy*: the object is still in use. Each class also derives from the class that the standard library or the
kernel would have raised, so ``except`` clauses written for ``multiprocessing`` keep working. Exceptions keep their
attributes when they are pickled.
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
    """Base class of the exceptions of forkshm."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if isinstance(self, OSError) and self.errno is not None:
            # OSError keeps these outside __dict__.
            state.update(errno=self.errno, strerror=self.strerror)
        return _rebuild, (type(self), self.args, state)


class RegionError(ForkshmError):
    """Base class of errors about mapped memory."""


class RegionCreateError(RegionError, OSError):
    """The kernel refused to create or map memory.

    Attributes:
        errno: The kernel's reason. ``ENOMEM``: a limit on memory or address space. ``EMFILE``: the limit on open files
            (``ulimit -n``).
        size: The requested number of bytes.
    """

    size: int

    def __init__(self, errno: int, message: str, *, size: int) -> None:
        super().__init__(errno, message)
        self.size = size


class RegionExistsError(RegionError, FileExistsError):
    """An object of that name exists, and ``create_only`` was requested."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionNotFoundError(RegionError, FileNotFoundError):
    """No object of that name exists."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionAccessError(RegionError, PermissionError):
    """The object belongs to another user, or its permissions or the requested mode do not allow the operation."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionAddressError(RegionError, OSError):
    """Memory could not be mapped at the requested address, which is in use.

    Attributes:
        address: The requested address.
    """

    address: int

    def __init__(self, errno: int, message: str, *, address: int) -> None:
        super().__init__(errno, message)
        self.address = address


class RegionClosedError(RegionError, ValueError):
    """This process closed the region."""


class RegionBusyError(RegionError, BufferError):
    """``close()`` was called while views of the region were alive.

    Attributes:
        exports: How many buffers taken from ``region.buf`` are alive. Release or delete them, and the arrays made from
            them, then call ``close()`` again.
    """

    exports: int

    def __init__(self, message: str, *, exports: int) -> None:
        super().__init__(message)
        self.exports = exports


class UnplaceableTypeError(RegionError, TypeError):
    """A type cannot be placed in a region, because part of it is meaningful in one process only.

    Attributes:
        path: That part, for example ``"Node.items[].next"``.
    """

    path: str

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class WildPointerError(RegionError, ValueError):
    """A pointer leads outside its region, or is null where a target is needed.

    Attributes:
        address: The target in this process; 0 for null.
    """

    address: int

    def __init__(self, message: str, *, address: int) -> None:
        super().__init__(message)
        self.address = address


class RegionGoneError(RegionError, LookupError):
    """A descriptor names memory that this process can no longer reach."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SerializationError(ForkshmError):
    """Base class: an object could not be sent between processes."""


class NotPicklableError(SerializationError, pickle.PicklingError):
    """An argument, function or result cannot be pickled; ``__cause__`` says why."""


class NotUnpicklableError(SerializationError, pickle.UnpicklingError):
    """A message arrived, but its object could not be rebuilt."""


class ChannelError(ForkshmError):
    """Base class of errors about messages between processes."""


class ChannelClosedError(ChannelError, OSError, ValueError):
    """This process closed its end of the channel."""


class ChannelBrokenError(ChannelError, BrokenPipeError, EOFError):
    """The other end is gone, or sent something that is not a message of forkshm."""


class BufferTooShort(ChannelError, _MultiprocessBufferTooShort, multiprocessing.BufferTooShort):  # type: ignore[misc]  # noqa: N818 - multiprocessing's name; two classes at run time
    """A message is larger than the buffer given to ``recv_bytes_into``; ``args[0]`` is the message."""


class WorkerError(ForkshmError):
    """Base class of errors about worker processes."""


class WorkerStartError(WorkerError, OSError):
    """The kernel refused to start a worker; ``errno`` says why."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class WorkerDiedError(WorkerError):
    """A worker process died before it answered its task.

    Only the task that the worker was running fails. The pool replaces the worker and goes on.

    Attributes:
        pid: Process id of the dead worker.
        exitcode: As in ``Process.exitcode``; a negative number is the signal that killed the worker. None when other
            code in this process collected the exit code.
        signal: The signal's name, for example ``"SIGKILL"``, or None.
        task: The task, for example ``"resize(ndarray float64 (8, 8))"``.
        index: The position of the item in the input of its map, counted from 0; None outside of a map.
        attempts: How many workers have died while running this task; more than one with ``retries``.
        rank: The rank of the process; None for a worker of a pool.
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
            how = "ended (other code in this process collected its exit code)"
        doing = f"while running {task}" if task else "before it could run a task"
        if attempts > 1:
            doing += f", which {attempts} workers have died of"
        if exitcode == NO_MAIN_GUARD:
            hint = about_main_guard("the main module")
        if hint is None and self.signal == "SIGKILL":
            hint = "the usual cause is the kernel's out-of-memory killer"
        super().__init__(f"{name} (pid {pid}) {how} {doing}{f'; {hint}' if hint else ''}")


class MainGuardError(WorkerError, RuntimeError):
    """The main module starts processes while it is being imported.

    With spawn and forkserver, each new process imports the main module of the program. Put the code that starts
    processes below ``if __name__ == "__main__":``, which is false in the new process.
    """


class CrashLoopError(WorkerError):
    """Workers under `forkshm.supervise` failed repeatedly; ``__cause__`` says how the last one ended.

    Attributes:
        rank: The rank of the failing workers.
    """

    rank: int

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class TeamBrokenError(WorkerError):
    """A member of a team waited for another member that failed, died or left.

    The failure of that member is raised where the team was started.

    Attributes:
        rank: The rank of the missing member; None when it died while it held the team's lock.
    """

    rank: int | None

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class PoolClosedError(ForkshmError, ValueError):
    """The pool was closed or terminated, or belongs to another process."""


class TaskTimeoutError(ForkshmError, _MultiprocessTimeoutError, multiprocessing.TimeoutError):  # type: ignore[misc]  # two classes at run time
    """There was no result within the time limit.

    Attributes:
        task: The task that exceeded the pool's ``task_timeout``; its worker was killed. None when only the wait ended,
            as with ``get(timeout)``: the task goes on.
        index: The position of the item in the input of its map, counted from 0; None outside of a map.
        seconds: The limit.
        pid: Process id of the worker that was killed.
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
    """This system lacks a capability that the operation needs.

    Attributes:
        capability: The missing capability, in one word.
    """

    capability: str

    def __init__(self, message: str, *, capability: str) -> None:
        super().__init__(message)
        self.capability = capability


class MissingDependencyError(ForkshmError, ImportError):
    """The operation needs an optional library that is not installed.

    Attributes:
        extra: The extra that installs it: ``pip install 'forkshm[<extra>]'``.
    """

    extra: str

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


class SyncError(ForkshmError):
    """Base class of errors about locks in a region."""


class DeadlockError(SyncError, RuntimeError):
    """This thread already holds the lock, and would wait for itself forever."""


class LockTimeoutError(SyncError, TimeoutError):
    """``with lock.read(timeout)`` or ``with lock.write(timeout)`` did not acquire the lock in time."""


class NotConstructedError(SyncError, LookupError):
    """There is no lock of that kind at that offset of the region. It was not constructed, or is of another kind."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NotOwnerError(SyncError, RuntimeError):
    """This thread tried to release, repair or wait with a lock that it does not hold."""


class NotRecoverableError(SyncError):
    """A holder of the lock died, and the next holder released the lock without marking its data consistent.

    The guarded data are in an unknown state. Construct the lock and the data again.
    """


class CopiedError(ForkshmError, AssertionError):
    """A block of `forkshm.assert_zero_copy` copied more bytes than it allows.

    Attributes:
        nbytes: Bytes copied.
        max_bytes: Bytes allowed.
        copies: For each copy its size in bytes, and a text with what was copied and where it was sent or received.
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
    """Base class of the warnings of forkshm."""


class ExperimentalWarning(ForkshmWarning):
    """A warning at import: forkshm does not support this system, or this build of Python.

    To silence it, call ``warnings.filterwarnings("ignore", message="forkshm on ")`` before the import, or start
    Python with ``-W "ignore:forkshm on "``.
    """


class RemoteTraceback(Exception):  # noqa: N818 - multiprocessing's name
    """The traceback of a worker as text, in ``__cause__`` of an exception that a task raised."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


def signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal that ended a process with *exitcode*, or None."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return _signal.Signals(-exitcode).name
    except ValueError:  # Windows has no SIGKILL; forkshm uses its exit code there
        return "SIGKILL" if exitcode == -9 else f"signal {-exitcode}"


NO_MAIN_GUARD = 79
"""The exit code of a new process whose main module starts processes while it is imported."""


def about_main_guard(main: str) -> str:
    """Return the message for a main module that starts processes while a new process imports it."""
    return (
        f"cannot start workers: each new process imports {main}, and that starts processes while it is imported. "
        "Put the code that starts processes into a function, and call the function below a guard:\n\n"
        '    if __name__ == "__main__":\n'
        "        main()\n\n"
        "(or use the start method 'fork', which does not import the main module again)"
    )


_LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def remote_text(error: BaseException) -> str:
    """Return the traceback of *error* as text, from the first frame outside of forkshm."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_LIBRARY):
        first = first.tb_next
    if first is None:  # it was raised by forkshm itself
        first = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, first))
