"""The pipes by which parents see that their children have ended."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from forkshm.backend._interface import UNKNOWN, Identity
from forkshm.backend.posix._whole import surely

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

if TYPE_CHECKING:
    from forkshm.backend._unix import Unix


class Births:
    """The pipes by which parents see that their children have ended."""

    def __init__(self) -> None:
        # Writing ends of the pipes of children that are being forked, by thread.
        self._begun: dict[int, int] = {}
        self._here = threading.local()
        # In a child, the writing end that it holds for its parent, and what the fd refers to.
        self._own: tuple[int, Identity] = -1, UNKNOWN

    def begin(self, read_end: int, write_end: int, *, forked: bool = True) -> None:
        self._begun[write_end] = read_end
        if forked:
            self._here.write_end = write_end

    @surely
    def end(self, write_end: int) -> None:
        read_end = self._begun.pop(write_end, None)
        self._here.write_end = -1
        if read_end is not None:  # otherwise this is the child, which holds it
            os.close(read_end)
            os.close(write_end)

    def hold(self, write_end: int, file: Identity) -> None:
        self._own = write_end, file

    def in_child(self, backend: Unix) -> None:
        # A child must not hold the writing ends of its siblings or of its parent.
        mine = getattr(self._here, "write_end", -1)
        own, file = self._own
        for fd in (*self._begun, *self._begun.values(), own if backend.refers_to(own, file) else -1):
            if fd >= 0 and fd != mine:
                os.close(fd)
        self._begun.clear()
        self._own, self._here.write_end = (mine, UNKNOWN if mine < 0 else backend.file_of(mine)), -1
