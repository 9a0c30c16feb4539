"""SharedMemoryObject: named memory that outlives its creator."""

from __future__ import annotations

import contextlib
import enum
import errno
import operator
import os
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from forkshm import _interrupts, _leaks
from forkshm.backend import kernel
from forkshm.errors import (
    NotPicklableError,
    RegionAccessError,
    RegionClosedError,
    RegionCreateError,
    RegionExistsError,
    RegionNotFoundError,
)
from forkshm.region._checks import MAX_SIZE, TOO_LARGE_A_FILE
from forkshm.region._table import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

__all__ = (
    "Creation",
    "Opened",
    "SharedMemoryObject",
    "create_only",
    "open_only",
    "open_or_create",
    "remove_on_exit",
    "reopened",
)


class Creation(enum.StrEnum):
    """Creation tags of Boost.Interprocess. Each member equals its name as a string."""

    create_only = "create_only"
    """Create the object; fail if it exists."""
    open_or_create = "open_or_create"
    """Open the object if it exists, otherwise create it."""
    open_only = "open_only"
    """Open the object; fail if it does not exist."""

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(
            f"creation must be one of {', '.join(map(repr, map(str, cls)))}, got {value!r}. The name comes second."
        )


create_only = Creation.create_only
open_or_create = Creation.open_or_create
open_only = Creation.open_only


