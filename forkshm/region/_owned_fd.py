"""An fd that has an owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm.backend import Identity

__all__ = ("OwnedFd",)


class OwnedFd:
    """An fd that is closed with its owner."""

    fd = -1
    # See `own`.
    _file: Identity | None = None
    _closing: Iterator[object] | None = None

    @_interrupts.promptly
    def __init__(self, fd: int = -1) -> None:
        self.fd = fd

    def own(self) -> None:
        """Note what the fd refers to, so that `close` closes nothing else. Long-lived owners call this.

        A program may close fds that it did not open, and the numbers then belong to its own files.
        """
        file = kernel.file_of(self.fd)
        closing = kernel.closing(self.fd, file)
        # No call between these stores.
        self._file, self._closing = file, closing

    def is_intact(self) -> bool:
        """Return whether the fd still refers to what `own` has noted."""
        return self.fd >= 0 and self._file is not None and kernel.refers_to(self.fd, self._file)

    # Default arguments, because the names of this module may be gone when the program ends.
    @_interrupts.promptly
    def close(self, close: Any = kernel.close, close_own: Any = kernel.close_own) -> None:
        """Close the fd. Closing twice is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            if self._closing is None:
                close(fd)
            else:
                close_own(self._closing)

    @_interrupts.promptly
    def __del__(self) -> None:
        self.close()
