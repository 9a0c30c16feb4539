"""Fds that have companions: fds that are sent, duplicated, inherited and closed together with them.

A program may close fds that it did not open, and the numbers then belong to its own files. So each fd is noted with
what it refers to.
"""

from __future__ import annotations

import contextlib
import sys
from typing import NamedTuple

from forkshm.backend._interface import Identity
from forkshm.backend.posix._whole import surely, whole

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._green import close  # noqa: E402 - after the platform check
from forkshm.backend._unix import Unix  # noqa: E402


class Noted(NamedTuple):
    """An fd, and what it refers to."""

    fd: int
    file: Identity


class Companion(NamedTuple):
    """A companion: its purpose, and its fd."""

    what: int
    noted: Noted


class _Companions(NamedTuple):
    """The companions of an fd, and what that fd refers to."""

    file: Identity
    all: list[Companion]


class Companions(Unix):
    """The part of the backend that keeps the companions of fds."""

    def __init__(self) -> None:
        super().__init__()
        self._companions: dict[int, _Companions] = {}
        # For each position held by fds of this process: those fds, for all objects.
        self._holders: dict[int, set[int]] = {}

    def noted(self, fd: int) -> Noted:
        """Return an fd and what it refers to."""
        return Noted(fd, self.file_of(fd))

    def close_noted(self, *some: Noted) -> None:
        """Close fds without companions, except those that other code has closed."""
        for noted in some:
            if self.refers_to(*noted):
                close(noted.fd)

    def is_object(self, fd: int, identity: Identity) -> bool:
        if super().is_object(fd, identity):
            return True
        self.companions_of(fd)  # closes them if other code has closed the fd
        return False

    @surely
    def detach_companions(self, fd: int) -> list[Noted]:
        """Forget the companions of an fd that is being closed, and return them."""
        companions = self._companions.pop(fd, None)
        if companions is None:
            return []
        for what, _ in companions.all:
            if what >= 0:
                self._no_holder(fd, what)
        return [noted for _, noted in companions.all]

    def companions_of(self, fd: int) -> list[Companion]:
        """Return the list of an fd's companions."""
        companions = self._companions.get(fd)
        if companions is None:
            return []
        if self.refers_to(fd, companions.file):
            return companions.all
        self.close_noted(*self.detach_companions(fd))  # other code has closed the fd, and the number is in use again
        return []

    @whole
    def duplicate(self, fd: int) -> int:
        copy = super().duplicate(fd)
        try:
            for what, companion in self.companions(fd):
                self.attach(copy, what, super().duplicate(companion))
        except BaseException:
            self.close(copy)
            raise
        return copy

    @whole
    def reopen_into(self, fds: list[int], fd: int) -> None:
        fds.append(self.reopen(fd))

    @surely
    def close_all(self, fds: list[int]) -> None:
        while fds:
            with contextlib.suppress(OSError):  # it was closed elsewhere
                self.close(fds.pop())

    @whole
    def attach(self, fd: int, what: int, companion: int) -> None:
        """Make *companion* travel with *fd*."""
        there = self.companions_of(fd)
        there.append(Companion(what, self.noted(companion)))
        self._companions[fd] = _Companions(self.file_of(fd), there)
        if what >= 0:
            self._holders.setdefault(what, set()).add(fd)

    def _no_holder(self, fd: int, position: int) -> None:
        holders = self._holders.get(position)
        if holders is not None:
            holders.discard(fd)
            if not holders:
                self._holders.pop(position, None)

    def companions(self, fd: int) -> list[tuple[int, int]]:
        """Return the companions of *fd*: for each its purpose and its number."""
        return [(what, noted.fd) for what, noted in self.companions_of(fd) if self.refers_to(*noted)]

    def companion(self, fd: int, what: int) -> int | None:
        """Return the companion of an fd that has that purpose."""
        for found, noted in self.companions_of(fd):
            if found == what and self.refers_to(*noted):
                return noted.fd
        return None
