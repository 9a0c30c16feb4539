"""Signals while a process is being started, and while a thread enters or leaves a lock.

**Starting a process.** Python ignores exceptions of hooks that run around a fork. So an exception of a signal handler
would be lost there, and would leave the hooks unfinished: that of `logging` would leave its lock held. So the handlers
are called in the parent once the process has started. A child that is still starting would print a traceback of its
own at Ctrl-C, so SIGINT is blocked there. `signal.signal` also replaces handlers that other libraries have installed in
C, and clears the flag that `signal.siginterrupt` sets, so `sigaction` restores both.

**Entering a lock.** ``with lock:`` is safe if ``lock.__enter__`` is a C function, except in CPython 3.14. There,
``with`` calls ``__enter__`` by the instruction ``CALL``, which runs signal handlers after a C function has returned,
when the block is not protected yet (gh-148874, fixed in 3.15). If a handler raises there, the lock stays held. A
*Python* function that ``CALL`` runs without a new C frame returns without such a check, and so do attribute look-ups.
So the ``__enter__`` of `Entered` is a Python function in 3.14, whose only work is to look up a property; the property
acquires the lock in C.

**Leaving a lock.** A Python function checks for signals when it begins, so a Python ``__exit__`` can be ended before
its first statement. `promptly` removes that check. The code after it must take effect whatever a handler raises: it
makes no call before the lock is released, looks up a property where it needs C, or repeats an interrupted step.

The gap remains in 3.14 where a debugger or a compiler replaces the evaluation of frames (PEP 523).
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import importlib
import opcode
import operator
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    _Function = TypeVar("_Function", bound=Callable[..., Any])

__all__ = (
    "Entered",
    "Here",
    "Lock",
    "RLock",
    "actions_of",
    "begin",
    "handlers_of",
    "held_back",
    "here",
    "hold_back",
    "install",
    "is_of_kernel",
    "promptly",
    "refused",
    "repeat",
)

# The C module behind `signal`, which does not convert numbers to enums and back. That conversion touches some 30 pages,
# and after a fork each page is copied in both processes.
_signal: Any = importlib.import_module("_signal")
_SIGINT = frozenset((int(signal.SIGINT),))


def _is_main_interpreter() -> bool:
    try:
        interpreters: Any = importlib.import_module("_interpreters")
    except ImportError:  # before CPython 3.13
        return True
    current, *_ = interpreters.get_current()
    main, *_ = interpreters.get_main()
    return bool(current == main)


# A subinterpreter has a main thread of its own, but may not set signal handlers.
_HAS_HANDLERS = _is_main_interpreter()

# Signals whose handlers are deferred. The others cannot be caught, or are raised by the code that runs.
_NUMBERS = tuple(
    number
    for number in sorted(map(int, _signal.valid_signals()))
    if number not in {getattr(signal, f"SIG{name}", 0) for name in ("KILL", "STOP", "SEGV", "BUS", "FPE", "ILL")}
)

# sigaction(2), with room for the new action and for the current one. A backend sets both, because only backends call C.
sigaction: Any = None
action_room: Any = None

# The signals that came in a block: the number, the frame, and the process.
_Came: TypeAlias = list[tuple[int, Any, int]]

# The handlers, the actions and the signal mask outside of all blocks, which a forked child gets, and the signals that
# came.
_outside: tuple[dict[int, Any], dict[int, Any], Any, _Came] | None = None
# The thread that entered the outermost block.
_holder: int | None = None


def handlers_of(numbers: Iterable[int]) -> dict[int, Any]:
    """Return Python's handler of each signal, for `install`."""
    return {int(number): _signal.getsignal(number) for number in numbers}


def actions_of(numbers: Iterable[int]) -> dict[int, Any]:
    """Return what the C library does at each signal: a function of Python or of another library, and flags."""
    if sigaction is None:
        return {}
    actions = {int(number): action_room() for number in numbers}
    for number, action in actions.items():
        sigaction(number, None, action)
    return actions


def install(handlers: dict[int, Any], actions: dict[int, Any]) -> None:
    """Set Python's handlers, and keep what the C library does. Can be repeated."""
    for number, handler in handlers.items():
        # None is a handler that was installed before Python started.
        _signal.signal(number, _signal.SIG_DFL if handler is None else handler)
        if number in actions:
            sigaction(number, actions[number], None)


def _handle(came: _Came, handlers: dict[int, Any]) -> None:
    """Call the handlers of the signals that came to this process, each once, whatever the others raise."""
    # Not raised again, because a wakeup fd, for example of asyncio, was already written.
    while came:
        number, frame, pid = came.pop(0)
        if pid == os.getpid() and all(number != other for other, _, _ in came):
            try:
                if callable(handlers[number]):
                    handlers[number](number, frame)
                else:  # `begin` has removed the handler
                    signal.raise_signal(number)
            finally:
                _handle(came, handlers)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Defer signals until after the block. Processes started in it have SIGINT blocked until they call `begin`.

    A forked child that has called `begin` may leave the block.
    """
    global _outside, _holder
    me = threading.get_ident()
    if _holder == me:  # a nested block: the outer one handles the signals
        if sys.platform != "win32":
            _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGINT)  # other code may have unblocked it meanwhile
        yield
        return
    handlers = {number: handler for number, handler in handlers_of(_NUMBERS).items() if callable(handler)}
    actions = actions_of(handlers)
    came: _Came = []
    # Handlers run in the main thread, whichever thread the kernel chose.
    are_handled_here = _HAS_HANDLERS and threading.current_thread() is threading.main_thread()
    is_outermost = False
    mask = None
    try:
        if are_handled_here:
            install(dict.fromkeys(handlers, lambda number, frame: came.append((number, frame, os.getpid()))), actions)
        if sys.platform != "win32":
            mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
            _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGINT)
        if _outside is None:
            is_outermost = True
            _outside, _holder = (handlers, actions, mask, came), me
        yield
    finally:
        has_begun = is_outermost and _outside is None
        if is_outermost:
            _outside = _holder = None
        try:
            if sys.platform != "win32" and mask is not None and not has_begun:
                _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        finally:
            if are_handled_here and not has_begun:
                # A handler that was restored before the others may raise.
                repeat(functools.partial(install, handlers, actions))
                _handle(came, handlers)


# Interrupts that came while this process was starting, on systems whose signal masks are not inherited.
_early: list[tuple[Any, ...]] = []


def hold_back() -> None:
    """Block SIGINT until `begin`, in a spawned process that did not inherit its parent's signal mask."""
    if sys.platform == "win32":
        _signal.signal(_signal.SIGINT, lambda *arguments: _early.append(arguments))


