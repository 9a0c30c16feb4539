"""worker(): which of several launched processes this one is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm.errors import MissingDependencyError, UnsupportedError
from forkshm.spmd._member import Member
from forkshm.spmd._team_state import TeamState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import SupportsIndex

    from forkshm.integrations.numpy import SharedArray

__all__ = ("RankedWorker", "become", "worker")


class RankedWorker(Member):
    """One of the processes of `forkshm.launch` or ``python -m forkshm run``; see `forkshm.worker`.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
    """

    def __init__(self, team_state: TeamState, rank: int, size: int) -> None:
        self._join(team_state, rank, size)

    def __repr__(self) -> str:
        return f"<Worker {self.rank} of {self.size}>"

    def array(self, key: str, shape: SupportsIndex | Sequence[SupportsIndex], dtype: Any = float) -> SharedArray:
        """Return the shared array of that name: the same memory in all workers.

        Whoever asks first makes it, all zeros; nobody waits. The memory has no name outside, and is freed when the
        last of these processes is gone.

        Args:
            key: Any name; arrays of other runs are others.
            shape: As for `forkshm.zeros`; the same in all workers.
            dtype: As for `forkshm.zeros`; the same in all workers.

        Raises:
            ValueError: Another worker asked for another shape or type under that name.
            TypeError: *dtype* has Python objects.
            MissingDependencyError: NumPy is not installed.

        Example:
            >>> import forkshm
            >>> me = forkshm.worker()
            >>> table = me.array("table", (me.size, 3))
            >>> table[me.rank] = 1
            >>> bool((me.array("table", (me.size, 3)) == table).all())
            True
        """
        try:
            from forkshm.integrations.numpy import made_in
        except ModuleNotFoundError as error:
            if error.name != "numpy":
                raise
            raise MissingDependencyError(
                "Worker.array needs NumPy: pip install 'forkshm[numpy]'", extra="numpy"
            ) from error
        team_state = self._joined_state()
        return made_in(lambda nbytes, what: team_state.memory(key, nbytes, f"an array {what}"), shape, dtype)


_current: RankedWorker | None = None


def become(worker: RankedWorker) -> None:
    """Be that worker from now on."""
    global _current
    _current = worker


def worker() -> RankedWorker:
    """Return which of several processes this one is: its rank, and how it meets the others.

    Returns:
        In a process of `forkshm.launch` or of a script that ``python -m forkshm run`` started, that process. Anywhere
        else the only one there is, with rank 0 and size 1: so a script also runs alone.

    Raises:
        UnsupportedError: This system cannot fork.

    Fork and threads:
        A process that a worker forks or starts is no worker of the run: for itself it is alone.

    Example:
        >>> import forkshm
        >>> me = forkshm.worker()
        >>> me.rank, me.size
        (0, 1)
    """
    global _current
    if not _system.CAN_FORK:
        raise UnsupportedError(
            "workers meet over memory that grows and wait by futex(2), and this system has neither: use forkshm.Pool",
            capability="growing_memory",
        )
    if _current is None or _current._pid != os.getpid():
        team_state = TeamState(1)
        team_state.enter(0)
        _current = RankedWorker(team_state, 0, 1)
    return _current
