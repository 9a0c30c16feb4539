"""What the machine itself can do. Each yields `Work`, as the rows' own measurements do."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

import _work
import numpy as np
from _peers import Forkshm
from _rows import Scale, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Both ends look for so long before they sleep; so they never sleep within a turn.
SPIN_SECONDS = 500e-6


def memcpy(nbytes: int, times: int = 1) -> Callable[[], None]:
    """Return a call that copies *nbytes* into memory that has been used before."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)

    def copy() -> None:
        for _ in range(times):
            np.copyto(target, source)

    return copy


def memcpy_of(full: int, times: int = 1) -> Callable[[Scale], Iterator[Work]]:
    """Copy so many bytes, at full scale."""

    def limit(scale: Scale) -> Iterator[Work]:
        yield Work(memcpy(scale.size(full), times))

    return limit


def noop(_: Scale) -> Iterator[Work]:
    """Ask a pool of ours for nothing."""
    ours = Forkshm()
    with ours.ready():
        yield Work(lambda: ours.apply(_work.noop))


def receive_spinning(end: socket.socket) -> bytes:
    """Look again and again, and sleep only when nothing came for long."""
    give_up = time.perf_counter() + SPIN_SECONDS
    while True:
        try:
            return end.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if time.perf_counter() > give_up:
                return end.recv(64)


def ping_pong(_: Scale) -> Iterator[Work]:
    """Send the shortest message to another process and back, while both look for it."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        near.close()
        with contextlib.suppress(BaseException):
            while message := receive_spinning(far):
                far.send(message)
        os._exit(0)
    far.close()

    def round_trip() -> bytes:
        near.send(b"ping")
        return receive_spinning(near)

    try:
        yield Work(round_trip, lambda answer: answer == b"ping")
    finally:
        near.close()
        os.waitpid(pid, 0)


def forks(count: int) -> Callable[[Scale], Iterator[Work]]:
    """Fork so many children that do nothing, and wait for them."""

    def fork_and_wait() -> None:
        children = []
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)

    def limit(_: Scale) -> Iterator[Work]:
        yield Work(fork_and_wait)

    return limit