def begin(*, ignores: bool) -> None:
    """Undo `held_back` in a process that was started in such a block.

    A process that *ignores* SIGINT is a worker. It has no handler of its parent for SIGTERM, and not the wakeup fd, by
    which asyncio would run handlers in the parent.
    """
    global _outside, _holder
    (handlers, actions, mask, came), _outside, _holder = _outside or ({}, {}, None, []), None, None
    if sys.platform == "win32":
        handlers = {int(signal.SIGINT): signal.default_int_handler}
    if ignores:
        for number, handler in ((signal.SIGINT, _signal.SIG_IGN), (signal.SIGTERM, _signal.SIG_DFL)):
            handlers[int(number)] = handler
            actions.pop(int(number), None)
        _signal.set_wakeup_fd(-1)
    install(handlers, actions)
    if sys.platform != "win32":
        if mask is None:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _SIGINT)
        else:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        _handle(came, handlers)
    elif _early and not ignores:
        raise KeyboardInterrupt


_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# As inspect.CO_VARARGS: importing that module takes long.
_VARARGS = 4

_RESUME = opcode.opmap.get("RESUME")
# The argument of ``RESUME`` in a function that continues after ``yield from``: there it does not check for signals.
_AFTER_YIELD_FROM = 2


def promptly(function: _Function) -> _Function:
    """Return *function*, changed so that no signal handler runs before its first statement.

    Each function of Python begins with an instruction that checks for signals. Only the argument of that instruction
    is changed.
    """
    code = function.__code__
    instructions = bytearray(code.co_code)
    for position in range(0, len(instructions), 2):
        if instructions[position] == _RESUME:
            instructions[position + 1] = _AFTER_YIELD_FROM
            function.__code__ = code.replace(co_code=bytes(instructions))
            break
    return function


@promptly
def repeat(action: Callable[[], object], tries: int = 3) -> None:
    """Call *action*, which can be repeated; call it again if a signal handler raises in it, and raise at the end."""
    try:
        action()
    except BaseException:
        if tries > 1:
            repeat(action, tries - 1)
        raise


@promptly
def is_of_kernel(error: BaseException) -> bool:
    """Return whether a call of the kernel failed, and not a signal handler raised *error* meanwhile.

    An OSError of a handler may have an errno, too. But the handler is in the traceback: a Python function that has the
    interrupted frame as an argument.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return False
    entry = error.__traceback__
    while entry is not None:
        if not entry.tb_frame.f_code.co_filename.startswith(_PACKAGE) and _has_frame(entry.tb_frame):
            return False
        entry = entry.tb_next
    return True


def _has_frame(frame: FrameType) -> bool:
    """Return whether an argument of a function is a frame."""
    code = frame.f_code
    values = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & _VARARGS:
        values += frame.f_locals.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ())
    return any(isinstance(value, FrameType) for value in values)


class _Refused:
    """A block that ends without an exception when the kernel refuses a call."""

    def __enter__(self) -> None:
        pass

    @promptly
    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return error is not None and is_of_kernel(error)


refused = _Refused()


class Here:
    """Identifiers of this thread as attributes: looking up an attribute of C does not check for signals."""

    _get_ident = _thread.get_ident
    _get_native_id = threading.get_native_id
    ident: Any = property(operator.methodcaller("_get_ident"))
    """As `threading.get_ident`."""
    native_id: Any = property(operator.methodcaller("_get_native_id"))
    """As `threading.get_native_id`."""


here = Here()


class Entered:
    """A lock whose ``with`` block leaves no gap between acquiring the lock and protecting the block.

    A subclass defines `acquire`, and an ``__exit__`` that is a C function.
    """

    __slots__ = ()

    if sys.version_info[:2] == (3, 14):
        _acquired: Any = property(operator.methodcaller("acquire"))

        def __enter__(self) -> Any:  # pyright: ignore[reportRedeclaration]
            return self._acquired

    else:
        __enter__: Any = property(operator.attrgetter("acquire"))


if TYPE_CHECKING or sys.version_info[:2] != (3, 14):
    Lock = threading.Lock
    RLock = threading.RLock
else:

    class Lock(Entered):
        """A `threading.Lock` that can be entered safely."""

        __slots__ = ("__weakref__", "_exit", "acquire", "locked", "release")

        __exit__ = property(operator.attrgetter("_exit"))

        def __init__(self) -> None:
            lock = _thread.allocate_lock()
            self.acquire = lock.acquire
            self.release = lock.release
            self.locked = lock.locked
            self._exit = lock.__exit__

    class RLock(Entered, _thread.RLock):
        """A `threading.RLock` that can be entered safely."""

        __slots__ = ()
