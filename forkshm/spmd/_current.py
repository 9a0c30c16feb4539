"""worker(): the rank of this process among the launched ones."""

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
    """A process of `forkshm.launch` or ``python -m forkshm run``; returned by `forkshm.worker`.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, team_state: TeamState, rank: int, size: int) -> None:
        self._join(team_state, rank, size)

    def __repr__(self) -> str:
        return f"<Worker {self.rank} of {self.size}>"

    def array(self, key: str, shape: SupportsIndex | Sequence[SupportsIndex], dtype: Any = float) -> SharedArray:
        """Return the shared array named *key*: the same memory in all workers.

        The first worker to call creates the array, filled with zeros; no worker waits. The memory is anonymous and is
        freed when the last of these processes has ended.

        Args:
            key: Any name; it is local to this run.
            shape: As for `forkshm.zeros`; the same in all workers.
            dtype: As for `forkshm.zeros`; the same in all workers.

        Raises:
            ValueError: Another worker requested a different shape or type under this name.
            TypeError: *dtype* contains Python objects.
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
                "cannot create an array: NumPy is not installed. Run: pip install 'forkshm[numpy]'", extra="numpy"
            ) from error
        team_state = self._joined_state()
        return made_in(lambda nbytes, what: team_state.memory(key, nbytes, f"an array {what}"), shape, dtype)


_current: RankedWorker | None = None


def become(worker: RankedWorker) -> None:
    """Make *worker* the result of `worker` in this process."""
    global _current
    _current = worker


def worker() -> RankedWorker:
    """Return this process's rank, and the barrier and shared arrays it has in common with the other workers.

    Returns:
        The worker that this process is, if `forkshm.launch` or ``python -m forkshm run`` started it. In any other
        process, a single worker with rank 0 and size 1, so a script also runs alone.

    Raises:
        UnsupportedError: This system cannot fork.

    Fork and threads:
        A process that a worker forks or starts is not a worker of the run; there, this returns a single worker.

    Example:
        >>> import forkshm
        >>> me = forkshm.worker()
        >>> me.rank, me.size
        (0, 1)
    """
    global _current
    if not _system.CAN_FORK:
        raise UnsupportedError(
            "cannot use ranked workers: they need growing memory and futex(2), which this system lacks. Use "
            "forkshm.Pool.",
            capability="growing_memory",
        )
    if _current is None or _current._pid != os.getpid():
        team_state = TeamState(1)
        team_state.enter(0)
        _current = RankedWorker(team_state, 0, 1)
    return _current
