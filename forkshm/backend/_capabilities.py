"""The features of this kernel, found by trying them, never by the name of the system."""

from __future__ import annotations

import array
import dataclasses
import os
import secrets
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LINUX = {"needed": "linux"}
_POSIX = {"needed": "posix"}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """One flag per mechanism that forkshm uses."""

    memfd: bool = dataclasses.field(default=False, metadata=_LINUX)
    """Anonymous memory objects that cannot be shrunk: memfd_create(2) with seals."""
    ofd_locks: bool = dataclasses.field(default=False, metadata=_LINUX)
    """Locks that belong to an open file description: F_OFD_SETLK of fcntl(2)."""
    seqpacket: bool = dataclasses.field(default=False, metadata=_LINUX)
    """Sockets that keep message boundaries: SOCK_SEQPACKET of unix(7)."""
    pidfd: bool = dataclasses.field(default=False, metadata=_LINUX)
    """Fds that name processes: pidfd_open(2)."""
    signal_on_close: bool = dataclasses.field(default=False, metadata=_LINUX)
    """A chosen signal when a pipe closes: F_SETSIG of fcntl(2)."""
    shm_open: bool = dataclasses.field(default=False, metadata=_POSIX)
    """Memory objects with names: shm_open(3)."""
    datagrams: bool = dataclasses.field(default=False, metadata=_POSIX)
    """Fds in datagrams: SCM_RIGHTS of SOCK_DGRAM sockets."""
    record_locks: bool = dataclasses.field(default=False, metadata=_POSIX)
    """Locks that belong to a process: F_SETLK of fcntl(2)."""

    def missing(self, backend: str = "linux") -> list[str]:
        """Return the names of the capabilities that a backend needs and this system lacks."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.metadata["needed"] == backend and not getattr(self, field.name)
        ]


# Constants of <linux/fcntl.h>; only newer Pythons have them in the fcntl module.
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 2
_F_OFD_GETLK = 36
_F_SETSIG = 10


if sys.platform == "linux":
    import fcntl

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

    _LINUX_PROBES: dict[str, Callable[[], None]] = {
        "memfd": _memfd,
        "ofd_locks": _ofd_locks,
        "seqpacket": _seqpacket,
        "pidfd": _pidfd,
        "signal_on_close": _signal_on_close,
    }
else:  # no other system has these calls or these numbers
    _LINUX_PROBES: dict[str, Callable[[], None]] = {}


if sys.platform != "win32":
    import fcntl

    from forkshm.backend import _syscalls

    def _shm_open() -> None:
        name = f"/forkshm-probe-{secrets.token_hex(6)}".encode()
        fd = _syscalls.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.close(fd)
        _syscalls.shm_unlink(name)

    def _datagrams() -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with here, there:
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [here.fileno()]))]
            here.sendmsg([b"."], beside, socket.MSG_DONTWAIT)
            _, ancillary, _, _ = there.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT)
            os.close(array.array("i", ancillary[0][2][:4])[0])

    def _record_locks() -> None:
        import tempfile

        with tempfile.TemporaryFile() as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2**61)

    _POSIX_PROBES: dict[str, Callable[[], None]] = {
        "shm_open": _shm_open,
        "datagrams": _datagrams,
        "record_locks": _record_locks,
    }
else:
    _POSIX_PROBES: dict[str, Callable[[], None]] = {}


refusals: dict[str, str] = {}
"""Why the kernel refused a mechanism, by its name, where it said why."""


def _works(name: str, attempt: Callable[[], None]) -> bool:
    refusals.pop(name, None)
    try:
        attempt()
    except OSError as error:
        refusals[name] = os.strerror(error.errno or 0)
        return False
    except (AttributeError, NameError):
        return False
    return True


def probe(backend: str = "linux") -> Capabilities:
    """Return the capabilities found by trying every mechanism that a backend needs."""
    probes = {"linux": _LINUX_PROBES, "posix": _POSIX_PROBES}.get(backend, {})
    return Capabilities(**{name: _works(name, attempt) for name, attempt in probes.items()})
