"""The only file that imports ``multiprocess``.

``multiprocess`` has no type annotations, so the type checker takes these names from the standard library that it was
forked from. This file lists everything that forkshm uses of it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import stat
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from forkshm import _system

if TYPE_CHECKING:
    import multiprocessing.context as context
    from collections.abc import Callable, Mapping
    from multiprocessing import (
        AuthenticationError,
        BufferTooShort,
        ProcessError,
        TimeoutError,  # noqa: A004
        connection,
        managers,
        process,
        reduction,
        resource_tracker,
        shared_memory,
        sharedctypes,
        synchronize,
        util,
    )
else:
    from multiprocess import (
        AuthenticationError,
        BufferTooShort,
        ProcessError,
        TimeoutError,  # noqa: A004
        context,
        process,
        reduction,
        resource_tracker,
        util,
    )

__all__ = (
    "AuthenticationError",
    "BufferTooShort",
    "ProcessError",
    "TimeoutError",
    "close_fds",
    "connection",
    "context",
    "current_process",
    "default_context",
    "end_child",
    "ensure_helpers",
    "exit_code",
    "get_logger",
    "let_have_children",
    "managers",
    "note_helpers",
    "package",
    "process",
    "reduction",
    "resource_tracker",
    "settle_child",
    "shared_memory",
    "sharedctypes",
    "spare_fork_server",
    "stand_in",
    "synchronize",
    "util",
)


def __getattr__(name: str) -> Any:
    # Importing these takes as long as importing all of forkshm, and few programs need them.
    if name in (
        "connection",
        "heap",
        "managers",
        "popen_fork",
        "popen_forkserver",
        "popen_spawn_posix",
        "shared_memory",
        "sharedctypes",
        "synchronize",
    ):
        return importlib.import_module(f"multiprocess.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def stand_in(module: str, ours: Mapping[str, Any]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for forkshm's module of that name.

    Names that the module does not define are looked up in the module of ``multiprocess``, each time, because some, such
    as the current process, change their value. That module is imported at the first lookup.
    """
    theirs = f"multiprocess.{module}"

    def __getattr__(name: str) -> Any:  # noqa: N807 - the module's
        return getattr(importlib.import_module(theirs), name)

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*ours, *dir(importlib.import_module(theirs))})

    return __getattr__, __dir__


def package() -> Any:
    """Return the package, whose names `forkshm.patch` replaces."""
    return importlib.import_module("multiprocess")


class NoFork:
    """A placeholder for classes of ``multiprocess`` that fork, on systems that cannot."""

    def __init__(self, *args: Any, **options: Any) -> None:
        from forkshm.errors import UnsupportedError

        raise UnsupportedError(
            "cannot fork processes on this system: use the start method 'spawn', which is the default here",
            capability="fork",
        )


def push_to_child(fd: int) -> int:
    """Duplicate a handle into the process that is being spawned (Windows only); return its value there."""
    popen: Any = context.get_spawning_popen()
    return int(popen.duplicate_for_child(fd))


default_context: Any = context._default_context
"""The context of processes started without another one; `forkshm.context` replaces it."""

# Time that the fork server may take to report how one of its processes ended.
_SERVER_MILLISECONDS = 5000

# On Windows, a process ended by a signal exits with this code plus the signal's number.
_ENDED_BY = 0x10000
_SIGNALS = 65
_PAUSE = 0.0005
# Time that another thread, which reaped a child, may take to store the exit code.
_OTHER_THREAD_SECONDS = 0.1

current_process = process.current_process
close_fds: Callable[..., None] = util.close_fds  # type: ignore[attr-defined]
"""Closes fds."""
get_logger = util.get_logger


def exit_code(ended: process.BaseProcess, patience: float = 0.0) -> int | None:
    """Reap an ended process, and return its exit code; None if other code reaped it first.

    Any code in this process that calls ``os.wait()``, or ignores SIGCHLD, takes exit codes away. Without this function,
    ``join()`` would then wait for a process forever.

    Args:
        ended: The process.
        patience: Seconds until the kernel has the exit code, on systems that report the end of a process before.
    """
    popen: Any = getattr(ended, "_popen", None)
    if popen is None:  # an interrupted call has already closed the process
        process._children.discard(ended)  # type: ignore[attr-defined]
        return None
    if sys.platform != "win32" and popen.method == "forkserver":
        # The fork server, as its parent, reports the code, unless the server was stopped.
        status = select.poll()
        status.register(popen.sentinel, select.POLLIN)
        status.poll(_SERVER_MILLISECONDS)
    code = ended.exitcode
    until = time.monotonic() + patience
    while code is None and patience and time.monotonic() < until and _is_there(ended.pid):
        time.sleep(_PAUSE)
        code = ended.exitcode
    deadline = time.monotonic() + _OTHER_THREAD_SECONDS
    while code is None and threading.active_count() > 1 and time.monotonic() < deadline:
        # Another thread, for example in active_children(), may have reaped it and not yet stored the code.
        time.sleep(0.001)
        code = ended.exitcode
    if getattr(popen, "status_is_lost", False):
        code = None
    elif code is None:
        popen.returncode = 255  # otherwise close() would fail
    elif 0 < code - _ENDED_BY < _SIGNALS:  # see the Windows backend; the code of a crash is larger
        code = _ENDED_BY - code
    ended.close()
    process._children.discard(ended)  # type: ignore[attr-defined]
    return code


