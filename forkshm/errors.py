"""Exceptions and warnings of forkshm.

The names follow a pattern. *Closed*: this program closed the object. *Broken* or *gone*: the other side or the
memory disappeared. *Busy*: the object is still in use. Each class also derives from the type that the standard
library would have raised, so ``except`` clauses written for ``multiprocessing`` keep working. All of them can be
pickled and keep their attributes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal as _signal
import traceback
from concurrent.futures.process import BrokenProcessPool as _BrokenProcessPool
from typing import Any

from forkshm import _system
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
    """Base class of forkshm's exceptions."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if isinstance(self, OSError) and self.errno is not None:
            # The C part of OSError keeps these outside __dict__.
            state.update(errno=self.errno, strerror=self.strerror)
        return _rebuild, (type(self), self.args, state)


class RegionError(ForkshmError):
    """Base class of errors about mapped memory."""


class RegionCreateError(RegionError, OSError):
    """The kernel refused to create or map memory.

    Attributes:
        errno: The kernel's error number. ``ENOMEM`` means a limit on memory or address space, ``EMFILE`` the limit
            on open files (``ulimit -n``).
        size: Number of bytes requested.
    """

    size: int

    def __init__(self, errno: int, message: str, *, size: int) -> None:
        super().__init__(errno, message)
        self.size = size


class RegionExistsError(RegionError, FileExistsError):
    """An object of that name already exists, and ``create_only`` was requested."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionNotFoundError(RegionError, FileNotFoundError):
    """No object of that name exists."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionAccessError(RegionError, PermissionError):
    """Access is denied: the object belongs to another user, or its permissions or the requested mode forbid it."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class RegionAddressError(RegionError, OSError):
    """Memory could not be mapped at the requested address because the address range is in use.

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
    """``close()`` was called while views of the region are alive.

    Attributes:
        exports: Number of buffers taken from ``region.buf`` that are still alive. Release or delete them and the
            arrays made from them, then call ``close()`` again.
    """

    exports: int

    def __init__(self, message: str, *, exports: int) -> None:
        super().__init__(message)
        self.exports = exports


class UnplaceableTypeError(RegionError, TypeError):
    """A type cannot be stored in a region because part of it is valid in one process only.

    Attributes:
        path: Path of that part, for example ``"Node.items[].next"``.
    """

    path: str

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class WildPointerError(RegionError, ValueError):
    """A pointer leads outside the region that contains it, or is null where a target is required.

    Attributes:
        address: Target address in this process; 0 for null.
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
    """Base class of errors about sending an object to another process."""


class NotPicklableError(SerializationError, pickle.PicklingError, RuntimeError, TypeError):
    """An argument, function or result cannot be pickled; ``__cause__`` has the reason.

    ``multiprocessing`` raises RuntimeError for its locks and queues, and TypeError for a ``RawValue``.
    """


class NotUnpicklableError(SerializationError, pickle.UnpicklingError):
    """Received data could not be unpickled."""


class ChannelError(ForkshmError):
    """Base class of errors about messages between processes."""


class ChannelClosedError(ChannelError, OSError, ValueError):
    """This process closed its end of the channel."""


class ChannelBrokenError(ChannelError, BrokenPipeError, EOFError):
    """The other end has closed or died, or sent something that is not a forkshm message."""


class BufferTooShort(ChannelError, _MultiprocessBufferTooShort, multiprocessing.BufferTooShort):  # type: ignore[misc]  # noqa: N818 - multiprocessing's name; two classes at run time
    """The buffer given to ``recv_bytes_into`` is too small for the message, which is in ``args[0]``."""


class WorkerError(ForkshmError):
    """Base class of errors about worker processes."""


class WorkerStartError(WorkerError, OSError):
    """The kernel refused to start a worker; ``errno`` has the reason."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)


