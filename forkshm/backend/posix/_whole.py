"""Functions of several steps that no signal handler interrupts, as if they were functions of C.

On Linux one C call makes a kernel call and records it, so that a handler runs before both or after both. This backend
replaces some kernel calls by several calls and state of its own. The functions that change this state defer signals:
while one of them runs, a handler that only records signals replaces Python's handlers. Afterwards, Python is told that
these signals have just arrived.

Deferring and restoring must not check for signals themselves. Python checks in each call and at each backward jump, but
not when it looks up an attribute or extends a list. So both consist of such steps: each property of `_Deferral` returns
an iterator that does the work, and a list consumes it.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import importlib
import itertools
import operator
import threading
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _system

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _Function = TypeVar("_Function", bound=Callable[..., Any])

__all__ = ("surely", "whole")

# Type checkers know nothing of it for Windows, and check this module.
_syscalls: Any = importlib.import_module("forkshm.backend._syscalls")
# `signal` would make enums of the numbers.
_signal: Any = importlib.import_module("_signal")
_NUMBERS = tuple(sorted(number for number in map(int, _signal.valid_signals()) if number < 32))

_ASYNC_EXC: Any = ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
_set_async_exc = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)(_ASYNC_EXC)
_clear_async_exc = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(_ASYNC_EXC)

# An exception to be raised later, under the class that stands for it.
_late: dict[Any, BaseException] = {}


class _Later(BaseException):
    """Stands for the exception in `_late`: Python can only be told to raise a class, and this class makes it."""

    # CPython 3.11 makes the exception when it is caught, and may pass it to be made again. Finalizers may run before,
    # and the functions in them tell Python again. No call is made, because a handler may raise in it.
    @_interrupts.promptly
    def __new__(cls, made: Any = None) -> Any:
        done: list[Any] = []
        done[:] = (_deferral.not_raising,)
        if _Later not in _late:
            return made
        late = _late[_Later]
        del _late[_Later]
        return late


class _Deferral(_interrupts.Here):
    """The signals of the main thread, the only thread in which Python runs handlers."""

    def __init__(self) -> None:
        self.main = threading.main_thread().ident
        self.is_on = False
        # The signals that arrived, each with the frame that it arrived in.
        self.came: dict[int, Any] = {}
        # The handler of each signal; whether it is a function; and the numbers and handlers of those that are.
        self.handlers: list[Any] = []
        self.flags: list[bool] = []
        self.numbers: list[int] = []
        self.before: list[Any] = []
        self.note: Any = self.came.setdefault
        # What the C library does at these signals: Python's own handler, with flags, or one of another library.
        self.actions = [_syscalls.action_room() for _ in _NUMBERS]
        self._handlers_now = functools.partial(map, _signal.getsignal, _NUMBERS)
        self._flags_now = functools.partial(map, callable, self.handlers)
        self._numbers_now = functools.partial(itertools.compress, _NUMBERS, self.flags)
        self._deferring = functools.partial(map, _signal.signal, self.numbers, itertools.repeat(self.note))
        self._restoring = functools.partial(map, _signal.signal, self.numbers, self.before)
        self._noting = functools.partial(map, _syscalls.sigaction, self.numbers, itertools.repeat(None), self.actions)
        self._acting = functools.partial(map, _syscalls.sigaction, self.numbers, self.actions, itertools.repeat(None))
        self._sending = functools.partial(map, _thread.interrupt_main, self.came)
        self._forgetting = self.came.clear
        self.wakeup: list[int] = []
        self._not_waking = functools.partial(_signal.set_wakeup_fd, -1)
        self._waking = functools.partial(map, _signal.set_wakeup_fd, self.wakeup)
        self._not_raising = functools.partial(_clear_async_exc, ctypes.c_ulong(self.main or 0), None)
        self._raising = functools.partial(_set_async_exc, ctypes.c_ulong(self.main or 0), _Later)

    handlers_now: Any = property(operator.methodcaller("_handlers_now"))
    flags_now: Any = property(operator.methodcaller("_flags_now"))
    numbers_now: Any = property(operator.methodcaller("_numbers_now"))
    deferring: Any = property(operator.methodcaller("_deferring"))
    restoring: Any = property(operator.methodcaller("_restoring"))
    noting: Any = property(operator.methodcaller("_noting"))
    acting: Any = property(operator.methodcaller("_acting"))
    sending: Any = property(operator.methodcaller("_sending"))
    forgetting: Any = property(operator.methodcaller("_forgetting"))
    not_waking: Any = property(operator.methodcaller("_not_waking"))
    waking: Any = property(operator.methodcaller("_waking"))
    not_raising: Any = property(operator.methodcaller("_not_raising"))
    raising: Any = property(operator.methodcaller("_raising"))


_deferral = _Deferral()
# The thread that forks becomes the child's main thread.
_system.register_at_fork(after_in_child=_deferral.__init__)  # type: ignore[misc]


def _look() -> None:
    """Check for signals, as every function does when it begins."""


def whole(function: _Function) -> _Function:
    """Return *function*, wrapped so that signal handlers run before or after it. It must not wait for anything."""
    return _deferring(function, may_be_left_out=True)


def surely(function: _Function) -> _Function:
    """Return *function*, wrapped so that signal handlers run after it: once called, it takes effect."""
    return _deferring(function, may_be_left_out=False)


def _deferring(function: _Function, *, may_be_left_out: bool) -> _Function:
    @_interrupts.promptly
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        state = _deferral
        if state.is_on or state.ident != state.main:
            return function(*arguments, **options)
        late = None
        done: list[Any] = []
        # No call or backward jump may come from here until signals are deferred, except the one that lets handlers run.
        state.handlers[:] = state.handlers_now
        state.flags[:] = state.flags_now
        state.numbers[:] = state.numbers_now
        if may_be_left_out:
            _look()
        done[:] = state.noting
        state.is_on = True
        if _Later in _late:  # raised by a handler a moment ago, and told again below
            done[:] = (state.not_raising,)
        before = state.before
        before[:] = ()
        try:
            before += state.deferring
        except BaseException as error:  # raised by a handler that was due
            late = error
            try:
                done[:] = state.restoring
                before[:] = ()
                before += state.deferring
            except BaseException as another:
                late = another
        done[:] = state.acting
        try:
            if late is not None and may_be_left_out:
                due, late = late, None
                raise due
            return function(*arguments, **options)
        finally:
            # No call or backward jump may come from here to the end.
            try:
                done[:] = state.restoring
            except BaseException as error:  # raised by a handler that was restored before the others
                late = error
                done[:] = state.restoring
            done[:] = state.acting
            if state.came:
                # A wakeup fd was written to when the signals arrived, so do not write to it again.
                state.wakeup[:] = (state.not_waking,)
                done[:] = state.sending
                done[:] = (state.forgetting,)
                done[:] = state.waking
            state.is_on = False
            if late is not None:
                _late[_Later] = late
            if _Later in _late:
                done[:] = (state.raising,)

    return call  # type: ignore[return-value]
