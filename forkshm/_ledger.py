"""The ledger: what this process has moved, always; and while somebody watches, who moved it.

Counting is an addition to an int where payloads are made and opened. It takes no lock: CPython
with the GIL switches threads at calls and at jumps backwards, and signal handlers run there too,
so nothing comes between the reading and the writing of ``ledger.messages += 1``. Free-threaded
builds have no such rule; there each thread adds to counts of its own (`ThreadedLedger`).

Who sent a copy is looked for only while there are watches (`forkshm.assert_zero_copy`):
otherwise each place asks once whether there are any.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm import _system

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ("Sending", "call_site", "describe", "ledger", "on_behalf_of")

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# What stands between a caller and us without being anybody's own code.
_PASSED_OVER = ("pickle", "cloudpickle", "multiprocess", "multiprocessing", "concurrent", "threading", "contextlib")


class Sending(NamedTuple):
    """On whose behalf something is sent or received."""

    what: str
    """For example ``"sent to fill()"`` or ``"result of fill()"``."""
    where: str
    """File, line and function of the call."""


class Ledger:
    """The counters of this process. A forked child begins at zero, and is not watched."""

    __slots__ = ("bytes_copied", "bytes_shared", "messages", "tasks", "watches")

    def __init__(self) -> None:
        # Answered to pools of this process, or done by it as a worker.
        self.tasks = 0
        # Sent and received.
        self.messages = 0
        # Bytes of both directions that were copied into an arena, and that were not.
        self.bytes_copied = 0
        self.bytes_shared = 0
        # Called with bytes, what they were, and whether they were a message itself.
        self.watches: dict[int, Callable[[int, str, bool], None]] = {}

    def note(self, copies: Iterable[tuple[int, str]], direction: str, *, message: bool = False) -> None:
        """Report a copy to the watchers. This is expensive, but only while there are any.

        Args:
            copies: Bytes, and what they were.
            direction: "sent" or "received", unless the thread acts `on_behalf_of` somebody.
            message: They are a message, which is no copy of anybody's buffer.
        """
        sending = getattr(_thread, "sending", None) or Sending(direction, call_site())
        for nbytes, what in copies:
            for watch in list(self.watches.values()):
                watch(nbytes, f"{what}, {sending.what} at {sending.where}", message)


class _Sum:
    """A counter that is the sum of the counts of all threads; ``+=`` changes that of the calling thread."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, made: Any, owner: type | None = None) -> int:
        seen = sum(counts[self._name] for counts in list(made.cells))
        made.own()["seen"][self._name] = seen
        return int(seen)

    def __set__(self, made: Any, value: int) -> None:
        own = made.own()
        own["counts"][self._name] += value - own["seen"].get(self._name, 0)


class ThreadedLedger(Ledger):
    """The ledger of a free-threaded build: threads that count at the same time lose nothing."""

    __slots__ = ("_local", "cells")

    tasks = _Sum()
    messages = _Sum()
    bytes_copied = _Sum()
    bytes_shared = _Sum()

    def __init__(self) -> None:
        # The counts of each thread, also of those that have ended.
        self.cells: list[dict[str, int]] = []
        self._local = threading.local()
        super().__init__()

    def own(self) -> dict[str, dict[str, int]]:
        """Return the counts of the calling thread, and the sums that it read last."""
        own = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = {"counts": dict.fromkeys(Ledger.__slots__, 0), "seen": {}}
            self.cells.append(own["counts"])
        return own


ledger = ThreadedLedger() if sysconfig.get_config_var("Py_GIL_DISABLED") else Ledger()
_thread = threading.local()

_system.register_at_fork(after_in_child=ledger.__init__)  # type: ignore[misc]  # all anew


@contextlib.contextmanager
def on_behalf_of(sending: Sending) -> Iterator[None]:
    """Attribute to *sending* everything that this thread packs and opens in the block."""
    before = getattr(_thread, "sending", None)
    _thread.sending = sending
    try:
        yield
    finally:
        _thread.sending = before


def call_site() -> str:
    """Return where the code that uses forkshm is just now: ``"file.py:12 in main"``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if not path.startswith(_PACKAGE) and module not in _PASSED_OVER:
            here = os.getcwd() + os.sep
            return f"{path.removeprefix(here)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "a thread of forkshm"


def describe(thing: Any) -> str:
    """Return what a buffer belongs to, for example ``"numpy.ndarray float64 (8, 8)"``."""
    while isinstance(thing, memoryview) and thing.obj is not None:
        thing = thing.obj
    thing = getattr(thing, "stands_for", thing)
    name = _system.path_of(type(thing))
    shape, dtype = getattr(thing, "shape", None), getattr(thing, "dtype", None)
    return name if shape is None or dtype is None else f"{name} {dtype} {shape}"
