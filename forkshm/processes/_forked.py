"""What a child that was forked by other means than `Process` has to do itself, and whether it may have children."""

from __future__ import annotations

import multiprocessing.process
import threading
from typing import Any

from forkshm import _multiprocess, _system

__all__ = ("end_child", "let_have_children", "settle_child")


def _forget_siblings() -> None:
    # At exit, multiprocess ends all processes that it considers its children. In a process that was not forked by
    # Process, these are children of the parent.
    _multiprocess.process._children.clear()  # type: ignore[attr-defined]


_system.register_at_fork(after_in_child=_forget_siblings)


class _Daemon(multiprocessing.process.BaseProcess):
    """A daemon that may start processes: ``multiprocessing`` looks into the configuration."""

    daemon = True


def let_have_children() -> None:
    """Allow this daemonic process to start processes of its own.

    The daemon flag makes the *parent* kill its daemons at exit; it also forbids the daemon to have children. A pool
    worker needs the first effect only: its own workers die with it, because of their lifeline.

    For ``multiprocessing`` the process is still a daemon, because libraries such as joblib ask, and then use threads.
    """
    _multiprocess.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the seam has no public name
    theirs: Any = multiprocessing.process.current_process()
    if theirs.daemon:
        theirs.__class__ = _Daemon
        theirs._config["daemon"] = False


def settle_child() -> None:
    """Initialize a child that was forked by other means, as `Process` does before it runs anything."""
    _multiprocess.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    _multiprocess.util._run_after_forkers()  # type: ignore[attr-defined]


def end_child() -> None:
    """Finish such a child, as `Process` does: wait for its children and threads, like an interpreter at exit."""
    _multiprocess.util._exit_function()  # type: ignore[attr-defined]
    threading._shutdown()  # type: ignore[attr-defined]
