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
from forkshm.region._checks import checked_size
from forkshm.region._object import Creation, Opened
from forkshm.region._table import Mode

if TYPE_CHECKING:
    from typing import Self

__all__ = ("WindowsSharedMemory",)

_SCOPES = ("Local\\", "Global\\")
# Permissions for other users: none, to read, or to read and write.
_PERMISSIONS = (0o600, 0o644, 0o666)


class WindowsSharedMemory(Opened):
    r"""Memory backed by the paging file of Windows, with or without a name.

    The size is fixed at creation. The memory is freed when no process has it open or mapped. Unlike in
    Boost.Interprocess, opening the memory reports its size.

    Args:
        creation: ``create_only``, ``open_or_create`` or ``open_only``; see `Creation`.
        name: A name, or None for memory that is reached only through its handle. A name is valid in the session, unless
            it begins with ``Global\``; creating a global name requires a privilege. ``Local\`` may also be written out.
        mode: ``read_only``, ``read_write`` or ``copy_on_write``; limits the modes of regions mapped from this object.
        size: Number of bytes, at least 1; only for creation.
        permissions: Permissions of a new object. With 0o600, the default, only its owner has access; with 0o644 other
            users may read, and with 0o666 also write.

    Raises:
        RegionExistsError: The name exists, and *creation* is ``create_only``.
        RegionNotFoundError: The name does not exist, and *creation* is ``open_only``.
        RegionAccessError: The permissions forbid access, or the name is that of another kind of object.
        RegionCreateError: The kernel refused for another reason; see ``errno``. ``ENOMEM`` means that the paging file
            is too small.
        ValueError: The name, the mode, the size or the permissions are invalid.
        UnsupportedError: This system is not Windows. `anonymous_shared_memory`, for memory without a name, and
            `SharedMemoryObject`, for memory with a name, work on every system.

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
                raise ValueError(f"size must not be given with open_only, because memory keeps its size; got {size!r}")
        elif size is None:
            raise ValueError(f"size must be given with {creation}, because the size is fixed at creation")
        else:
            size = checked_size(size)
        self._own(self._open_or_create(creation, size or 0, permissions))
        self._size = kernel.identify(self._fd)[1]

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
                    f"cannot create {what}: memory of that name exists. Open it with open_or_create.",
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
            raise RegionNotFoundError(errno.ENOENT, f"cannot open {what}: no memory of that name exists") from error
        except OSError as error:
            number = error.errno or 0
            if number in (errno.EACCES, errno.EPERM):
                reason = "its permissions forbid it, or this process lacks the privilege for Global names"
                raise RegionAccessError(number, f"cannot open {what} as {self._mode}: {reason}") from error
            if number == errno.EBADF:
                raise RegionAccessError(number, f"cannot open {what}: another kind of object has that name") from error
            advice = "the paging file is too small" if number == errno.ENOMEM else "see the error number"
            raise RegionCreateError(
                number, f"cannot create {what} of {size:,} bytes ({error.strerror}): {advice}", size=size
            ) from error

    @staticmethod
    def _refuse() -> NoReturn:
        raise UnsupportedError(
            "cannot use WindowsSharedMemory: it exists on Windows only. Use anonymous_shared_memory() for memory "
            "without a name, or SharedMemoryObject for memory with a name.",
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
        """Number of bytes, as given at creation; rounded up to whole pages if another program created the memory."""
        self._here()
        return self._size

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        self._here()
        return super().closed

    def fileno(self) -> int:
        """Return the handle, which the object owns."""
        self._here()
        return super().fileno()

    def close(self) -> None:
        """Close the handle. Regions made from the object remain."""
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
            raise ValueError("name must be given with open_only: memory without a name cannot be opened, only sent")
        return
    if not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {name!r}")
    rest = name
    for scope in _SCOPES:
        rest = rest.removeprefix(scope)
    if not rest or "\\" in rest or "\0" in rest or len(name) > 255:
        raise ValueError(
            f"name must have 1 to 255 characters, no NUL, and no backslash except in Local\\ or Global\\; got {name!r}"
        )