class WorkerDiedError(WorkerError, _BrokenProcessPool):
    """A worker process died before it returned the result of its task.

    Only the task that the worker was running fails. The pool replaces the worker and continues, although code that was
    written for `concurrent.futures` catches this error as ``BrokenProcessPool``.

    Attributes:
        pid: Process id of the dead worker; 0 for a node of a cluster.
        exitcode: Exit code as in ``Process.exitcode``; a negative code is the signal that killed the worker. None if
            other code in this process waited for the worker first.
        signal: Name of the signal, for example ``"SIGKILL"``, or None.
        task: The running task, for example ``"resize(ndarray float64 (8, 8))"``, or None.
        index: Position of the item in the input of a map, counted from 0; None for other tasks.
        attempts: Number of workers that have died running this task; more than one only with ``retries``.
        rank: Rank of a launched, supervised or team process; None for a worker of a pool.
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
            how = "ended with an unknown exit code (other code in this process waited for it first)"
        doing = f"while running {task}" if task else "before it could run a task"
        if attempts > 1:
            doing += f", which has now killed {attempts} workers"
        if exitcode == NO_MAIN_GUARD:
            hint = about_main_guard("the main module")
        if hint is None and self.signal == "SIGKILL":
            hint = "the usual cause is the kernel's out-of-memory killer"
        super().__init__(f"{name} (pid {pid}) {how} {doing}{f'; {hint}' if hint else ''}")


class MainGuardError(WorkerError, RuntimeError):
    """The main module starts processes while a new process imports it.

    A process that is not forked begins by importing the program's main module. Put the code that starts processes
    below ``if __name__ == "__main__":``, which is false in the new process.
    """


class CrashLoopError(WorkerError):
    """Workers under `forkshm.supervise` keep failing; ``__cause__`` says how the last one ended.

    Attributes:
        rank: Rank of the workers that failed.
    """

    rank: int

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class TeamBrokenError(WorkerError):
    """A member of a team waited for a member that had failed, died or left.

    The error of the missing member is raised in the process that started the team.

    Attributes:
        rank: Rank of the missing member; None if it died while it held the team's lock.
    """

    rank: int | None

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class PoolClosedError(ForkshmError, ValueError):
    """The pool is closed or terminated, or belongs to another process."""


class TaskTimeoutError(ForkshmError, _MultiprocessTimeoutError, multiprocessing.TimeoutError):  # type: ignore[misc]  # two classes at run time
    """A result did not arrive in time.

    Attributes:
        task: The task that exceeded the pool's ``task_timeout``; its worker was killed. None if only the wait timed
            out, as in ``get(timeout)``; that task continues.
        index: Position of the item in the input of a map, counted from 0; None for other tasks.
        seconds: The limit in seconds.
        pid: Process id of the killed worker.
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
    """This system does not support the requested feature.

    Attributes:
        capability: Name of the missing capability.
    """

    capability: str

    def __init__(self, message: str, *, capability: str) -> None:
        super().__init__(message)
        self.capability = capability


class MissingDependencyError(ForkshmError, ImportError):
    """An optional library is not installed.

    Attributes:
        extra: Name of the extra that installs the library: ``pip install 'forkshm[<extra>]'``.
    """

    extra: str

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


class SyncError(ForkshmError):
    """Base class of errors about locks in a region."""


class DeadlockError(SyncError, RuntimeError):
    """This thread would wait for itself forever: it holds the lock, or it is starting the pool's only worker."""


class LockTimeoutError(SyncError, TimeoutError):
    """``with lock.read(timeout)`` or ``with lock.write(timeout)`` did not acquire the lock in time."""


class NotConstructedError(SyncError, LookupError):
    """The region has no lock of that kind at that offset: none was constructed, or one of another kind."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NotOwnerError(SyncError, RuntimeError):
    """This thread does not hold the lock that it tried to release, repair or wait with."""


class NotRecoverableError(SyncError):
    """A holder of the lock died, and the next holder released the lock without marking it consistent.

    The data that the lock guards is in an unknown state. Construct the data and the lock again.
    """


class CopiedError(ForkshmError, AssertionError):
    """A block of `forkshm.assert_zero_copy` copied more bytes than allowed.

    Attributes:
        nbytes: Number of bytes copied.
        max_bytes: Number of bytes allowed.
        copies: Size of each copy, with a description of the object and of the place that sent or requested it.
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
    """Base class of forkshm's warnings."""


