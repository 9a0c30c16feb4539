"""Lock and RLock."""

from __future__ import annotations

import multiprocessing.synchronize
import operator
import threading
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess
from forkshm.backend import native_locks
from forkshm.sync._slab import allocate
from forkshm.sync._word import SIZE, Word, deadline_of, token

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.region import MappedRegion

__all__ = ("Core", "Lock", "RLock")

# Values of ``SemLock.kind``: 0 is recursive.
_SEMAPHORE = 1
_theirs: Any = _multiprocess.synchronize


class _LockWord(Word):
    """The word of a lock, and the operations that are not done in machine code."""

    __slots__ = ("recursive",)

    def __init__(self, region: MappedRegion, offset: int, *, recursive: bool, new: bool) -> None:
        super().__init__(region, offset, new=new)
        self.recursive = recursive

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Acquire the lock; return whether that succeeded in time."""
        if self.recursive and self.is_mine():
            self.state[0] += 1
            return True
        return self.take(deadline_of(block, timeout), "RLock" if self.recursive else "Lock")

    @_interrupts.promptly
    def release(self, *_: object) -> None:
        """Release the lock; ignore the arguments of ``__exit__``. It takes effect whatever a signal handler raises."""
        try:
            is_last = self._is_last()
        except AssertionError:
            raise
        except BaseException:
            if self._is_last():
                self.give()
            raise
        if is_last and not self.give():
            raise ValueError("semaphore or lock released too many times")

    def _is_last(self) -> bool:
        """Return whether the word has to be changed; otherwise count one acquisition less. Repeat it if it raises."""
        state = self.state
        if self.recursive:
            if not self.is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if state[0] > 1:
                state[0] -= 1
                return False
            state[0] = 0
        elif self.owner == token():
            state[0] = 0
        # No call since the last store, so what was interrupted was not done.
        return True

    def __reduce__(self) -> Any:
        return _word_at, (self.region, self.offset, self.recursive)


class _Self(tuple[Any, ...]):
    """The *self* of the machine-code functions, which lets them be sent as methods of a lock."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return core_at, self[-1]


class Core:
    """The state of a lock in this process, shared by all objects of the lock: it knows which thread holds it."""

    __slots__ = ("__weakref__", "acquire", "release", "word")

    def __init__(self, region: MappedRegion, offset: int, *, recursive: bool, new: bool = False) -> None:
        self.word = word = _LockWord(region, offset, recursive=recursive, new=new)
        self.acquire: Callable[..., bool] = word.acquire
        self.release: Callable[..., None] = word.release
        if native_locks is not None:
            token()  # computed now, or the machine code would have to call Python
            self.acquire, self.release = native_locks.functions(
                word.address,
                word.state_address,
                recursive,
                word.acquire,
                word.release,
                lambda items: _Self((*items, word.keep, (region, offset, recursive))),
            )

    def acquire_again(self, count: int) -> None:
        """Acquire the lock, and set its recursion count."""
        try:
            if not self.word.is_mine():
                self.acquire()
        finally:
            if self.word.is_mine():
                self.word.state[0] = count

    def release_all(self) -> None:
        """Release the lock, whatever its recursion count."""
        self.word.state[0] = 1
        self.release()


# Keyed by address and kind. A core keeps its memory mapped, so its address belongs to one lock while the core lives.
_cores: weakref.WeakValueDictionary[tuple[int, bool], Core] = weakref.WeakValueDictionary()


def core_at(region: MappedRegion, offset: int, recursive: bool) -> Core:
    """Return the core of a lock that was created in this process or in another."""
    key = region.address + offset, recursive
    core = _cores.get(key)
    if core is None:
        core = _cores.setdefault(key, Core(region, offset, recursive=recursive))
    return core


def _word_at(region: MappedRegion, offset: int, recursive: bool) -> Word:
    return core_at(region, offset, recursive).word


