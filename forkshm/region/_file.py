"""FileMapping: a file opened for mapping."""

from __future__ import annotations

import errno
import os

from forkshm.backend import kernel
from forkshm.errors import RegionAccessError, RegionCreateError, RegionNotFoundError
from forkshm.region._object import Opened
from forkshm.region._table import Mode

__all__ = ("FileMapping",)


class FileMapping(Opened):
    """An existing file, opened for mapping with `MappedRegion`.

    Closing it closes the file; regions mapped from it remain. Writes to a ``read_write`` region change the file;
    `MappedRegion.flush` waits until they are on disk.

    Args:
        path: Path of an existing regular file.
        mode: ``read_write`` or ``read_only``.

    Raises:
        RegionNotFoundError: The file does not exist.
        RegionAccessError: The file's permissions do not allow *mode*.
        RegionCreateError: The file is not a regular file, or the kernel refused for another reason.

    Example:
        >>> import pathlib, tempfile
        >>> from forkshm import FileMapping, MappedRegion
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "data"
        >>> _ = path.write_bytes(b"hello world")
        >>> with FileMapping(path) as file, MappedRegion(file, "read_write", offset=6) as region:
        ...     region.buf[:] = b"there"
        ...     region.flush()
        >>> path.read_bytes()
        b'hello there'
        >>> FileMapping.remove(path)
        True

    See Also:
        ``file_mapping`` of Boost.Interprocess.
    """

    def __init__(self, path: str | os.PathLike[str], mode: Mode | str = Mode.read_write) -> None:
        super().__init__(os.fspath(path), mode)
        try:
            fd = kernel.open_file(self._name, writable=self._mode is Mode.read_write)
        except FileNotFoundError as error:
            raise RegionNotFoundError(errno.ENOENT, f"cannot map file {self._name!r}: it does not exist") from error
        except PermissionError as error:
            raise RegionAccessError(
                error.errno or errno.EACCES,
                f"cannot map file {self._name!r} as {self._mode}: its permissions forbid it",
            ) from error
        except OSError as error:
            number = error.errno or 0
            raise RegionCreateError(
                number, f"cannot map file {self._name!r} as {self._mode}: {os.strerror(number)}", size=0
            ) from error
        self._own(fd)
        self._note()
        if not kernel.is_regular(fd):
            self.close()
            raise RegionCreateError(errno.ENODEV, f"cannot map {self._name!r}: it is not a regular file", size=0)

    @staticmethod
    def remove(path: str | os.PathLike[str]) -> bool:
        """Delete the file, and return whether it existed and could be deleted."""
        try:
            os.remove(path)
        except OSError:
            return False
        return True
