"""Makes the standard library know which process it is in, in a process that forkshm started.

``multiprocess`` and ``multiprocessing`` each have a current process, its parent, its children, and a list of exit
actions. Starting one of forkshm's processes updates only those of ``multiprocess``. Libraries that ask
``multiprocessing`` whether this is a daemon or the main process would get the answer for the parent.
"""

from __future__ import annotations

import itertools
import multiprocessing.process
import sys
from typing import Any

from forkshm import _multiprocess

__all__ = ("introduce", "register")

_theirs: Any = multiprocessing.process
_ours: Any = _multiprocess.process


class _Introduction:
    """A weakly referenceable object, which `register_after_fork` needs."""


def introduce(_: object = None) -> None:
    """Set the standard library's current process to this process, which has just been started."""
    ours, parent = _ours._current_process, _ours._parent_process
    made = _theirs.BaseProcess.__new__(_theirs.BaseProcess)
    made.__dict__.update(vars(ours))
    # It keeps its own secret from the fork, and gets the daemon flag of this process.
    made._config = {**_theirs._current_process._config, "daemon": ours._config.get("daemon", False)}
    made._popen = None
    for name in ("_target", "_args", "_kwargs"):
        made.__dict__.pop(name, None)
    _theirs._current_process = made
    if parent is not None:
        _theirs._parent_process = _theirs._ParentProcess(parent._name, parent._pid, parent._sentinel)
    _theirs._children = set()
    _theirs._process_counter = itertools.count(1)
    if (util := sys.modules.get("multiprocessing.util")) is not None:
        _their_util: Any = util
        _their_util._finalizer_registry.clear()
        _their_util._run_after_forkers()
    _multiprocess.util.Finalize(None, _finish, exitpriority=0)


def _finish() -> None:
    """Run the standard library's exit actions: its finalizers, and the end of its children."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._exit_function()


_introduction = _Introduction()


def register() -> None:
    """Register `introduce` for every process that is started from this one."""
    _multiprocess.util.register_after_fork(_introduction, introduce)