class _OwnedLock(_interrupts.Entered):
    """The common base of `Lock` and `RLock`."""

    _RECURSIVE = False

    _core: Core
    kind = _SEMAPHORE
    maxvalue = 1
    # An attribute of ``_multiprocessing.SemLock``; this lock has no name.
    name = None
    # `Entered` needs a C function.
    __exit__ = property(operator.attrgetter("release"))

    def __init__(self, *, ctx: Any = None) -> None:
        region, offset = allocate(SIZE)
        core = Core(region, offset, recursive=self._RECURSIVE, new=True)
        _cores[core.word.address, self._RECURSIVE] = core
        self._adopt(core)

    def _adopt(self, core: Core) -> None:
        self._core = core
        self.acquire = core.acquire
        self.release = core.release

    def __reduce__(self) -> Any:
        # A forkshm channel sends the region as a descriptor; plain pickle refuses it.
        return _rebuild, (type(self), self._core.word.region, self._core.word.offset, _extra(self))

    # -- the interface of ``lock._semlock`` ------------------------------------------------

    @property
    def _semlock(self) -> Any:
        return self

    @property
    def handle(self) -> int:
        """The address of the lock in this process."""
        return self._core.word.address

    def _is_mine(self) -> bool:
        return self._core.word.is_mine()

    def _count(self) -> int:
        return self._core.word.count()

    def _get_value(self) -> int:
        return int(self._core.word.owner == 0)

    def _is_zero(self) -> bool:
        return self._core.word.owner != 0

    def locked(self) -> bool:
        """Return whether any process holds the lock."""
        return self._core.word.owner != 0

    def _owner_name(self) -> str:
        word = self._core.word
        if word.is_mine():
            name = str(_multiprocess.process.current_process().name)
            thread = threading.current_thread().name
            return name if thread == "MainThread" else f"{name}|{thread}"
        if word.owner == 0:
            return "None"
        return "SomeOtherThread" if word.count() else "SomeOtherProcess"


def _extra(thing: Any) -> dict[str, Any] | None:
    """Return the attributes that users have set, or None."""
    extra = {name: value for name, value in vars(thing).items() if name not in ("_core", "acquire", "release")}
    return extra or None


def _rebuild(kind: Any, region: MappedRegion, offset: int, extra: dict[str, Any] | None) -> Any:
    made: Any = kind.__new__(kind)
    made._adopt(core_at(region, offset, kind._RECURSIVE))
    if extra:
        vars(made).update(extra)
    return made


class Lock(_OwnedLock, multiprocessing.synchronize.Lock, _theirs.Lock):  # type: ignore[misc]
    """A `multiprocessing.Lock` in shared memory. It can be passed wherever a region can, and survives its holder.

    When a process is killed while it holds the lock, the next process that acquires it gets it, with a
    `forkshm.ForkshmWarning` that names the dead process: the data that the lock guards may be half changed.

    Any thread or process may release the lock. Until then it belongs to the process that acquired it. If that process
    ends in any way before the lock is released, the lock is free for the next process.

    Raises:
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        Safe to use from any thread and process. A forked child does not hold its parent's locks, but may release
        them. KeyboardInterrupt in a ``with`` block leaves the lock released.

    Example:
        >>> import forkshm
        >>> lock = forkshm.Lock()
        >>> with lock:
        ...     lock.acquire(block=False)
        False

    See Also:
        `multiprocessing.Lock`; `forkshm.region.Mutex`, which lives in your own region and calls your code to repair
        the data it guards.
    """

    def __repr__(self) -> str:
        try:
            name = self._owner_name()
        except Exception:
            name = "unknown"
        return f"<{type(self).__name__}(owner={name})>"


class RLock(_OwnedLock, multiprocessing.synchronize.RLock, _theirs.RLock):  # type: ignore[misc]
    """A `multiprocessing.RLock` in shared memory: a `Lock` that a thread may acquire again while it holds it.

    Only the thread that holds it may release it. Otherwise it behaves like `Lock`.

    Raises:
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        As for `Lock`. After the death of a process that held it several times, the next process holds it once.

    Example:
        >>> import forkshm
        >>> lock = forkshm.RLock()
        >>> with lock, lock:
        ...     lock
        <RLock(MainProcess, 2)>

    See Also:
        `multiprocessing.RLock`; `forkshm.region.RecursiveMutex`.
    """

    _RECURSIVE = True
    kind = 0

    def __repr__(self) -> str:
        try:
            name = self._owner_name()
            count: object = {"None": 0, "SomeOtherThread": "nonzero", "SomeOtherProcess": "nonzero"}.get(
                name, self._count()
            )
        except Exception:
            name = count = "unknown"
        return f"<{type(self).__name__}({name}, {count})>"
