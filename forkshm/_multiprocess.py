"""The only file that imports ``multiprocess``.

``multiprocess`` has no type annotations, so the type checker takes these names from the standard library that it was
forked from. This file lists everything that forkshm uses of it.
"""

from __future__ import annotations

import atexit
import importlib
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

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
        spawn,
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
    "fork_server",
    "get_logger",
    "managers",
    "package",
    "process",
    "reduction",
    "resource_tracker",
    "shared_memory",
    "sharedctypes",
    "spawn",
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
        "spawn",
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


def push_to_child(fd: int) -> int:
    """Duplicate a handle into the process that is being spawned (Windows only); return its value there."""
    popen: Any = context.get_spawning_popen()
    return int(popen.duplicate_for_child(fd))


default_context: Any = context._default_context
"""The context of processes started without another one; `forkshm.context` replaces it."""

current_process = process.current_process
close_fds: Callable[..., None] = util.close_fds  # type: ignore[attr-defined]
"""Closes fds."""
get_logger = util.get_logger


def fork_server() -> Any:
    """Return the module of the fork server, where processes can be forked."""
    return importlib.import_module("multiprocess.forkserver")


def _let_go_of_main() -> None:
    """Make dill, which ``multiprocess`` imports, refer to ``__main__`` weakly.

    When the interpreter ends, it frees the objects of ``__main__`` while all modules are complete, unless another
    module keeps ``__main__``. A ``__del__`` of the program can then use everything.
    """
    if len(sys._current_frames()) > 1:
        # A daemon thread keeps the objects anyway. They are freed if the interpreter clears ``__main__``.
        return
    for name in ("dill._dill", "dill.session"):
        module = sys.modules.get(name)
        main = getattr(module, "_main_module", None)
        if isinstance(main, types.ModuleType):
            module._main_module = weakref.proxy(main)  # type: ignore[union-attr]


atexit.register(_let_go_of_main)