def _is_there(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True


def _forget_siblings() -> None:
    # At exit, multiprocess ends all processes that it considers its children. In a process that was not forked by
    # Process, these are children of the parent.
    process._children.clear()  # type: ignore[attr-defined]


_system.register_at_fork(after_in_child=_forget_siblings)


def let_have_children() -> None:
    """Allow this daemonic process to start processes of its own.

    The daemon flag makes the *parent* kill its daemons at exit; it also forbids the daemon to have children. A pool
    worker needs the first effect only: its own workers die with it, because of their lifeline.
    """
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the seam has no public name


def fork_server() -> Any:
    """Return the module of the fork server, where processes can be forked."""
    return importlib.import_module("multiprocess.forkserver")


def spare_fork_server() -> None:
    """Keep the fork server from importing ``__main__`` unless it knows the program's arguments.

    In some versions the server imports it without them, and ends if that fails. Its processes import it themselves.
    """
    server = fork_server()
    if "sys_argv" not in server.main.__code__.co_varnames and server._forkserver._preload_modules == ["__main__"]:
        server._forkserver._preload_modules = []


# The pids of these two processes and the identities of the pipes to them, by fd. An fd that the program has closed and
# reused has another identity. A restarted process may have a pipe with the same fd.
_pipes: dict[int, tuple[int | None, tuple[int, int]]] = {}


def ensure_helpers() -> None:
    """Start the resource tracker unless it runs, and forget a tracker or fork server whose pipe the program closed.

    ``multiprocess`` writes to the tracker's fd to find out whether it runs, and closes the fd if it does not. By then
    the fd may belong to a file that the program opened after it had closed all fds, as daemons do.
    """
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None and not _is_helpers(tracker._fd, tracker._pid):
        lost, tracker._fd, tracker._pid = tracker._pid, None, None
        _reap(lost)
    resource_tracker.ensure_running()
    server: Any = sys.modules.get("multiprocess.forkserver")
    if server is not None:
        server = server._forkserver
        alive_fd, lost = server._forkserver_alive_fd, server._forkserver_pid
        if alive_fd is not None and not _is_helpers(alive_fd, lost):
            server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
            _reap(lost)
    note_helpers()


def note_helpers() -> None:
    """Record the pipes to both processes, right after the processes may have been started."""
    tracker: Any = resource_tracker._resource_tracker
    helpers = [(tracker._fd, tracker._pid)]
    server: Any = sys.modules.get("multiprocess.forkserver")
    if server is not None:
        helpers.append((server._forkserver._forkserver_alive_fd, server._forkserver._forkserver_pid))
    for fd, pid in helpers:
        if fd is not None and (fd not in _pipes or _pipes[fd][0] != pid):
            status = os.fstat(fd)
            _pipes[fd] = pid, (status.st_dev, status.st_ino)


def _is_helpers(fd: int, pid: int | None) -> bool:
    """Return whether an fd is the recorded pipe to the process, or any pipe if none was recorded."""
    try:
        status = os.fstat(fd)
    except OSError:
        _pipes.pop(fd, None)
        return False
    found = status.st_dev, status.st_ino
    recorded, identity = _pipes.get(fd, (None, found))
    if stat.S_ISFIFO(status.st_mode) and (recorded != pid or identity == found):
        return True
    _pipes.pop(fd, None)
    return False


def _reap(pid: int | None) -> None:
    """Reap a process that ends because its pipe was closed, if it has ended."""
    if sys.platform != "win32" and pid is not None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def settle_child() -> None:
    """Initialize a child that was forked by other means, as `Process` does before it runs anything."""
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    util._run_after_forkers()  # type: ignore[attr-defined]


def end_child() -> None:
    """Finish such a child, as `Process` does: wait for its children and threads, like an interpreter at exit."""
    util._exit_function()  # type: ignore[attr-defined]
    threading._shutdown()  # type: ignore[attr-defined]