class Opened:
    """Base class of objects opened for mapping with `MappedRegion`; they have an fd, a name and a mode."""

    _fd = -1
    _closing: Iterator[object] | None = None
    _has_kernel_fd = True

    def __init__(self, name: str, mode: Mode | str) -> None:
        self._name = name
        self._mode = checked_mode(mode)

    @_interrupts.promptly
    def _own(self, fd: int) -> None:
        """Take ownership of an fd."""
        self._fd = fd
        if _leaks.is_on:
            _leaks.made(self, f"open {type(self).__name__}")

    def _note(self) -> None:
        """Note what the fd refers to: if the program closes the fd, its number may belong to another file."""
        self._closing = kernel.closing(self._fd, kernel.file_of(self._fd))

    @_interrupts.promptly
    def __del__(self) -> None:
        self._close()

    # Default arguments, because the names of this module may be gone when the program ends.
    @_interrupts.promptly
    def _close(self, close: Any = kernel.close, close_own: Any = kernel.close_own) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._closing is None:
                close(fd)
            else:
                close_own(self._closing)

    @property
    def name(self) -> str:
        """The name or path, as given."""
        return self._name

    @property
    def mode(self) -> Mode:
        """``read_write`` or ``read_only``."""
        return self._mode

    @property
    def size(self) -> int:
        """Current size in bytes.

        Raises:
            RegionClosedError: The object was closed.
        """
        return kernel.identify(self.fileno())[1]

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the fd, which this object owns; do not close it.

        Raises:
            RegionClosedError: The object was closed.
        """
        if self._fd < 0:
            raise RegionClosedError(f"cannot use {self!r}: it was closed in this process")
        return self._fd

    @_interrupts.promptly
    def close(self) -> None:
        """Close the fd in this process. Regions mapped from the object, and its name, remain. Can be repeated."""
        self._close()
        if _leaks.is_on:
            _leaks.unmade(self)

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise NotPicklableError(
            f"cannot pickle {self!r}: plain pickle cannot carry its fd. Send it through a queue, pipe or pool of "
            "forkshm, or open it by its name in the other process."
        )

    def __repr__(self) -> str:
        state = " closed" if self._fd < 0 else ""
        return f"<{type(self).__name__} {self._name!r} {self._mode}{state}>"


class SharedMemoryObject(Opened):
    """Named memory, shared by the processes that know its name.

    A new object has size 0: set its size with `truncate`, then map it with `MappedRegion`. The memory is freed after
    the object is removed and no process has it open or mapped. It survives the end of its creator, even a kill. No
    resource tracker removes it.

    The names are those of shm_open(3): ``multiprocessing.shared_memory.SharedMemory(name)`` and the
    ``shared_memory_object`` of Boost.Interprocess open the same objects.

    Args:
        creation: ``create_only``, ``open_or_create`` or ``open_only``; see `Creation`.
        name: 1 to 255 bytes, without slash or NUL.
        mode: ``read_write`` or ``read_only``; limits the modes of regions mapped from this object.
        permissions: Permissions of a new object; by default only its owner has access.
        any_owner: Allow an object that belongs to another user. By default it is refused, because another user could
            have created it to read what you write.

    Raises:
        RegionExistsError: The object exists, and *creation* is ``create_only``.
        RegionNotFoundError: The object does not exist, and *creation* is ``open_only``.
        RegionAccessError: The permissions forbid access, or the object belongs to another user.
        RegionCreateError: The kernel refused for another reason; see ``errno``.
        ValueError: The name, the mode or the permissions are invalid.

    Fork and threads:
        Safe to use from any thread. A forked child inherits the open object.

    Example:
        >>> import os
        >>> from forkshm import MappedRegion, SharedMemoryObject
        >>> name = f"forkshm-example-{os.getpid()}"
        >>> with SharedMemoryObject("create_only", name) as shm:
        ...     shm.truncate(1000)
        ...     region = MappedRegion(shm)
        >>> region.buf[:5] = b"hello"
        >>> with SharedMemoryObject("open_only", name, "read_only") as again:
        ...     bytes(MappedRegion(again, "read_only").buf[:5])
        b'hello'
        >>> SharedMemoryObject.remove(name), SharedMemoryObject.remove(name)
        (True, False)

    See Also:
        ``shared_memory_object`` of Boost.Interprocess; shm_open(3).
    """

    def __init__(
        self,
        creation: Creation | str,
        name: str,
        mode: Mode | str = Mode.read_write,
        permissions: int = 0o600,
        *,
        any_owner: bool = False,
    ) -> None:
        creation = Creation(creation)
        super().__init__(checked_name(name), mode)
        if not 0 <= operator.index(permissions) <= 0o777:
            raise ValueError(f"permissions must be between 0 and 0o777, got {permissions:#o}")
        self._own(self._open(creation, permissions))
        try:
            self._note()
            self._check(self._fd, any_owner=any_owner)
        except BaseException:

            def undo() -> None:
                if creation is Creation.create_only:
                    self.remove(self._name)
                self.close()

            _interrupts.repeat(undo)
            raise

    def _open(self, creation: Creation, permissions: int) -> int:
        writable = self._mode is Mode.read_write
        while True:
            try:
                if creation is not Creation.open_only:
                    try:
                        return kernel.open_named(self._name, create=True, writable=writable, permissions=permissions)
                    except FileExistsError:
                        if creation is Creation.create_only:
                            raise
                return kernel.open_named(self._name, create=False, writable=writable)
            except FileNotFoundError as error:
                if creation is Creation.open_or_create:
                    continue  # the object was removed between the two attempts; the next one creates it
                raise RegionNotFoundError(
                    errno.ENOENT,
                    f"cannot open shared memory object {self._name!r}: no object of that name exists. "
                    "Create it with open_or_create, or look for its name with: python -m forkshm ls",
                ) from error
            except FileExistsError as error:
                raise RegionExistsError(
                    errno.EEXIST,
                    f"cannot create shared memory object {self._name!r}: an object of that name exists. "
                    "Open it with open_or_create, or remove it first.",
                ) from error
            except PermissionError as error:
                raise RegionAccessError(
                    error.errno or errno.EACCES,
                    f"cannot open shared memory object {self._name!r} as {self._mode}: its permissions forbid it",
                ) from error
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise RegionAccessError(
                        errno.ELOOP, f"cannot open shared memory object {self._name!r}: the name is a symbolic link"
                    ) from error
                number = error.errno or 0
                raise RegionCreateError(
                    number, f"cannot open shared memory object {self._name!r}: {os.strerror(number)}", size=0
                ) from error

    def _check(self, fd: int, *, any_owner: bool) -> None:
        if not kernel.is_regular(fd):
            raise RegionAccessError(
                errno.EACCES, f"cannot open shared memory object {self._name!r}: the name is not a memory object"
            )
        owner = None if any_owner else kernel.owner(fd)
        if owner is not None:
            raise RegionAccessError(
                errno.EPERM,
                f"cannot open shared memory object {self._name!r}: it belongs to {owner}. "
                "If you trust that owner, pass any_owner=True.",
            )

    def truncate(self, size: int) -> None:
        """Set the object's size and reserve its memory; new bytes are zero.

        Existing mappings are not checked. A process that accesses mapped bytes beyond a smaller size is killed by
        SIGBUS.

        Args:
            size: Size in bytes, at least 0.

        Raises:
            OSError: There is not enough room (``ENOSPC``). It is raised by this call and never appears as a SIGBUS
                later. The size is unchanged.
            RegionAccessError: The object was opened ``read_only``.
            ValueError: *size* is negative or larger than an object can be.
            RegionClosedError: The object was closed.
        """
        fd = self.fileno()
        size = operator.index(size)
        if not 0 <= size <= MAX_SIZE:
            raise ValueError(f"size must be between 0 and 2**63 - 1 bytes, got {size}")
        if self._mode is not Mode.read_write:
            raise RegionAccessError(
                errno.EACCES, f"cannot truncate {self!r}: it was opened read_only. Open it with mode='read_write'."
            )
        try:
            kernel.resize(fd, size)
        except OSError as error:
            number = error.errno or 0
            advice = {
                errno.ENOSPC: "its file system (/dev/shm) is full. anonymous_shared_memory() does not use it.",
                errno.EFBIG: TOO_LARGE_A_FILE,
            }.get(number, "see errno(3)")
            raise RegionCreateError(
                number, f"cannot resize {self!r} to {size:,} bytes ({os.strerror(number)}): {advice}", size=size
            ) from error

    @staticmethod
    def remove(name: str) -> bool:
        """Remove the object's name, so that it can be created again; memory in use remains.

        Returns:
            Whether an object of that name existed.

        Raises:
            RegionAccessError: The object exists, but this user may not remove it.
            ValueError: The name is invalid.
        """
        try:
            kernel.unlink_named(checked_name(name))
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise RegionAccessError(
                error.errno or errno.EACCES,
                f"cannot remove shared memory object {name!r}: it belongs to another user",
            ) from error
        except IsADirectoryError as error:
            raise RegionAccessError(
                errno.EISDIR, f"cannot remove shared memory object {name!r}: the name is a directory"
            ) from error
        return True


class remove_on_exit:  # noqa: N801 - used like a function
    """Remove the shared memory object *name* when the ``with`` block, or the program, ends.

    Use it in scripts, to state in one place which process cleans up. A forked child does not remove the object. A
    killed program does not either; call `SharedMemoryObject.remove` at the start to remove what such a run left.

    Args:
        name: As for `SharedMemoryObject`.

    Example:
        >>> from forkshm import SharedMemoryObject, remove_on_exit
        >>> with remove_on_exit("forkshm-doc-example"):
        ...     shm = SharedMemoryObject("create_only", "forkshm-doc-example")
        >>> SharedMemoryObject.remove("forkshm-doc-example")
        False

    See Also:
        ``remove_shared_memory_on_destroy`` of Boost.Interprocess.
    """

    def __init__(self, name: str) -> None:
        self.name = checked_name(name)
        self._finalizer = weakref.finalize(_program, _remove, self.name, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finalizer()


class _Program:
    """Type of an object that lives until the program exits, for finalizers that run at exit."""


_program = _Program()


def reopened(kind: type[Opened], state: dict[str, Any], take: Callable[[], int]) -> Opened:
    """Return an opened object with the attributes *state*, which owns the fd that *take* returns."""
    made = kind.__new__(kind)
    vars(made).update(state)
    made._own(take())  # in one expression, so that no handler runs in between
    made._note()
    return made


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(RegionAccessError):
            SharedMemoryObject.remove(name)


def checked_name(name: str) -> str:
    """Return *name*, or raise if it is invalid."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    if not name or name in (".", ".."):
        raise ValueError(f"name must not be {name!r}")
    if "/" in name or "\0" in name:
        raise ValueError(
            f"name must not contain a slash or NUL, got {name!r}. The leading slash of shm_open(3) is added for you."
        )
    length = len(os.fsencode(name))
    if length > 255:
        raise ValueError(f"name must have at most 255 bytes, {name[:20]!r}... has {length}")
    return name


def checked_mode(mode: Mode | str) -> Mode:
    """Return *mode*, or raise unless objects can be opened with it."""
    mode = Mode(mode)
    if mode not in (Mode.read_only, Mode.read_write):
        raise ValueError(f"mode must be read_only or read_write, got {mode}, which only MappedRegion takes")
    return mode
