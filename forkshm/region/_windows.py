"""WindowsSharedMemory: native sections of Windows."""

from __future__ import annotations

import errno
import operator
from typing import TYPE_CHECKING, NoReturn

from forkshm.backend import kernel
from forkshm.errors import (
    RegionAccessError,
    RegionCreateError,
    RegionExistsError,
    RegionNotFoundError,
    UnsupportedError,
)
from forkshm.region._mapped import checked_size
from forkshm.region._object import Creation, Opened
from forkshm.region._table import Mode

if TYPE_CHECKING:
    from typing import Self

__all__ = ("WindowsSharedMemory",)

_SCOPES = ("Local\\", "Global\\")
# Whether those of other users may read, or read and write.
_PERMISSIONS = (0o600, 0o644, 0o666)


class WindowsSharedMemory(Opened):
    r"""Memory backed by the paging file of Windows, with a name or without.

    Its size is fixed when it is created; it is gone with the last process that has it
    open or mapped. Unlike with Boost.Interprocess, the opener learns the size.

    Args:
        creation: ``create_only``, ``open_or_create`` or ``open_only``; see `Creation`.
        name: A name, with ``Local\`` or ``Global\`` in front where it matters, or None
            for memory that only handles reach. A name is one for the session (``Local\``),
            unless it begins with ``Global\``; to create one of those takes a privilege.
        mode: ``read_only``, ``read_write`` or ``copy_on_write``: what the object may be mapped for.
        size: Bytes, at least 1; only to create.
        permissions: Of a new object: 0o600, which is the default, lets nobody in but its
            owner, 0o644 others read, and 0o666 others write.

    Raises:
        RegionExistsError: ``create_only``, and the name is taken.
        RegionNotFoundError: ``open_only``, and there is no such memory.
        RegionAccessError: The permissions do not allow it, or something else has that name.
        RegionCreateError: The kernel refused otherwise, see ``errno``: ``ENOMEM`` when the paging file is too small.
        ValueError: The name, the mode, the size or the permissions are not allowed ones.
        UnsupportedError: This system has no such memory. Use `anonymous_shared_memory`
            for memory without a name, `SharedMemoryObject` for memory with one: both
            work everywhere.

    Fork and threads:
        Safe to use from any thread.

    See Also:
        ``windows_shared_memory`` of Boost.Interprocess; ``CreateFileMappingW``.
    """

    _name: str | None  # type: ignore[assignment]
    _size = 0

    def __init__(
        self,
        creation: Creation | str,
        name: str | None,
        mode: Mode | str = Mode.read_write,
        size: int | None = None,
        permissions: int | None = None,
    ) -> None:
        creation, mode = Creation(creation), Mode(mode)
        if kernel.name != "windows":
            self._refuse()
        self._name, self._mode = name, mode
        _check_name(name, creation)
        if mode is Mode.read_private:
            raise ValueError("mode must be read_only, read_write or copy_on_write, got read_private")
        permissions = _PERMISSIONS[0] if permissions is None else operator.index(permissions)
        if permissions not in _PERMISSIONS:
            raise ValueError(f"permissions must be 0o600, 0o644 or 0o666, got {permissions:#o}")
        if creation is Creation.open_only:
            if size is not None:
                raise ValueError(f"size is for creating, and open_only was asked for; got {size!r}")
        elif size is None:
            raise ValueError(f"size is needed: {creation} may create the memory, and its size is fixed then")
        else:
            size = checked_size(size)
        fd = self._open_or_create(creation, size or 0, permissions)
        try:
            self._size = kernel.identify(fd)[1]
        except BaseException:
            kernel.close(fd)
            raise
        self._own(fd)

    def _open_or_create(self, creation: Creation, size: int, permissions: int) -> int:
        writable = self._mode is Mode.read_write
        what = f"shared memory {self._name!r}" if self._name else "shared memory without a name"
        try:
            if creation is Creation.open_only:
                return kernel.open_section(self._name or "", writable=writable)
            fd, was_there = kernel.create_section(size, self._name, permissions)
            if was_there and creation is Creation.create_only:
                kernel.close(fd)
                raise RegionExistsError(
                    errno.EEXIST,
                    f"cannot create {what}: there is memory of that name already; open it with open_or_create",
                )
            if writable:
                return fd
            try:
                return kernel.read_only(fd)
            finally:
                kernel.close(fd)
        except RegionExistsError:
            raise
        except FileNotFoundError as error:
            raise RegionNotFoundError(errno.ENOENT, f"cannot open {what}: there is none of that name") from error
        except OSError as error:
            number = error.errno or 0
            if number in (errno.EACCES, errno.EPERM):
                reason = "its permissions forbid it, or Global names take a privilege that this process has not"
                raise RegionAccessError(number, f"cannot open {what} as {self._mode}: {reason}") from error
            if number == errno.EBADF:
                raise RegionAccessError(number, f"cannot open {what}: something else has that name") from error
            advice = "the paging file is too small" if number == errno.ENOMEM else "see the error number"
            raise RegionCreateError(
                number, f"cannot create {what} of {size:,} bytes ({error.strerror}): {advice}", size=size
            ) from error

    @staticmethod
    def _refuse() -> NoReturn:
        raise UnsupportedError(
            "WindowsSharedMemory exists on Windows only: use anonymous_shared_memory() for memory without a name, "
            "or SharedMemoryObject for memory with one",
            capability="windows_sections",
        )

    def _here(self) -> None:
        if kernel.name != "windows":
            self._refuse()

    @property
    def name(self) -> str | None:  # type: ignore[override]
        """The name, as given."""
        self._here()
        return self._name

    @property
    def mode(self) -> Mode:
        """As given."""
        self._here()
        return self._mode

    @property
    def size(self) -> int:
        """Bytes, as asked for when it was created; whole pages if that was not done by forkshm."""
        self._here()
        return self._size

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        self._here()
        return super().closed

    def fileno(self) -> int:
        """Return the handle, which stays the object's."""
        self._here()
        return super().fileno()

    def close(self) -> None:
        """Close the handle. Regions made from it stay."""
        self._here()
        super().close()

    def __enter__(self) -> Self:
        self._here()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        self._here()
        super().__exit__()


def _check_name(name: str | None, creation: Creation) -> None:
    if name is None:
        if creation is Creation.open_only:
            raise ValueError("name must be given: memory without one cannot be opened, only handed on")
        return
    if not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {name!r}")
    rest = name
    for scope in _SCOPES:
        rest = rest.removeprefix(scope)
    if not rest or "\\" in rest or "\0" in rest or len(name) > 255:
        raise ValueError(
            f"name must have 1 to 255 characters, with no NUL and no backslash but in Local\\ or Global\\, got {name!r}"
        )
