"""The ledger counts what this process has sent and received, and reports copies to `forkshm.assert_zero_copy`.

Counting adds to an int where payloads are packed and opened. It takes no lock. CPython with the GIL switches threads,
and runs signal handlers, at calls and at backward jumps, so nothing comes between reading and writing in
``ledger.messages += 1``. Free-threaded builds have no such rule; there each thread has counts of its own
(`ThreadedLedger`).

The origin of a copy is determined only while there are watches; otherwise each place checks once whether there are any.
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
# Modules between a caller and forkshm that are not the caller's own code.
_PASSED_OVER = ("pickle", "cloudpickle", "multiprocess", "multiprocessing", "concurrent", "threading", "contextlib")


class Sending(NamedTuple):
    """The call for which something is sent or received."""

    what: str
    """For example ``"sent to fill()"`` or ``"result of fill()"``."""
    where: str
    """File, line and function of the call."""


class Ledger:
    """The counters of this process. A forked child begins at zero, without watches."""

    __slots__ = ("bytes_copied", "bytes_shared", "messages", "tasks", "watches")

    def __init__(self) -> None:
        # Tasks answered to pools of this process, or run by it as a worker.
        self.tasks = 0
        # Messages sent and received.
        self.messages = 0
        # Bytes, sent or received, that were copied into an arena, and bytes that were not.
        self.bytes_copied = 0
        self.bytes_shared = 0
        # Each is called with the number of bytes, a description, and whether they were a message.
        self.watches: dict[int, Callable[[int, str, bool], None]] = {}

    def note(self, copies: Iterable[tuple[int, str]], direction: str, *, message: bool = False) -> None:
        """Report copies to the watches. This is expensive, but happens only while there are any.

        Args:
            copies: The number of bytes and a description of each copy.
            direction: "sent" or "received", unless the thread acts `on_behalf_of` a call.
            message: Whether the bytes are a message, which is not a copy of a buffer.
        """
        sending = getattr(_thread, "sending", None) or Sending(direction, call_site())
        for nbytes, what in copies:
            for watch in list(self.watches.values()):
                watch(nbytes, f"{what}, {sending.what} at {sending.where}", message)


class _Sum:
    """A counter that is the sum over all threads; ``+=`` changes the count of the calling thread."""

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
    """The ledger of a free-threaded build, in which threads count at the same time without losing counts."""

    __slots__ = ("_local", "cells")

    tasks = _Sum()
    messages = _Sum()
    bytes_copied = _Sum()
    bytes_shared = _Sum()

    def __init__(self) -> None:
        # The counts of each thread, including threads that have ended.
        self.cells: list[dict[str, int]] = []
        self._local = threading.local()
        super().__init__()

    def own(self) -> dict[str, dict[str, int]]:
        """Return the counts of the calling thread, and the sums that it last read."""
        own = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = {"counts": dict.fromkeys(Ledger.__slots__, 0), "seen": {}}
            self.cells.append(own["counts"])
        return own


ledger = ThreadedLedger() if sysconfig.get_config_var("Py_GIL_DISABLED") else Ledger()
_thread = threading.local()

_system.register_at_fork(after_in_child=ledger.__init__)  # type: ignore[misc]  # starts from zero


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
    """Return the place of the code that uses forkshm, for example ``"file.py:12 in main"``."""
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
    """Return a description of the owner of a buffer, for example ``"numpy.ndarray float64 (8, 8)"``."""
    while isinstance(thing, memoryview) and thing.obj is not None:
        thing = thing.obj
    thing = getattr(thing, "stands_for", thing)
    name = _system.path_of(type(thing))
    shape, dtype = getattr(thing, "shape", None), getattr(thing, "dtype", None)
    return name if shape is None or dtype is None else f"{name} {dtype} {shape}"
