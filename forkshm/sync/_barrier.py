"""Barrier: that of `forkshm.region`, with an action, and with the tokens of the arrived processes."""

from __future__ import annotations

import math
import multiprocessing.synchronize
import operator
from typing import TYPE_CHECKING, Any, ClassVar

from forkshm import _multiprocess, _system
from forkshm.region import Barrier as RegionBarrier
from forkshm.region.locks import HEADER, LINE, mutex_made
from forkshm.sync._slab import allocate
from forkshm.sync._word import has_died, token

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.region import MappedRegion

__all__ = ("Barrier",)

_theirs: Any = _multiprocess.synchronize
_PARTIES = 2
_TOKEN = 8


class _Parties(RegionBarrier):
    """The words in shared memory: those of the base class, then the token of each arrived process."""

    _KIND: ClassVar[int] = 18

    def __init__(self, region: MappedRegion, offset: int, parties: int) -> None:
        words = self._construct(region, offset, self.size_for(parties))
        words[_PARTIES] = parties
        mutex_made(self._address + HEADER, "Barrier")
        self._ready(parties)
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int = 0) -> _Parties:
        """Return the existing barrier at *offset*."""
        found, words = cls._find(region, offset, cls.SIZE)
        parties = words[_PARTIES]
        found._place(region, offset, cls.size_for(parties))
        found._ready(parties)
        return found

    @staticmethod
    def size_for(parties: int) -> int:
        """Return the bytes that a barrier of *parties* parties needs."""
        return HEADER + LINE + parties * _TOKEN

    def _ready(self, parties: int) -> None:
        start = self._offset + HEADER + LINE
        self._tokens = self._region.buf[start : start + parties * _TOKEN].cast("Q")

    def _sign(self, place: int) -> None:
        self._tokens[place] = token()

    def _move(self, place: int, to: int) -> None:
        self._tokens[to] = self._tokens[place]

    def _has_dead_party(self, arrived: int) -> bool:
        return any(map(has_died, set(self._tokens[:arrived])))


class Barrier(multiprocessing.synchronize.Barrier, _theirs.Barrier):  # type: ignore[misc]
    """A `multiprocessing.Barrier` in shared memory, which can be passed wherever a region can.

    When a process is killed while it waits, the barrier breaks within 0.1 s, and the others get
    `threading.BrokenBarrierError`. A process that is killed before it arrives cannot be told from a late one, so give
    a *timeout*.

    Args:
        parties: Number of threads or processes that have to arrive, at least 1.
        action: Called by the last party to arrive, before the others are released. It is sent with the barrier.
        timeout: Seconds that `wait` waits by default; None waits forever.
        ctx: Ignored; for compatibility.

    Raises:
        ValueError: *parties* is less than 1.
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        Safe to use from any thread and process.

    Example:
        >>> import forkshm
        >>> barrier = forkshm.Barrier(1)
        >>> barrier.wait(), barrier.broken
        (0, False)

    See Also:
        `multiprocessing.Barrier`; `forkshm.region.Barrier`.
    """

    def __init__(
        self, parties: int, action: Callable[[], object] | None = None, timeout: float | None = None, *, ctx: Any = None
    ) -> None:
        parties = operator.index(parties)
        if not 1 <= parties < 1 << 31:
            raise ValueError(f"parties must be between 1 and 2**31 - 1, got {parties}")
        self._action, self._timeout = action, timeout
        self._inner = _Parties(*allocate(_Parties.size_for(parties)), parties)

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self._inner._region, self._inner._offset, self._action, self._timeout)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties have arrived; return this party's arrival index.

        Args:
            timeout: Seconds, by default those of the barrier. When they have passed, the barrier is broken.

        Returns:
            The arrival index of this party, from 0 to ``parties - 1``.

        Raises:
            threading.BrokenBarrierError: The barrier is broken, was broken or reset meanwhile, or *timeout* passed.
        """
        if timeout is None:
            timeout = self._timeout
        return self._inner.wait_and_act(math.inf if timeout is None else max(timeout, 0.0), self._action)

    def reset(self) -> None:
        """Reset the barrier to empty and unbroken; waiting parties get `threading.BrokenBarrierError`."""
        self._inner.reset()

    def abort(self) -> None:
        """Break the barrier: waiting and arriving parties get `threading.BrokenBarrierError`."""
        self._inner.abort()

    @property
    def parties(self) -> int:
        """The number of parties that have to arrive."""
        return self._inner.parties

    @property
    def n_waiting(self) -> int:
        """The number of parties that have arrived and wait."""
        return self._inner.n_waiting

    @property
    def broken(self) -> bool:
        """Whether the barrier is broken, so that no party can pass until `reset`."""
        return self._inner.broken

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"waiters={self.n_waiting}/{self.parties}"
        return f"<{_system.path_of(type(self))} at {id(self):#x}: {state}>"


def _rebuild(
    kind: Any,
    region: MappedRegion,
    offset: int,
    action: Callable[[], object] | None,
    timeout: float | None,
) -> Any:
    made: Any = kind.__new__(kind)
    made._action, made._timeout = action, timeout
    made._inner = _Parties.attach(region, offset)
    return made
