"""Fds that have companions: fds that are sent, duplicated, inherited and closed together with them."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from forkshm.backend.posix._whole import surely, whole

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._unix import Unix  # noqa: E402 - after the platform check

if TYPE_CHECKING:
    from collections.abc import Sequence


class Companions(Unix):
    """The part of the backend that keeps the companions of fds."""

    def __init__(self) -> None:
        super().__init__()
        # For each fd with companions: the purpose and the number of each companion.
        self._companions: dict[int, list[tuple[int, int]]] = {}
        # For each position held by fds of this process: those fds, for all objects.
        self._holders: dict[int, set[int]] = {}

    @surely
    def detach_companions(self, fd: int) -> list[int]:
        """Forget the companions of an fd that is being closed, and return them."""
        companions = self._companions.pop(fd, None)
        if companions is None:
            return []
        for what, _ in companions:
            if what >= 0:
                self._no_holder(fd, what)
        return [companion for _, companion in companions]

    @whole
    def duplicate(self, fd: int) -> int:
        copy = super().duplicate(fd)
        try:
            for what, companion in self._companions.get(fd, ()):
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
        self._companions.setdefault(fd, []).append((what, companion))
        if what >= 0:
            self._holders.setdefault(what, set()).add(fd)

    def _no_holder(self, fd: int, position: int) -> None:
        holders = self._holders.get(position)
        if holders is not None:
            holders.discard(fd)
            if not holders:
                self._holders.pop(position, None)

    def companions(self, fd: int) -> Sequence[tuple[int, int]]:
        """Return the companions of *fd*: for each its purpose and its number."""
        return self._companions.get(fd, ())

    def companion(self, fd: int, what: int) -> int | None:
        """Return the companion of an fd that has that purpose."""
        for found, companion in self._companions.get(fd, ()):
            if found == what:
                return companion
        return None
