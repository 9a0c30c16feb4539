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

#: Of ``SemLock.kind``: 0 is recursive.
_SEMAPHORE = 1
_theirs: Any = _multiprocess.synchronize


class _LockWord(Word):
    """The word of a lock, and what is not done in machine code."""

    __slots__ = ("recursive",)

    def __init__(self, region: MappedRegion, offset: int, *, recursive: bool, new: bool) -> None:
        super().__init__(region, offset, new=new)
        self.recursive = recursive

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Acquire the lock; whether that was done in time."""
        if self.recursive and self.is_mine():
            self.state[0] += 1
            return True
        return self.take(deadline_of(block, timeout), "RLock" if self.recursive else "Lock")

    def release(self, *_: object) -> None:
        """Release the lock; arguments of ``__exit__`` are of no interest."""
        state = self.state
        if self.recursive:
            if not self.is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if state[0] > 1:
                state[0] -= 1
                return
        if self.owner == token():
            state[0] = 0
        if not self.give():
            raise ValueError("semaphore or lock released too many times")

    def __reduce__(self) -> Any:
        return _word_at, (self.region, self.offset, self.recursive)


class _Self(tuple[Any, ...]):
    """What the functions in machine code get: it makes them cross, as methods of a lock."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return core_at, self[-1]


class Core:
    """A lock in this process: all objects of one lock have the same, because it knows who holds it."""

    __slots__ = ("__weakref__", "acquire", "release", "word")

    def __init__(self, region: MappedRegion, offset: int, *, recursive: bool, new: bool = False) -> None:
        self.word = word = _LockWord(region, offset, recursive=recursive, new=new)
        self.acquire: Callable[..., bool] = word.acquire
        self.release: Callable[..., None] = word.release
        if native_locks is not None:
            token()  # known from here on, or the code would ask Python
            self.acquire, self.release = native_locks.functions(
                word.address,
                word.state_address,
                recursive,
                word.acquire,
                word.release,
                lambda items: _Self((*items, word.keep, (region, offset, recursive))),
            )

    def acquire_again(self, count: int) -> None:
        """Acquire it, and have it so often."""
        try:
            if not self.word.is_mine():
                self.acquire()
        finally:
            if self.word.is_mine():
                self.word.state[0] = count

    def release_all(self) -> None:
        """Release it, however often this thread has it."""
        self.word.state[0] = 1
        self.release()


# By address and kind. A core keeps its memory mapped, so an address is that of one lock for as long as it is here.
_cores: weakref.WeakValueDictionary[tuple[int, bool], Core] = weakref.WeakValueDictionary()


def core_at(region: MappedRegion, offset: int, recursive: bool) -> Core:
    """Return the core of a lock that was made in this process or another one."""
    key = region.address + offset, recursive
    core = _cores.get(key)
    if core is None:
        core = _cores.setdefault(key, Core(region, offset, recursive=recursive))
    return core


def _word_at(region: MappedRegion, offset: int, recursive: bool) -> Word:
    return core_at(region, offset, recursive).word


class _OwnedLock(_interrupts.Entered):
    """What `Lock` and `RLock` have in common."""

    _RECURSIVE = False

    _core: Core
    kind = _SEMAPHORE
    maxvalue = 1
    #: Of ``_multiprocessing.SemLock``: it has no name.
    name = None
    # A C function, as `Entered` asks for.
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
        # Through a channel of ours the region crosses as a descriptor; a plain pickle refuses it.
        return _rebuild, (type(self), self._core.word.region, self._core.word.offset, _extra(self))

    # -- what is asked of ``lock._semlock`` -------------------------------------------------

    @property
    def _semlock(self) -> Any:
        return self

    @property
    def handle(self) -> int:
        """Where the lock is in this process."""
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
        """Whether anybody holds it."""
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
    """Return the attributes that others have set."""
    extra = {name: value for name, value in vars(thing).items() if name not in ("_core", "acquire", "release")}
    return extra or None


def _rebuild(kind: Any, region: MappedRegion, offset: int, extra: dict[str, Any] | None) -> Any:
    made: Any = kind.__new__(kind)
    made._adopt(core_at(region, offset, kind._RECURSIVE))
    if extra:
        vars(made).update(extra)
    return made


class Lock(_OwnedLock, multiprocessing.synchronize.Lock, _theirs.Lock):  # type: ignore[misc]
    """A `multiprocessing.Lock` in shared memory, which crosses everywhere, and survives its holder.

    When a process is killed while it holds the lock, the next one that acquires it gets it, with a
    `forkshm.ForkshmWarning` that names the dead process: what the lock guards may be half changed.

    It may be released by another thread or process than the one that acquired it. The lock is the process's that
    acquired it until then: if that one ends, however it does, before anybody releases the lock, it is free for the
    next one.

    Raises:
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        Safe to use from any thread and process. A forked child does not have what its parent holds, and may release
        it. In a ``with`` block, KeyboardInterrupt leaves it released.

    Example:
        >>> import forkshm
        >>> lock = forkshm.Lock()
        >>> with lock:
        ...     lock.acquire(block=False)
        False

    See Also:
        `multiprocessing.Lock`; `forkshm.region.Mutex`, which lives in a region of yours and calls you to repair what it
        guards.
    """

    def __repr__(self) -> str:
        try:
            name = self._owner_name()
        except Exception:
            name = "unknown"
        return f"<{type(self).__name__}(owner={name})>"


class RLock(_OwnedLock, multiprocessing.synchronize.RLock, _theirs.RLock):  # type: ignore[misc]
    """A `multiprocessing.RLock` in shared memory: a `Lock` that a thread may acquire again while it has it.

    Only the thread that has it may release it. Otherwise it is as `Lock`.

    Raises:
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        As for `Lock`. However often it was held by a process that was killed, the next one has it once.

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
