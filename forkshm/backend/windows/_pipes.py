"""Channels on Windows: named pipes of messages, with the behavior of a SOCK_SEQPACKET socket.

A pipe keeps message boundaries. Any number of processes may have duplicates of either end, and each message goes to one
reader. A pipe cannot carry handles, so a message *names* them, and the receiver fetches them:

    sender                                          receiver
    duplicate the handles; take a receipt, a word
    of memory that both can access
    write: pid, handles, receipt, bytes  ------->   open the sender, duplicate the handles into this
                                                    process, sign the receipt
    close the duplicates once it is signed

Unlike a kernel that carries handles, messages not yet received are lost when the sender is killed. A sender that ends
by itself waits, for a bounded time, until every message is received or cannot be received.
"""

from __future__ import annotations

import _winapi as _win  # CPython's own
import array
import contextlib
import errno
import itertools
import os
import secrets
import struct
import sys
import time
import weakref
from typing import Any

from forkshm.backend.windows import _winapi

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

from forkshm.backend.windows._in_flight import FAREWELL_SECONDS, HANDLES, HEAD, PLAIN, WORD, incoming, outgoing  # noqa: E402 - after the platform check
from forkshm.backend.windows._waiting import MORE_DATA, PAUSE, PENDING, aborted, open_ends, wait_any, wait_for  # noqa: E402

__all__ = (
    "DONTWAIT",
    "FDS_LOST",
    "MOST_MESSAGES",
    "TRUNCATED",
    "Callee",
    "MessageEnd",
    "call",
    "message_pipe",
)

# Flags of `MessageEnd.recvmsg`; the numbers are forkshm's own.
DONTWAIT, TRUNCATED, FDS_LOST = 1, 2, 4

# Bytes that the kernel is asked to buffer in each direction.
_QUOTA = 256 * 1024
# The least that a message takes of that quota. The kernel counts bytes alone, and would buffer many thousands of small
# messages. The last of them would wait behind all others. On Linux the limit is the same, for the same reason.
_LEAST = 1024
MOST_MESSAGES = 2 * _QUOTA // _LEAST
"""Larger than the number of messages in a pipe, including those of senders that wait for room."""
_PIPE_BUSY, _NOT_FOUND, _PIPE_CONNECTED = 231, 2, 535
_REJECT_REMOTE, _FIRST_INSTANCE = 0x8, 0x80000
# Security quality of a client: the server cannot learn its identity.
_ANONYMOUS = 0x00100000


_names = itertools.count(1)


