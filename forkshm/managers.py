"""The module ``multiprocessing.managers`` for forkshm; other names are those of ``multiprocess``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.channel.manager import Accepting, BaseManager
from forkshm.pool.manager import SyncManager
from forkshm.region import SharedMemoryObject, family

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.managers import BaseProxy, Token

    from forkshm.shared_memory import ShareableList, SharedMemory

__all__ = ("BaseManager", "BaseProxy", "SharedMemoryManager", "SyncManager", "Token")

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("managers", globals())

_theirs: Any = _multiprocess.managers


class _Names(_theirs._SharedMemoryTracker):  # type: ignore[misc]
    """The names that a manager removes when it is shut down."""

    def destroy_segment(self, segment_name: str) -> None:
        """Remove a name now."""
        self.segment_names.remove(segment_name)
        SharedMemoryObject.remove(segment_name)


class _Server(Accepting, _theirs.SharedMemoryServer):  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # A list of its own, because the standard library's list is shared by all servers.
        self.shared_memory_context = _Names(f"shm_{self.address}", [])


class SharedMemoryManager(BaseManager, _theirs.SharedMemoryManager):  # type: ignore[misc]
    """A manager of named shared memory, with the interface of ``multiprocessing.managers.SharedMemoryManager``.

    Its names are removed when it is shut down, and at the latest when the first process of the family ends.

    Args:
        args: Arguments of `BaseManager`.
        options: Keyword arguments of `BaseManager`.

    Raises:
        OSError: The kernel refused the process.

    Example:
        >>> from forkshm.managers import SharedMemoryManager
        >>> with SharedMemoryManager() as manager:
        ...     list(manager.ShareableList([1, "two"]))
        [1, 'two']
    """

    _Server = _Server

    def __del__(self) -> None:
        """Do nothing: the base class logs, by names that are gone when the program ends."""

    @staticmethod
    def _finalize_manager(process: Any, *rest: Any) -> None:
        try:
            BaseManager._finalize_manager(process, *rest)
        finally:
            family.forget_removed()

    def SharedMemory(self, size: int) -> SharedMemory:  # noqa: N802 - the standard library's name
        """Return new memory of *size* bytes; see `forkshm.shared_memory.SharedMemory`."""
        from forkshm.shared_memory import SharedMemory

        self._check_started()
        made = SharedMemory(create=True, size=size)
        self._track(made)
        return made

    def ShareableList(self, sequence: Iterable[Any]) -> ShareableList:  # noqa: N802
        """Return a new list; see `forkshm.shared_memory.ShareableList`."""
        from forkshm.shared_memory import ShareableList

        self._check_started()
        made = ShareableList(sequence)
        self._track(made.shm)
        return made

    def _check_started(self) -> None:
        if self._state.value != _theirs.State.STARTED:
            raise ValueError(f"cannot create shared memory with {self!r}: it is not running. Use it in a with block.")

    def _track(self, memory: Any) -> None:
        try:
            with self._Client(self._address, authkey=self._authkey) as connection:
                _theirs.dispatch(connection, None, "track_segment", (memory.name,))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                memory.unlink()
            raise
