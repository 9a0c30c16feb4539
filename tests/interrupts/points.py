"""Raises an exception at one point inside forkshm, chosen by its number.

CPython runs signal handlers when a Python function begins and when a call of a C function has returned
(and at backward jumps, which these bracket). A profile function is called at just these two moments,
in the place of the handler: what it raises comes out of the same instruction. So every point at which a
Ctrl-C can arrive has a number, and can be tried, one run each.
"""

from __future__ import annotations

import os
import sys
import threading

import forkshm

__all__ = ("Interrupt", "Points")

_PACKAGE = os.path.dirname(os.path.abspath(forkshm.__file__)) + os.sep


class Interrupt(BaseException):
    """What is raised."""


class Points:
    """Counts the points that a block passes in this thread, and raises at one of them.

    Args:
        at: The number of the point, from 1 on; 0 counts only.
        handler: Called there. By default it raises `Interrupt`.
    """

    def __init__(self, at=0, handler=None):
        self.at = at
        self.seen = 0
        self.where = None
        self._handler = handler or self._raise
        self._owner = os.getpid()

    def _raise(self):
        raise Interrupt(f"at point {self.at}")

    def __enter__(self):
        self._thread = threading.get_ident()
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _look(self, frame, event, argument):
        if event not in ("call", "c_return") or os.getpid() != self._owner:
            return
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        if argument is sys.setprofile:
            return
        self.seen += 1
        if self.seen == self.at:
            called = f" after {argument.__name__}" if event == "c_return" else ""
            self.where = f"{frame.f_code.co_filename[len(_PACKAGE) :]}:{frame.f_lineno} {frame.f_code.co_name}{called}"
            self._handler()
