"""Limits of the machine itself. Each function yields `Work`, like the measurements of the rows."""

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

# How long both ends spin before they sleep, so that they never sleep within a turn.
SPIN_SECONDS = 500e-6


def memcpy(nbytes: int, times: int = 1) -> Callable[[], None]:
    """Return a call that copies *nbytes* into memory that has been used before."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)

    def copy() -> None:
        for _ in range(times):
            np.copyto(target, source)

    return copy


def memcpy_of(full: int, times: int = 1) -> Callable[[Scale], Iterator[Work]]:
    """Return a limit that copies *full* bytes, at full scale."""

    def limit(scale: Scale) -> Iterator[Work]:
        yield Work(memcpy(scale.size(full), times))

    return limit


def noop(_: Scale) -> Iterator[Work]:
    """Yield an empty call of a forkshm pool."""
    ours = Forkshm()
    with ours.ready():
        yield Work(lambda: ours.apply(_work.noop))


def receive_spinning(end: socket.socket) -> bytes:
    """Receive a message by polling; sleep only if none arrives for long."""
    give_up = time.perf_counter() + SPIN_SECONDS
    while True:
        try:
            return end.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if time.perf_counter() > give_up:
                return end.recv(64)


def ping_pong(_: Scale) -> Iterator[Work]:
    """Yield a round trip of the shortest message to another process, while both ends spin."""
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
    """Return a limit that forks *count* children that do nothing, and waits for them."""

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
