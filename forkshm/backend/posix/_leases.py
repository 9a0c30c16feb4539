"""Leases on bytes of memory objects, and counters that processes share."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from typing import TYPE_CHECKING

from forkshm import _interrupts
from forkshm.backend._interface import Identity
from forkshm.backend.posix._whole import surely, whole

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._unix import Unix, seek_noted  # noqa: E402 - after the platform check
from forkshm.backend.posix._objects import Objects  # noqa: E402
from forkshm.backend.posix._waiting import has_hung_up  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


# Stands for the creator of a segment, which the label names: it holds this position while it lives.
_CREATOR = 2**62
# Seconds to wait for a busy counter, which is free again after some microseconds.
_COUNT_PAUSE = 0.00005


class Leases(Objects):
    """The part of the backend that holds bytes by pipes, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self._counting = _interrupts.RLock()

    @whole
    def lock_shared(self, fd: int, position: int) -> None:
        if position == _CREATOR:
            self._sign(fd)
            return
        if self.companion(fd, position) is not None:
            return
        if (own := self.made_by(fd)) is not None:
            self._objects[own].held.add(position)
            return
        identity, _ = self.identify(fd)
        made = self._objects.get(identity)
        for other in self._others(fd, position, identity):
            self.attach(fd, position, Unix.duplicate(self, other))
            return
        if made is None:  # a process that did not create the object holds only bytes lent to it
            raise OSError(errno.EACCES, f"no description in this process holds byte {position} of fd {fd}")
        read_end, write_end = self._pipe()
        made.lent.setdefault(position, []).append(self.noted(read_end))
        self.attach(fd, position, write_end)

    @surely
    def unlock(self, fd: int, position: int) -> None:
        if (own := self.made_by(fd)) is not None:
            self._objects[own].held.discard(position)
        companions = self.companions_of(fd)
        for found in [found for found in companions if found.what == position]:
            companions.remove(found)
            self.close_noted(found.noted)
            self._no_holder(fd, position)
        if not companions:
            self._companions.pop(fd, None)

    @whole
    def is_held(self, fd: int, position: int) -> bool:
        if position == _CREATOR:
            label = self._label(fd, os.fstat(fd))
            return label is not None and label[4] != 0 and self.is_running(label[4])
        identity = self.made_by(fd) or self.identify(fd)[0]
        made = self._objects.get(identity)
        if made is not None and position in made.lent:
            readers = made.lent[position]
            for reader in list(readers):
                # If other code has closed the reader, nothing tells whether the byte is still held.
                if not self.refers_to(*reader) or not has_hung_up(reader.fd):
                    return True
                readers.remove(reader)
                os.close(reader.fd)
            del made.lent[position]
            return made.fd != fd and position in made.held
        if made is not None and made.fd != fd and position in made.held:
            return True
        return any(True for _ in self._others(fd, position, identity))

    def _others(self, fd: int, position: int, identity: Identity) -> Iterator[int]:
        """Return the companions by which other fds of that object hold the byte."""
        for other in list(self._holders.get(position, ())):
            if other != fd and self.is_object(other, identity):
                companion = self.companion(other, position)
                if companion is not None:
                    yield companion

    @whole
    def create_counter(self, memory: int) -> int:
        # The position of an open file description, as on Linux; the file has no name.
        return self._new_file("counter")

    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        if not change:
            return os.lseek(counter, 0, os.SEEK_CUR)
        while (moved := self._count_now(counter, change, noted)) is None:
            time.sleep(_COUNT_PAUSE)
        return moved

    @whole
    def _count_now(self, counter: int, change: int, noted: list[int] | None) -> int | None:
        """Add to the counter; return None if another process is doing so."""
        # POSIX does not promise that lseek(2) adds atomically. A record lock vanishes with its process.
        with self._counting:
            try:
                fcntl.lockf(counter, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return None
                raise
            try:
                if noted is None:
                    return os.lseek(counter, change, os.SEEK_CUR)
                return seek_noted(noted, counter, change)
            finally:
                fcntl.lockf(counter, fcntl.LOCK_UN)

    def clear_counter(self, counter: int) -> None:
        os.lseek(counter, 0, os.SEEK_SET)
