"""The only file that imports ``multiprocess``.

``multiprocess`` carries no types, so for the type checker these names are those of the
standard library it was forked from. Every seam that forkshm leans on is listed here.
"""

from __future__ import annotations

import importlib
import os
import select
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
    "exit_code",
    "get_logger",
    "let_have_children",
    "managers",
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
    # These take as long to import as all of forkshm, and few programs need them.
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
    """Return ``__getattr__`` and ``__dir__`` for our module of that name.

    What it does not define itself is looked up in that of ``multiprocess``, each time: some
    names there, such as the current process, change their value. That one is imported when
    first asked.
    """
    theirs = f"multiprocess.{module}"

    def __getattr__(name: str) -> Any:  # noqa: N807 - the module's
        return getattr(importlib.import_module(theirs), name)

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*ours, *dir(importlib.import_module(theirs))})

    return __getattr__, __dir__


def package() -> Any:
    """Return the package itself, whose names `forkshm.patch` replaces."""
    return importlib.import_module("multiprocess")


class NoFork:
    """Stands where ``multiprocess`` has something that forks, on systems that cannot."""

    def __init__(self, *args: Any, **options: Any) -> None:
        from forkshm.errors import UnsupportedError

        raise UnsupportedError(
            "processes cannot be forked on this system: use the start method 'spawn', which is the default here",
            capability="fork",
        )


def push_to_child(fd: int) -> int:
    """Duplicate a handle into the process that is being spawned (Windows only); return what it is there."""
    popen: Any = context.get_spawning_popen()
    return int(popen.duplicate_for_child(fd))


default_context: Any = context._default_context
"""Starts processes where nothing else is said; that of `forkshm.context` takes its place."""

# How long the fork server may take to say how one of its processes ended.
_SERVER_MILLISECONDS = 5000

# On Windows, who was ended as by a signal exits with this and its number.
_ENDED_BY = 0x10000
_SIGNALS = 65
_PAUSE = 0.0005
# And another thread that collects children, to enter the exit code that it was told.
_OTHER_THREAD_SECONDS = 0.1

current_process = process.current_process
close_fds: Callable[..., None] = util.close_fds  # type: ignore[attr-defined]
"""Closes the fds that it is given."""
get_logger = util.get_logger


def exit_code(ended: process.BaseProcess, patience: float = 0.0) -> int | None:
    """Collect a process that has ended, and let go of it; None when another did so before.

    Anything in this process that calls ``os.wait()``, or ignores SIGCHLD, takes exit
    codes away; ``join()`` would then see a process that runs forever.

    Args:
        ended: The process.
        patience: How many seconds may pass until the kernel has its exit code, where it tells of the end before.
    """
    popen: Any = getattr(ended, "_popen", None)
    if popen is None:  # an interrupted call was as far as that
        process._children.discard(ended)  # type: ignore[attr-defined]
        return None
    if sys.platform != "win32" and popen.method == "forkserver":
        # The server tells, as its parent; but not if it was stopped.
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
        # Another thread, in active_children() for example, may have it from the kernel and not entered it yet.
        time.sleep(0.001)
        code = ended.exitcode
    if getattr(popen, "status_is_lost", False):
        code = None
    elif code is None:
        popen.returncode = 255  # or close() would refuse
    elif 0 < code - _ENDED_BY < _SIGNALS:  # see the Windows backend; a crash has a code that is larger still
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
    # At its exit multiprocess ends all that it takes for its children. In a process that
    # was forked by other means than Process they are its parent's.
    process._children.clear()  # type: ignore[attr-defined]


_system.register_at_fork(after_in_child=_forget_siblings)


def let_have_children() -> None:
    """Allow this daemonic process to start processes of its own.

    The flag keeps a *parent* from waiting for its daemons; it also forbids the daemon
    to have children. A pool worker needs the first and not the second: its own
    workers die with it, because their lifeline does.
    """
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the seam has no public name


def fork_server() -> Any:
    """Return the module with the fork server, where processes can be forked."""
    return importlib.import_module("multiprocess.forkserver")


def spare_fork_server() -> None:
    """Keep the fork server from importing ``__main__`` by itself, unless it is told the arguments of the program.

    In some versions it imports it without them, and ends when that fails. Its processes import it themselves.
    """
    server = fork_server()
    if "sys_argv" not in server.main.__code__.co_varnames and server._forkserver._preload_modules == ["__main__"]:
        server._forkserver._preload_modules = []


def settle_child() -> None:
    """Do what `Process` does in its child before it runs anything, in one that was forked by other means."""
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    util._run_after_forkers()  # type: ignore[attr-defined]


def end_child() -> None:
    """Do what `Process` does in its child at the end: wait for its children and threads, as an interpreter does."""
    util._exit_function()  # type: ignore[attr-defined]
    threading._shutdown()  # type: ignore[attr-defined]