class ExperimentalWarning(ForkshmWarning):
    """The operating system or this build of Python is not fully supported; issued at import.

    To silence the warning, call ``warnings.filterwarnings("ignore", message="forkshm on ")`` before the import, or
    start Python with ``-W "ignore:forkshm on "``.
    """


class RemoteTraceback(Exception):  # noqa: N818 - multiprocessing's name
    """The worker's traceback as text; the ``__cause__`` of an exception that a task raised."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


class LocalTraceback(RemoteTraceback):
    """The traceback, as text, of an exception that this process raised before, such as one of the pickler."""


def signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal that ended a process with *exitcode*, or None."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return _signal.Signals(-exitcode).name
    except ValueError:  # Windows has no SIGKILL; forkshm reports processes that it kills there as if it had
        return "SIGKILL" if exitcode == -9 else f"signal {-exitcode}"


NO_MAIN_GUARD = 79
"""Exit code of a new process whose main module started processes during its import."""


def about_main_guard(main: str) -> str:
    """Return the message for a main module that starts processes while a new process imports it."""
    return (
        f"cannot start workers: each new process imports {main}, which starts processes during its import. "
        "Move the code that starts processes into a function, and call the function below a guard:\n\n"
        '    if __name__ == "__main__":\n'
        "        main()\n\n"
        "(or use the start method 'fork', which does not import the main module again)"
    )


_LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def remote_text(error: BaseException) -> str:
    """Return the traceback of *error* as text, without the leading frames that belong to forkshm."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_LIBRARY):
        first = first.tb_next
    if first is None:  # forkshm itself raised the error
        first = error.__traceback__
    try:
        return "".join(traceback.format_exception(type(error), error, first))
    except Exception:  # an attribute of the exception's class raises
        return "".join(traceback.format_tb(first)) + f"{type(error).__qualname__}: <its text cannot be formatted>\n"


# A class may define how its attributes are read and set: a frozen dataclass refuses assignments. The functions below
# use the methods of BaseException.
_set_cause: Any = vars(BaseException)["__cause__"].__set__
_set_context: Any = vars(BaseException)["__context__"].__set__


def set_cause(error: BaseException, cause: BaseException | None) -> None:
    """Set ``__cause__`` of any exception."""
    _set_cause(error, cause)


def refuse_if_green(what: str) -> None:
    """Raise UnsupportedError if gevent or eventlet has replaced the blocking functions of this process."""
    if (library := _system.greened_by()) is not None:
        raise UnsupportedError(
            f"{what} cannot run here: {library} has replaced the blocking functions of this process, and waiting for "
            f"another process would stop all of its tasks. Use it in a process where {library} has patched nothing, "
            "or do not patch select and thread.",
            capability="blocking calls",
        )


def set_context(error: BaseException, context: BaseException | None) -> None:
    """Set ``__context__`` of any exception."""
    _set_context(error, context)


def without_frames(error: BaseException) -> BaseException:
    """Return any exception without its traceback, whose frames keep variables alive."""
    return BaseException.with_traceback(error, None)


def as_text(error: BaseException) -> BaseException:
    """Return an exception without its traceback, which its cause shows as text."""
    trace = LocalTraceback(remote_text(error))
    trace.__cause__ = error.__cause__
    set_cause(error, trace)
    return without_frames(error)


def add_note(error: BaseException, text: str) -> None:
    """Add a note to any exception."""
    BaseException.__getattribute__(error, "__dict__").setdefault("__notes__", []).append(text)


def safe_repr(thing: object) -> str:
    """Return the ``repr`` of an object, or its type if that raises."""
    try:
        return repr(thing)
    except Exception:
        return f"<{type(thing).__qualname__}, whose repr() raises>"