class MessageEnd:
    """One end of a pipe; it owns the handle."""

    def __init__(self, handle: int, name: int = 0, other: int = 0) -> None:
        self._handle = handle
        # The names of this end and of the other one in this process; duplicates share them.
        self.name = name or next(_names)
        self.other = other or next(_names)
        self._is_ended = False
        # Whether the last receive failed because no process can send.
        self.said_end = False
        # The other end, if the pipe was made here.
        self.peer: weakref.ref[MessageEnd] | None = None
        open_ends.add(handle)

    def is_intact(self) -> bool:
        return True

    def fileno(self) -> int:
        """Return the handle; -1 when closed."""
        return self._handle

    def _opened(self) -> int:
        if self._handle < 0:
            raise OSError(errno.EBADF, "this end of a pipe was closed")
        return self._handle

    # With defaults, because the names of this module may be gone when the program ends.
    def close(
        self,
        discard: Any = open_ends.discard,
        close: Any = _winapi.close,
        query: Any = _winapi.query_object,
        forget: Any = outgoing.forget,
        is_ending: Any = sys.is_finalizing,
    ) -> None:
        """Close this end in this process. Closing twice is allowed."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            if self.peer is not None and not is_ending() and query(handle).handles == 1:
                forget(self.name)  # messages sent to this end cannot be received
            discard(handle)
            close(handle)

    def __del__(self) -> None:
        self.close()

    def detach(self) -> int:
        """Return the handle, which the caller owns from now on."""
        handle, self._handle = self._handle, -1
        open_ends.discard(handle)
        return handle

    def dup(self) -> MessageEnd:
        """Return the same end with another handle."""
        made = MessageEnd(_winapi.duplicate(self._opened()), self.name, self.other)
        made.peer = self.peer
        return made

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Do nothing: the buffer size of a pipe is fixed when it is made."""

    def settimeout(self, seconds: float | None) -> None:
        """Do nothing: each call says whether to wait."""

    def shutdown(self, how: int, /) -> None:
        """Stop sending."""
        self._is_ended = True
        self.close()

    def is_alone(self) -> bool:
        """Return whether no process has the other end, so that messages cannot be received."""
        if self._handle < 0:
            return True
        other = self.peer() if self.peer is not None else None
        try:
            if other is not None and other.fileno() >= 0:
                return _winapi.query_object(other.fileno()).handles == 1
            _win.PeekNamedPipe(self._handle)
        except OSError:
            return True
        return False

    def has_message(self) -> bool:
        """Return whether a message can be received; leave it in the pipe."""
        try:
            return bool(_win.PeekNamedPipe(self._opened())[0])
        except BrokenPipeError:
            return False

    # -- sending ----------------------------------------------------------------------

    def send(self, data: bytes, flags: int = 0, /) -> int:
        """Send a message without handles."""
        self._write(PLAIN.pack(0, len(data)) + data, wait=not flags & DONTWAIT)
        return len(data)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, /) -> int:
        """Send a message that names handles."""
        data = b"".join(buffers)
        handles = [int(handle) for _, _, part in ancdata for handle in part]
        if not handles:
            return self.send(data, flags)
        self._opened()
        receipt, head = outgoing.post(handles, self, len(data))
        try:
            self._write(head + data, wait=not flags & DONTWAIT)
        except BaseException:
            outgoing.cancel(receipt)
            raise
        return len(data)

    def _write(self, frame: bytes, *, wait: bool) -> None:
        if self._is_ended:
            raise BrokenPipeError(errno.EPIPE, "this end was shut down")
        try:
            overlapped, code = _win.WriteFile(self._opened(), frame.ljust(_LEAST, b"\0"), True)
        except OSError as error:
            raise _sending(error) from error
        if code != PENDING:
            return
        try:
            if not wait:
                if aborted(overlapped):
                    raise BlockingIOError(errno.EAGAIN, "the pipe is full")
                return
            code = _win.WAIT_TIMEOUT
            while True:
                if code != _win.WAIT_TIMEOUT:
                    break
                code = wait_any([overlapped.event], PAUSE)  # signal handlers run in between
            overlapped.GetOverlappedResult(True)
        except BlockingIOError:
            raise
        except OSError as error:
            raise _sending(error) from error
        except BaseException:
            if aborted(overlapped):
                raise
            raise

    # -- receiving --------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Fail: messages are received by `recvmsg`."""
        raise OSError(errno.ENOTSUP, "recv() is not supported: receive messages by recvmsg()")

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        """Receive a message: its bytes, its handles in the form of `socket.recvmsg`, and flags."""
        while True:
            handle = self._opened()
            try:
                if _win.PeekNamedPipe(handle)[0]:
                    frame, is_cut = self._read(bufsize)
                    if frame is not None:
                        return _parse(frame, bufsize, TRUNCATED if is_cut else 0)
            except BrokenPipeError:
                self.said_end = True
                return b"", [], 0, None
            if flags & DONTWAIT:
                raise BlockingIOError(errno.EAGAIN, "no message has arrived")
            wait_for([handle], [], None)

    def _read(self, bufsize: int) -> tuple[bytes | None, bool]:
        overlapped, code = _win.ReadFile(self._opened(), bufsize + HEAD.size + HANDLES, True)
        if code == PENDING and aborted(overlapped):  # another receiver got the message
            return None, False
        code = overlapped.GetOverlappedResult(True)[1]
        return overlapped.getbuffer(), code == MORE_DATA


def _sending(error: OSError) -> OSError:
    if getattr(error, "winerror", None) in (_winapi.NO_DATA, _winapi.BROKEN_PIPE, 233):
        return BrokenPipeError(errno.EPIPE, "the other end of the pipe is closed")
    return error


