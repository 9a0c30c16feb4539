"""WindowsSharedMemory: native sections of Windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from forkshm.errors import UnsupportedError
from forkshm.region._object import Creation
from forkshm.region._table import Mode

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ("WindowsSharedMemory",)


class WindowsSharedMemory:
    r"""Memory backed by the paging file of Windows, with a name or without.

    Its size is fixed when it is created; it is gone with the last process that has it
    open or mapped. Unlike with Boost.Interprocess, the opener learns the size.

    Args:
        creation: ``create_only``, ``open_or_create`` or ``open_only``; see `Creation`.
        name: A name, with ``Local\`` or ``Global\`` in front where it matters, or None
            for memory that only handles reach.
        mode: ``read_only``, ``read_write`` or ``copy_on_write``.
        size: Bytes, at least 1; only to create.
        permissions: Of a new object; None for nobody but its owner.

    Raises:
        UnsupportedError: This system has no such memory. Use `anonymous_shared_memory`
            for memory without a name, `SharedMemoryObject` for memory with one: both
            work everywhere.

    See Also:
        ``windows_shared_memory`` of Boost.Interprocess; ``CreateFileMappingW``.
    """

    def __init__(
        self,
        creation: Creation | str,
        name: str | None,
        mode: Mode | str = Mode.read_write,
        size: int | None = None,
        permissions: int | None = None,
    ) -> None:
        Creation(creation)
        Mode(mode)
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise UnsupportedError(
            "WindowsSharedMemory exists on Windows only: use anonymous_shared_memory() for memory without a name, "
            "or SharedMemoryObject for memory with one",
            capability="windows_sections",
        )

    @property
    def name(self) -> str | None:
        """The name, as given."""
        self._refuse()

    @property
    def mode(self) -> Mode:
        """As given."""
        self._refuse()

    @property
    def size(self) -> int:
        """Bytes, as asked for when it was created."""
        self._refuse()

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        self._refuse()

    def fileno(self) -> int:
        """Return the handle, which stays the object's."""
        self._refuse()

    def close(self) -> None:
        """Close the handle. Regions made from it stay."""
        self._refuse()

    def __enter__(self) -> Self:
        self._refuse()

    def __exit__(self, *_: object) -> None:
        self._refuse()
