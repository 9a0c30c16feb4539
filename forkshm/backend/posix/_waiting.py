"""Waiting for fds by poll(2)."""

from __future__ import annotations

import select
import sys

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._green import new_poll  # noqa: E402 - after the platform check


def wait(seconds: float | None, fd: int, life: int | None) -> bool:
    poll = new_poll()
    poll.register(fd, select.POLLIN)
    if life is not None:
        poll.register(life, select.POLLIN)
    return bool(poll.poll(None if seconds is None else -int(-seconds * 1000 // 1)))


def has_hung_up(fd: int) -> bool:
    poll = new_poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
