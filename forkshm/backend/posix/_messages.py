"""Ends of channels: sockets that keep messages whole, and listeners."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, cast

from forkshm._interrupts import is_of_kernel, promptly
from forkshm.backend._interface import HasFileno
from forkshm.backend.posix._whole import surely, whole

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._green import Socket  # noqa: E402 - after the platform check
from forkshm.backend._unix import accepted  # noqa: E402
from forkshm.backend.posix._leases import Leases  # noqa: E402
from forkshm.backend.posix._waiting import has_hung_up, wait  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.backend._interface import Callee, MessageSocket

# Requested buffer size: BSD kernels give a message socket only 2 to 16 KiB by default.
_BUFFER = 256 * 1024
_SMALLEST_BUFFER = 128 * 1024
# The bytes of a message are followed by an entry for each companion (the position of its fd, and its purpose), the
# number of fds, and the number of companions.
_COMPANION = struct.Struct("<Bq")
_MOST_COMPANIONS = 127
_TRAILER = _COMPANION.size * _MOST_COMPANIONS + 2
_MOST_FDS = 253
# Purposes of companions: one that reports the end of the peers, or the position of the byte that is held.
_LIFE = -1
# As plain ints: combining the enum's members takes longer than the system call.
_DONTWAIT, _TRUNCATED = int(socket.MSG_DONTWAIT), int(socket.MSG_TRUNC)
# Whether poll(2) reports that the other end of a SOCK_DGRAM socket has room.
_TELLS_OF_ROOM = sys.platform == "linux"
# Whether received fds are close-on-exec from the start. Elsewhere, a program started at that moment may inherit them.
_BORN_CLOSED = hasattr(socket, "MSG_CMSG_CLOEXEC")
_FULL_PAUSE = 0.001
_PEER_GONE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EDESTADDRREQ})
_FOLDER = "forkshm-manager-"


class Messages(Leases):
    """The part of the backend that makes channels and waits for messages."""

    @whole
    def message_sockets(self) -> tuple[End, End]:
        data = self._socketpair(socket.SOCK_DGRAM)
        try:
            lives = self._socketpair(socket.SOCK_STREAM)
        except BaseException:
            for end in data:
                end.close()
            raise
        first, second = (self._joined(end, life) for end, life in zip(data, lives, strict=True))
        return first, second

    def _socketpair(self, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
        try:
            ends = socket.socketpair(socket.AF_UNIX, kind)
        except OSError as error:
            self._once_more(error)
            ends = socket.socketpair(socket.AF_UNIX, kind)
        self._noted(ends[1].fileno())
        return ends

    def _joined(self, data: socket.socket, life: socket.socket) -> End:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            if data.getsockopt(socket.SOL_SOCKET, option) < _SMALLEST_BUFFER:
                data.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        fd = data.detach()
        self.attach(fd, _LIFE, life.detach())
        return End(self, fd)

    @whole
    def message_socket(self, fd: int) -> End:
        end = End(self, fd)
        if end.family != socket.AF_UNIX or end.type != socket.SOCK_DGRAM:
            found = f"{end.family.name}, {end.type.name}"
            end.detach()
            raise OSError(errno.EPROTOTYPE, f"a socket of {found} instead of AF_UNIX, SOCK_DGRAM")
        return end

    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        fd = end.fileno()
        return wait(None if seconds is None else max(seconds, 0.0), fd, self.companion(fd, _LIFE))

    def has_ended(self, receiver: MessageSocket) -> bool:
        return not isinstance(receiver, End) or receiver.said_end

    def listen(self, address: str | None, backlog: int) -> Callee:
        return _Callee(self, address, backlog)

    def call(self, address: str) -> End:
        answer: list[Any] = []
        fds: list[int] = []
        try:
            with Socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
                caller.settimeout(None)
                if (uid := _owner(address)) != os.geteuid():
                    raise PermissionError(
                        errno.EACCES, f"the peer belongs to user {uid}, and this process to user {os.geteuid()}"
                    )
                caller.connect(address)
                # Received and stored in one C call.
                try:
                    answer.extend(map(caller.recvmsg, (1,), (self.fds_space(2),), (self.TAKE,)))
                except ConnectionResetError as error:
                    if not is_of_kernel(error):  # raised by a signal handler
                        raise
            fds += self.received_fds(answer[0][1]) if answer else ()
            if len(fds) != 2:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "the listener closed the connection")
            for fd in fds:
                os.set_inheritable(fd, False)
            self.attach(fds[0], _LIFE, fds[1])
            del fds[1]  # the companion is closed with the other; no call between these
            return self.message_socket(fds[0])
        except BaseException:
            if answer and not fds:
                fds += self.received_fds(answer[0][1])
            self.close_all(fds)
            raise

    def forget_address(self, address: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(address)
        folder = os.path.dirname(address)
        if os.path.basename(folder).startswith(_FOLDER):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


class End(Socket):
    """An end of a channel: a socket that keeps messages whole, and a companion that reports the end of the peers."""

    def __init__(self, backend: Messages, fd: int) -> None:
        super().__init__(fileno=fd)
        self.settimeout(None)  # overrides socket.setdefaulttimeout()
        self._backend = backend
        self._file = backend.file_of(fd)
        # Whether the last receive reported that the other end is gone.
        self.said_end = False

    def is_intact(self) -> bool:
        return self._backend.refers_to(self.fileno(), self._file)

    def _life(self) -> int | None:
        return self._backend.companion(self.fileno(), _LIFE)

    def send(self, data: Any, flags: int = 0, /) -> int:
        return self.sendmsg([data], (), flags)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        while (sent := self._send_now(buffers, ancdata, flags | _DONTWAIT)) < 0:
            if flags & _DONTWAIT or not os.get_blocking(self.fileno()):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            # BSD does not report when there is room again.
            self._backend.wait_writable(self, _FULL_PAUSE)
            if not _TELLS_OF_ROOM:
                time.sleep(_FULL_PAUSE)
        return sent

    @whole
    def _send_now(self, buffers: Any, ancdata: Any, flags: int) -> int:
        """Send a message; return its number of bytes, or -1 if there is no room."""
        fds = [fd for _, _, part in ancdata for fd in part]
        companions = [
            (place, what, companion) for place, fd in enumerate(fds) for what, companion in self._backend.companions(fd)
        ]
        counts = bytes((len(fds), len(companions)))
        message = b"".join([*buffers, *(_COMPANION.pack(place, what) for place, what, _ in companions), counts])
        fds += [companion for _, _, companion in companions]
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            super().sendmsg([message], beside, flags)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno in _PEER_GONE:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            if error.errno == errno.ENOBUFS:
                return -1
            raise
        return len(message) - len(counts) - _COMPANION.size * len(companions)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        space = socket.CMSG_SPACE(_MOST_FDS * 4) if ancbufsize else 0
        self.said_end = over = False
        while True:
            try:
                return self._receive_now(bufsize, space, flags | _DONTWAIT)
            except BlockingIOError:
                if over:
                    self.said_end = True
                    return b"", [], 0, None
                life = self._life()
                # Messages sent before the other end closed are found by one more look.
                over = life is not None and has_hung_up(life)
                if not over:
                    if flags & _DONTWAIT:
                        raise
                    wait(None, self.fileno(), life)
            except ConnectionResetError:
                pass  # BSD reports once that the other end is gone

    @whole
    def _receive_now(self, bufsize: int, space: int, flags: int) -> tuple[bytes, list[Any], int, Any]:
        data, ancillary, found, _ = super().recvmsg(bufsize + _TRAILER, space, flags)
        return self._taken(data, ancillary, found, bufsize)

    def _taken(self, data: bytes, ancillary: Any, found: int, bufsize: int) -> tuple[bytes, list[Any], int, Any]:
        fds = self._backend.received_fds(ancillary)
        if not _BORN_CLOSED:
            for fd in fds:
                os.set_inheritable(fd, False)
        if len(data) >= 2 and not found & _TRUNCATED:
            end = len(data) - 2
            start = end - _COMPANION.size * data[end + 1]
            if start >= 0:
                # If there was no room for all fds, the companions were lost first, because they come last.
                count = min(data[end], len(fds))
                for (place, what), companion in zip(_COMPANION.iter_unpack(data[start:end]), fds[count:], strict=False):
                    if place < count:
                        self._backend.attach(fds[place], what, companion)
                    else:
                        os.close(companion)
                data, fds = data[:start], fds[:count]
        if len(data) > bufsize:
            found |= _TRUNCATED
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        return data, beside, found, None

    @whole
    def shutdown(self, how: int, /) -> None:
        life = self._life()
        if life is not None:
            with contextlib.suppress(OSError):
                other = Socket(fileno=os.dup(life))
                with other:
                    other.shutdown(how)
        super().shutdown(how)

    @whole
    def dup(self) -> End:
        return End(self._backend, self._backend.duplicate(self.fileno()))

    @surely
    def close(self) -> None:
        fd = self.detach()
        if fd >= 0:
            self._backend.close_own(self._backend.closing(fd, self._file))

    # With a default, because the names of this module may be gone when the program ends.
    @promptly
    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        is_ending = False
        try:
            is_ending = ends()
            if is_ending:
                self.detach()  # the kernel closes the fds in a moment
        finally:
            if not is_ending:
                self.close()


class _Callee:
    """A listener at an address in a directory of its own, which only this user can enter."""

    def __init__(self, backend: Messages, address: str | None, backlog: int) -> None:
        self._backend = backend
        self._owner = os.getpid()
        self.address = address or os.path.join(tempfile.mkdtemp(prefix=_FOLDER), "manager")
        self._socket = Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(None)
            self._socket.bind(self.address)
            os.chmod(self.address, 0o600)
            self._socket.listen(backlog)
        except BaseException:
            self.close()
            raise

    def accept(self) -> End:
        while True:
            with accepted(self._socket) as caller:
                ours, theirs = self._backend.message_sockets()
                with contextlib.closing(theirs):
                    fds = [theirs.fileno(), cast("int", theirs._life())]
                    try:
                        caller.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                    except OSError:
                        ours.close()
                        continue  # it is gone already
                    return ours

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if os.getpid() == self._owner:
            self._backend.forget_address(self.address)


def _owner(address: str) -> int:
    try:
        return os.stat(address).st_uid
    except PermissionError:  # the address is in a directory of another user
        return os.stat(os.path.dirname(address)).st_uid
