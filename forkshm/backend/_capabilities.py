"""What this kernel offers, found by trying, never by the name of the system."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
from typing import TYPE_CHECKING

with contextlib.suppress(ImportError):  # what needs it is not there either
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """One flag per mechanism that forkshm uses."""

    #: Anonymous memory objects that cannot be shrunk: memfd_create(2) with seals.
    memfd: bool
    #: Locks that belong to an open file description: F_OFD_SETLK of fcntl(2).
    ofd_locks: bool
    #: Sockets that keep message boundaries: SOCK_SEQPACKET of unix(7).
    seqpacket: bool
    #: Fds that name processes: pidfd_open(2).
    pidfd: bool
    #: A signal of our choice when a pipe closes: F_SETSIG of fcntl(2).
    signal_on_close: bool

    def missing(self) -> list[str]:
        """Names of the capabilities this system lacks."""
        return [name for name, there in dataclasses.asdict(self).items() if not there]


def _memfd() -> None:
    fd = os.memfd_create("forkshm-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
    finally:
        os.close(fd)


def _ofd_locks() -> None:
    fd = os.memfd_create("forkshm-probe", os.MFD_CLOEXEC)
    try:
        fcntl.fcntl(fd, _F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    finally:
        os.close(fd)


def _seqpacket() -> None:
    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):
        end.close()


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _signal_on_close() -> None:
    read_end, write_end = os.pipe()
    try:
        fcntl.fcntl(read_end, _F_SETSIG, 0)
        os.close(os.open(f"/proc/self/fd/{read_end}", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(read_end)
        os.close(write_end)


# Numbers of <linux/fcntl.h>; the fcntl module has them only in newer Pythons.
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 2
_F_OFD_GETLK = 36
_F_SETSIG = 10


def _works(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except (AttributeError, NameError, OSError):
        return False
    return True


def probe() -> Capabilities:
    """Try every mechanism once."""
    return Capabilities(
        memfd=_works(_memfd),
        ofd_locks=_works(_ofd_locks),
        seqpacket=_works(_seqpacket),
        pidfd=_works(_pidfd),
        signal_on_close=_works(_signal_on_close),
    )
