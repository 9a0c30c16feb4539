"""In a process that was started here, the standard library knows which one it is, too.

``multiprocess`` and ``multiprocessing`` each keep a current process, its parent, its children, and what is to be done
at exit. Starting one of our processes informs only ``multiprocess``. Libraries that ask ``multiprocessing`` (is this a
daemon? the main process?) would get the answer for the parent.
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
    """What `register_after_fork` needs: something that can be referred to weakly."""


def introduce(_: object = None) -> None:
    """Tell the standard library which process this is. Call it when the process has just been started."""
    ours, parent = _ours._current_process, _ours._parent_process
    made = _theirs.BaseProcess.__new__(_theirs.BaseProcess)
    made.__dict__.update(vars(ours))
    # Its own secret, as it was at the fork. And what this process is to its parent.
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
    """Do what the standard library has to do at the end: its finalizers, its children."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._exit_function()


_introduction = _Introduction()


def register() -> None:
    """Register `introduce` for every process that is started from this one."""
    _multiprocess.util.register_after_fork(_introduction, introduce)
