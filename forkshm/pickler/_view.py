"""view(): the mode in which a receiver maps the memory of one argument."""

from __future__ import annotations

from typing import Any

from forkshm.region import Mode

__all__ = ("View", "view")


class View:
    """A value to send, and the mode in which its memory arrives; see `view`."""

    __slots__ = ("mode", "value")

    def __init__(self, value: Any, mode: Mode) -> None:
        self.value = value
        self.mode = mode

    def __repr__(self) -> str:
        return f"<View {self.mode} of {type(self.value).__name__}>"

    def __reduce__(self) -> Any:
        # For plain pickle. In forkshm's pickler the value arrives without this wrapper.
        return View, (self.value, self.mode)


def view(value: Any, mode: Mode | str) -> View:
    """Return a wrapper that defines what the receiver of *value* may do with its memory. Pass it in place of the value.

    The receiver gets the value itself, without the wrapper. The mode applies to all arrays and buffers in it.

    Args:
        value: Anything that can be sent, such as an array, a region, or an object that contains some.
        mode: One of these:

            - ``read_only``: The receiver cannot write; the kernel enforces this for shared memory.
            - ``read_write``: All processes see what the receiver writes. The memory must be shared. This is the
              default for shared memory.
            - ``copy_on_write``: The receiver may write, and nobody else sees it. This is the default for memory that
              is not shared.
            - ``read_private``: As ``read_only``, but the memory is mapped privately.

    Returns:
        A wrapper for sending. It keeps *value* alive.

    Raises:
        ValueError: There is no such mode.
        RegionAccessError: Raised when it is sent: *mode* is ``read_write``, and the memory is private, mapped
            ``read_only``, or sealed.

    Fork and threads:
        Nothing happens until the wrapper is sent. An object that is in a message twice arrives once, in the mode of
        its first occurrence.

    Example:
        >>> import forkshm
        >>> a = forkshm.zeros(3)
        >>> def is_writeable(array):
        ...     return array.flags.writeable
        >>> with forkshm.Pool(1) as pool:
        ...     pool.map(is_writeable, [a, view(a, "read_only")])
        [True, False]
    """
    return View(value, Mode(mode))


class Begin:
    """Marks in the stream that the following buffers are sent in this mode."""

    __slots__ = ("mode",)

    def __init__(self, mode: Mode) -> None:
        self.mode = mode


class End:
    """Marks in the stream that the mode of the last `Begin` ends."""

    __slots__ = ()


def second(_: Any, value: Any, __: Any) -> Any:
    """Return the value that stands between two marks of the stream."""
    return value