def _parse(frame: bytes, bufsize: int, flags: int) -> tuple[bytes, list[Any], int, Any]:
    try:
        kind, nbytes = PLAIN.unpack_from(frame)
        if kind != 1:
            return frame[PLAIN.size : PLAIN.size + nbytes], [], flags, None
        head = HEAD.unpack_from(frame)
        start = HEAD.size + head[2] * WORD
        named = array.array("Q", frame[HEAD.size : start])
        if len(named) != head[2]:
            return frame[1:], [], flags | TRUNCATED, None
    except (struct.error, ValueError):
        return frame[1:], [], flags | TRUNCATED, None
    data = frame[start : start + nbytes]
    try:
        fetched = incoming.fetch(head, named)
    except OSError:
        return data, [], flags | FDS_LOST, None  # the reader of the message reports the missing handles
    return data, [(1, 1, array.array("q", fetched).tobytes())], flags, None


def message_pipe() -> tuple[MessageEnd, MessageEnd]:
    """Return the two ends of a new pipe; each can send and receive."""
    name = rf"\\.\pipe\forkshm-{os.getpid()}-{secrets.token_hex(16)}"
    server = _create(name, first=True, instances=1)
    try:
        client = _connect(name)
        _accepted(server)
    except BaseException:
        server.close()
        raise
    server.peer, client.peer = weakref.ref(client), weakref.ref(server)
    server.other, client.other = client.name, server.name
    return server, client


def _create(name: str, *, first: bool, instances: int) -> MessageEnd:
    mode = _win.PIPE_ACCESS_DUPLEX | _win.FILE_FLAG_OVERLAPPED | (_FIRST_INSTANCE if first else 0)
    kind = _win.PIPE_TYPE_MESSAGE | _win.PIPE_READMODE_MESSAGE | _win.PIPE_WAIT | _REJECT_REMOTE
    attributes = _winapi.private_attributes()
    return MessageEnd(_win.CreateNamedPipe(name, mode, kind, instances, _QUOTA, _QUOTA, 0, attributes))


def _connect(name: str) -> MessageEnd:
    access = _win.GENERIC_READ | _win.GENERIC_WRITE
    end = MessageEnd(
        _win.CreateFile(
            name, access, 0, _win.NULL, _win.OPEN_EXISTING, _win.FILE_FLAG_OVERLAPPED | _ANONYMOUS, _win.NULL
        )
    )
    try:
        _win.SetNamedPipeHandleState(end.fileno(), _win.PIPE_READMODE_MESSAGE, None, None)
    except BaseException:
        end.close()
        raise
    return end


def _accepted(server: MessageEnd) -> None:
    try:
        overlapped = _win.ConnectNamedPipe(server.fileno(), True)
    except OSError as error:
        if error.winerror != _PIPE_CONNECTED:
            raise
        return
    while wait_any([overlapped.event], PAUSE) == _win.WAIT_TIMEOUT:
        if server.fileno() < 0:
            overlapped.cancel()
            raise OSError(errno.EBADF, "closed")
    overlapped.GetOverlappedResult(True)


class Callee:
    """A name at which other processes of this user connect."""

    def __init__(self, address: str | None, backlog: int) -> None:
        self.address = address or rf"\\.\pipe\forkshm-{secrets.token_hex(16)}"
        self._next: MessageEnd | None = _create(self.address, first=True, instances=255)

    def accept(self) -> MessageEnd:
        """Wait for a caller; the kernel refuses callers of other users."""
        waiting = self._next
        if waiting is None:
            raise OSError(errno.EBADF, "this address was closed")
        _accepted(waiting)
        # A next instance must always exist, or another process could take the name.
        self._next = _create(self.address, first=False, instances=255)
        return waiting

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._next is None

    def close(self) -> None:
        """Stop accepting calls."""
        waiting, self._next = self._next, None
        if waiting is not None:
            waiting.close()


def call(address: str) -> MessageEnd:
    """Connect to the process that listens at *address*."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    while True:
        try:
            return _connect(address)
        except OSError as error:
            if error.winerror != _PIPE_BUSY or time.monotonic() > deadline:
                if error.winerror == _NOT_FOUND:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, f"no process listens at {address}") from error
                raise
            with contextlib.suppress(OSError):
                _win.WaitNamedPipe(address, 100)
