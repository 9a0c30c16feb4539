"""Call a handler at one point inside forkshm, chosen by its number, where CPython could run a signal handler.

CPython runs handlers after ``RESUME`` (a function begins), after a call of an object that is not a Python function, and
at backward jumps; nowhere else. A trace function sees each instruction, so it knows whether the previous one was such a
point. Its exception leaves the frame like an exception of a signal handler.

A Python function that was called by bytecode returns without such a check, so its return is not a point.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import sys
import threading

import forkshm

__all__ = ("Interrupt", "Points", "Trouble")

_PACKAGE = os.path.dirname(os.path.abspath(forkshm.__file__)) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep

_CALLS = frozenset(code for name, code in dis.opmap.items() if name.startswith("CALL"))
_RESUME = dis.opmap["RESUME"]
_CHECKS = frozenset(code for name, code in dis.opmap.items() if name == "RESUME" or "JUMP_BACKWARD" in name)
_AFTER_YIELD_FROM = 2
# Python functions that a type calls; the call of the type itself is a C call.
_OF_TYPES = frozenset({"__init__", "__new__", "__call__"})
# Maximum number of times that one instruction, called from one place, counts in a run: a waiting loop passes it
# thousands of times.
_MOST = 4


@functools.cache
def _handlers(code):
    return [(entry.start, entry.end, entry.target) for entry in dis._parse_exception_table(code)]


@functools.cache
def _entering(code):
    """Return where ``with`` calls ``__enter__``: since Python 3.15 that does not check for signals (gh-148874)."""
    if sys.version_info < (3, 15):
        return frozenset()
    instructions = list(dis.get_instructions(code))
    return frozenset(
        call.offset
        for before, call in itertools.pairwise(instructions)
        if call.opname.startswith("CALL") and before.opname == "LOAD_SPECIAL"
    )


def _handler_at(code, position):
    """Return where an exception at an instruction goes."""
    return next((target for start, end, target in _handlers(code) if start <= position < end), None)


class Interrupt(BaseException):
    """An exception like KeyboardInterrupt."""


class Trouble(Exception):
    """An exception like that of a SIGALRM handler."""


class _Frame:
    """The state of a frame since the last instruction."""

    __slots__ = ("c_returned", "called", "last")

    def __init__(self):
        self.last = -1
        self.called = None
        self.c_returned = False


class Points:
    """Counts the points that a block passes in this thread, and calls *handler* at one of them.

    Args:
        at: The number of the point, from 1; 0 only counts.
        handler: Called at the point. By default it raises `Interrupt`.
        again: If not 0, the handler is called once more, at this number of points after the first one. A jump back is
            not counted there.
        say: Called with *where* before that.
        also: Modules of others whose functions count as well.
    """

    def __init__(self, at=0, handler=None, say=None, also=(), again=0):
        self.at = at
        self.again = again
        self.seen = 0
        self.where = None
        self._handler = handler or self._raise
        self._say = say
        self._within = (_PACKAGE, *(module.__file__ for module in also))
        self._owner = os.getpid()
        self._frames = {}
        self._times = {}
        self._is_done = False

    def _raise(self):
        raise Interrupt(f"at point {self.at}")

    def __enter__(self):
        self._thread = threading.get_ident()
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        sys.setprofile(None)
        self._frames.clear()

    def _profile(self, frame, event, _):
        if self._is_done:
            if self.again:
                self._pass_again(frame, event)
            return
        if event == "c_return" and frame.f_lasti in _entering(frame.f_code):
            return
        # An exception of this call leaves the traced call, as intended: no instruction is in between.
        if event == "c_return" and (state := self._frames.get(frame)) is not None:
            state.c_returned = True
            self._pass(frame, frame.f_lasti)

    def _trace(self, frame, event, _):
        if self._is_done or os.getpid() != self._owner:
            return None
        if event == "call" and (caller := self._frames.get(frame.f_back)) is not None:
            caller.called = frame.f_code.co_name
        if not frame.f_code.co_filename.startswith(self._within):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        if frame not in self._frames:
            self._frames[frame] = _Frame()
        # A trace function sees `RESUME` only as this event. The instruction's argument tells where it is: after
        # ``yield from`` and ``await`` it does not check for signals.
        start = frame.f_lasti
        if event == "call" and start >= 0 and frame.f_code.co_code[start] == _RESUME:
            if frame.f_code.co_code[start + 1] & 3 < _AFTER_YIELD_FROM:
                self._pass(frame, start)
        return self._look

    def _look(self, frame, event, _):
        if self._is_done:
            return None
        if event == "return":
            self._frames.pop(frame, None)
            return None
        if event != "opcode":
            return self._look
        state = self._frames.get(frame)
        if state is None:
            return self._look
        before, state.last = state.last, frame.f_lasti
        called, state.called = state.called, None
        c_returned, state.c_returned = state.c_returned, False
        code = frame.f_code
        if before < 0 or c_returned:
            return self._look
        operation, now = code.co_code[before], frame.f_lasti
        if before in _entering(code):
            return self._look
        if operation in _CALLS:
            if called is not None and called not in _OF_TYPES:
                return self._look
        elif operation not in _CHECKS or (operation != _RESUME and now > before):
            return self._look  # a jump that was not taken is not a point
        # An exception raised here belongs to this instruction, not to the previous one. Does it go to the same place?
        if _handler_at(code, before) == _handler_at(code, now):
            self._pass(frame, before)
        return self._look

    def _pass(self, frame, before):
        if os.getpid() != self._owner:
            self._is_done = True
            return
        back = frame.f_back
        key = frame.f_code, before, back and back.f_code, back and back.f_lasti
        times = self._times[key] = self._times.get(key, 0) + 1
        if times > _MOST:
            return
        self.seen += 1
        if self.seen == self.at:
            self._is_done = True
            # Keeping a frame would keep its local variables, such as views that the rest of the block counts.
            self._frames.clear()
            name = dis.opname[frame.f_code.co_code[before]]
            file = frame.f_code.co_filename.removeprefix(_PACKAGE)
            self.where = f"{file}:{frame.f_lineno} {frame.f_code.co_name} after {name}"
            if back is not None:
                self.where += f" < {os.path.basename(back.f_code.co_filename)}:{back.f_lineno} {back.f_code.co_name}"
            if self._say is not None:
                self._say(where=self.where)
            # A signal that is deferred must not be handled in these functions.
            sys.settrace(None)
            if not self.again:
                sys.setprofile(None)
            self._handler()

    def _pass_again(self, frame, event):
        """Count the points after the first call of the handler. An exception of a trace function ends only tracing."""
        if os.getpid() != self._owner or not frame.f_code.co_filename.startswith(self._within):
            return
        start = frame.f_lasti
        if event == "call":
            begins = start >= 0 and frame.f_code.co_code[start] == _RESUME
            if not begins or frame.f_code.co_code[start + 1] & 3 >= _AFTER_YIELD_FROM:
                return
        elif event != "c_return" or start in _entering(frame.f_code):
            return
        self.again -= 1
        if not self.again:
            sys.setprofile(None)
            self.where += f", and {frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno} "
            self.where += f"{frame.f_code.co_name} after {event}"
            if self._say is not None:
                self._say(where=self.where)
            self._handler()
