"""The state that a worker keeps for its tasks, and its orderly end."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess, _system

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("at_worker_end", "begin", "leave", "note_item", "worker_state")

# Maximum total seconds of the functions that a worker calls at its end.
_SECONDS = 10.0

_NOTHING: Any = object()
_state: Any = _NOTHING
# Functions to call at the end of this worker, the last one first; None in other processes.
_at_end: list[tuple[Callable[[Any], object], Any]] | None = None
# Writes the number of an item to the slot of this worker; None in other processes.
_note: Callable[[int], object] | None = None


def _forget() -> None:
    # A worker's child is not a worker, and does not call its parent's functions.
    global _state, _at_end, _note
    _state, _at_end, _note = _NOTHING, None, None


_system.register_at_fork(after_in_child=_forget)


def worker_state() -> Any:
    """Return the value that the pool's ``worker_init`` returned in this worker: a connection, a model, a cache.

    Each worker has a state of its own, which lives until the worker ends.

    Raises:
        RuntimeError: This process is not a worker of a pool that was made with ``worker_init``.

    Fork and threads:
        Any thread of the worker may call it. A process that the worker starts has no state.

    Example:
        >>> import forkshm
        >>> def count(x):
        ...     forkshm.worker_state().append(x)
        ...     return len(forkshm.worker_state())
        >>> with forkshm.Pool(1, worker_init=list) as pool:
        ...     pool.map(count, "abc")
        [1, 2, 3]
    """
    if _state is _NOTHING:
        raise RuntimeError(
            f"process {os.getpid()} has no worker state: it is not a worker of a pool made with worker_init=..."
        )
    return _state


def begin(
    init: Callable[[], object] | None, leaving: Callable[[Any], object] | None, note: Callable[[int], object]
) -> None:
    """Make this process a worker. Its state is the value that *init* returns, and *leaving* receives it at the end.

    Args:
        init: Makes the state.
        leaving: Called with the state when the worker ends in order.
        note: Called with the index of the item that the worker begins; see `note_item`.

    Raises:
        Exception: Whatever *init* raised.
    """
    global _state, _at_end, _note
    _at_end, _note = [], note
    if init is not None:
        _state = init()
    if leaving is not None:
        _at_end.append((leaving, None if _state is _NOTHING else _state))


def note_item(index: int) -> None:
    """Record that the task of this worker begins an item of its own, counted from 0.

    Messages about the worker's death have this index, and the ``task_timeout`` of the pool begins again.
    """
    if _note is not None:
        _note(index)


def at_worker_end(function: Callable[[Any], object], state: Any) -> None:
    """Call ``function(state)`` when this worker ends in order, or when the process ends if it is not a worker."""
    if _at_end is None:
        _multiprocess.util.Finalize(None, function, (state,), exitpriority=5)
    else:
        _at_end.append((function, state))


def leave() -> None:
    """Call the functions for the end of a worker, for a limited time.

    An exception from one of them is printed, and the others are still called.
    """
    if not _at_end:
        return
    late = threading.Timer(_SECONDS, _give_up)
    late.daemon = True
    late.start()
    while _at_end:
        function, state = _at_end.pop()
        try:
            function(state)
        except Exception:
            print(f"worker_exit raised in {_multiprocess.current_process().name}:", file=sys.stderr)
            traceback.print_exc()
    late.cancel()


def _give_up() -> None:
    name = _multiprocess.current_process().name
    try:
        print(f"worker_exit took {name} longer than {_SECONDS:g} seconds, so it is ended; it was at:", file=sys.stderr)
        traceback.print_stack(sys._current_frames()[threading.main_thread().ident or 0])
    finally:
        os._exit(1)
