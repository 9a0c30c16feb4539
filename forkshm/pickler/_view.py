"""view(): what the receiver may do with the memory of one argument."""

from __future__ import annotations

from typing import Any

from forkshm.region import Mode

__all__ = ("View", "view")


class View:
    """A value on its way, and the mode in which its memory arrives; see `view`."""

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
    """Return a wrapper that says what the receiver of *value* may do with its memory. Pass it in place of the value.

    The receiver gets the value itself: an array, a region, or any object that holds some;
    the mode is that of all arrays and buffers in it.

    Args:
        value: Anything that can be sent.
        mode: ``read_only``: the receiver cannot write, the kernel sees to it where the
            memory is shared. ``read_write``: what it writes is seen by all; the memory has
            to be shared, and is so by default. ``copy_on_write``: it may write, and nobody
            else sees that; by default so for memory that is not shared. ``read_private``:
            as ``read_only``, but the memory is mapped privately.

    Returns:
        A wrapper for sending. It keeps *value* alive.

    Raises:
        ValueError: There is no such mode.
        RegionAccessError: When it is sent: ``read_write`` was asked for, and the memory is
            private, or mapped ``read_only``, or sealed.

    Fork and threads:
        Nothing is done until it is sent. An object that is in a message twice arrives once,
        in the mode that comes first.

    Example:
        >>> import forkshm
        >>> a = forkshm.zeros(3)
        >>> def is_writeable(array):
        ...     return array.flags.writeable
        >>> with forkshm.Pool(1) as pool:
        ...     pool.apply(is_writeable, (a,)), pool.apply(is_writeable, (view(a, "read_only"),))
        (True, False)
    """
    return View(value, Mode(mode))


class Begin:
    """In the stream: from here on buffers are sent in that mode."""

    __slots__ = ("mode",)

    def __init__(self, mode: Mode) -> None:
        self.mode = mode


class End:
    """In the stream: as before the last `Begin`."""

    __slots__ = ()


def second(_: Any, value: Any, __: Any) -> Any:
    """Return what stands between two marks of the stream."""
    return value
