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
import atexit
import contextlib
import errno
import itertools
import os
import secrets
import struct
import sys
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm import _interrupts
from forkshm.backend.windows import _winapi

if TYPE_CHECKING:
    from collections.abc import Sequence

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

__all__ = (
    "DONTWAIT",
    "FDS_LOST",
    "MOST_MESSAGES",
    "TRUNCATED",
    "Callee",
    "MessageEnd",
    "Poll",
    "call",
    "message_pipe",
    "outgoing",
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
# Bytes that the handles of one message may take.
_HANDLES = 64 * 1024
_PAUSE = 0.25
# Pause between looks while this process has handles in flight. They may keep open an end whose closing it waits for.
_PAUSE_WITH_HANDLES = 0.02

_PENDING, _ABORTED, _MORE_DATA = 997, 995, _winapi.MORE_DATA
_PIPE_BUSY, _NOT_FOUND, _PIPE_CONNECTED = 231, 2, 535
_REJECT_REMOTE, _FIRST_INSTANCE = 0x8, 0x80000
# Security quality of a client: the server cannot learn its identity.
_ANONYMOUS = 0x00100000

# The head of a message: whether handles are named; the number of bytes; the number of handles; the sender's pid and
# start time; its receipt memory, the index of the receipt, and the signature. The handles and the bytes follow.
_PLAIN = struct.Struct("<BxxxI")
_HEAD = struct.Struct("<BxxxIIIQQQQ")

_WORD = 8
# Maximum number of unreceived messages with handles.
_RECEIPTS = 8192
# How long a process that ends waits for receivers of its messages.
_FAREWELL_SECONDS = 10.0


# -- handles on their way out ---------------------------------------------------------


class _Posted(NamedTuple):
    signature: int
    handles: list[int]
    # The end that it was sent to, and an end that tells whether a receiver exists.
    to: int
    end: weakref.ref[MessageEnd]


class _Outgoing:
    """Handles that were sent but not yet fetched; this process owns them until then."""

    def __init__(self) -> None:
        # Reentrant, because garbage collection may close an end with handles in flight.
        self._lock = _interrupts.RLock()
        self._section = 0
        self._words = 0
        self._posted: dict[int, _Posted] = {}
        self._free = list(range(_RECEIPTS - 1, -1, -1))
        self._signatures = itertools.count(1)

    def post(self, handles: Sequence[int], end: MessageEnd, nbytes: int) -> tuple[int, bytes]:
        """Hold handles for their receiver; return the receipt, and the head of a message of *nbytes* bytes."""
        copies: list[int] = []
        try:
            with self._lock:
                self.sweep()
                if not self._section:
                    section, _ = _winapi.create_section(_RECEIPTS * _WORD)
                    self._words = _winapi.map_view(section, _winapi.FILE_MAP_WRITE, 0, 0)
                    self._section = section
                for handle in handles:
                    copies.append(_winapi.duplicate(handle))  # noqa: PERF401 - those before it are closed if one fails
                if not self._free or len(copies) * _WORD > _HANDLES:
                    raise OSError(errno.ETOOMANYREFS, "too many handles are in flight")
                receipt = self._free.pop()
                signature = next(self._signatures)
                self._posted[receipt] = _Posted(signature, copies, end.other, weakref.ref(end))
        except BaseException:
            for copy in copies:
                _winapi.close(copy)
            raise
        head = _HEAD.pack(1, nbytes, len(copies), os.getpid(), own_start(), self._section, receipt, signature)
        return receipt, head + array.array("Q", copies).tobytes()

    def cancel(self, receipt: int) -> None:
        """Take back posted handles whose message was not sent."""
        with self._lock:
            posted = self._posted.pop(receipt, None)
            if posted is not None:
                self._forget(receipt, posted)

    def sweep(self) -> int:
        """Close handles that were fetched; return the number of messages that still wait to be."""
        if not self._posted:
            return 0
        with self._lock:
            for receipt, posted in list(self._posted.items()):
                if _winapi.load_long(self._words + receipt * _WORD) == posted.signature:
                    del self._posted[receipt]
                    self._forget(receipt, posted)
            return len(self._posted)

    def forget(self, to: int) -> None:
        """Close all handles in flight to an end that no process can receive from."""
        with self._lock:
            for receipt, posted in list(self._posted.items()):
                if posted.to == to:
                    del self._posted[receipt]
                    self._forget(receipt, posted)

    def sign_own(self, receipt: int, signature: int) -> None:
        """Sign a receipt of this process, as a receiver within it does."""
        _winapi.store_long(self._words + receipt * _WORD, signature)

    def _forget(self, receipt: int, posted: _Posted) -> None:
        self._free.append(receipt)
        for handle in posted.handles:
            _winapi.close(handle)

    def farewell(self) -> None:
        """Wait, at the end of the program, until all handles that can still be fetched were fetched."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self.sweep():
            with self._lock:
                ends = {posted.to: posted.end() for posted in self._posted.values()}
            for to, end in ends.items():
                if end is not None and end.is_alone():
                    self.forget(to)
            if time.monotonic() > deadline:
                warnings.warn(
                    f"{len(self._posted)} messages of process {os.getpid()} were not received within "
                    f"{_FAREWELL_SECONDS:g} seconds of its end, and their memory is gone",
                    ResourceWarning,
                    stacklevel=1,
                )
                return
            time.sleep(0.002)


outgoing = _Outgoing()
atexit.register(outgoing.farewell)

_start: list[int] = []


def own_start() -> int:
    """Return the start time of this process."""
    if not _start:
        _start.append(_winapi.process_start(_winapi.SELF))
    return _start[0]


class _Peer(NamedTuple):
    process: int
    # Address of the mapping of its receipts.
    words: int


class _Incoming:
    """The processes that handles were fetched from."""

    def __init__(self) -> None:
        self._lock = _interrupts.RLock()
        self._peers: dict[tuple[int, int], _Peer] = {}

    def fetch(self, head: tuple[Any, ...], handles: Sequence[int]) -> list[int]:
        """Duplicate handles of another process into this one, and sign its receipt.

        Raises:
            OSError: The other process has ended, or does not have these handles.
        """
        _, _, _, pid, start, section, receipt, signature = head
        fetched: list[int] = []
        own = pid == os.getpid() and start == own_start()
        with self._lock:
            peer = None if own else self._peer(pid, start, section)
            source = _winapi.SELF if peer is None else peer.process
            try:
                for handle in handles:
                    fetched.append(_winapi.duplicate(handle, source=source))  # noqa: PERF401 - as above
            except BaseException:
                for handle in fetched:
                    _winapi.close(handle)
                raise
            if receipt < _RECEIPTS:
                if peer is None:
                    outgoing.sign_own(receipt, signature)
                else:
                    _winapi.store_long(peer.words + receipt * _WORD, signature)
        return fetched

    def _peer(self, pid: int, start: int, section: int) -> _Peer:
        peer = self._peers.get((pid, start))
        if peer is not None:
            return peer
        for key, old in list(self._peers.items()):
            if _winapi.wait(old.process, 0) == _winapi.WAIT_OBJECT_0:
                del self._peers[key]
                _winapi.unmap_view(old.words)
                _winapi.close(old.process)
        access = _winapi.PROCESS_DUP_HANDLE | _winapi.PROCESS_QUERY | _winapi.SYNCHRONIZE
        process = _winapi.open_process(pid, access)
        try:
            if _winapi.process_start(process) != start:
                raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended, and its id was reused")
            receipts = _winapi.duplicate(section, source=process)
            try:
                if (_winapi.section_size(receipts) or 0) < _RECEIPTS * _WORD:
                    raise OSError(errno.EBADMSG, f"process {pid} has no receipt memory there")
                words = _winapi.map_view(receipts, _winapi.FILE_MAP_WRITE, 0, _RECEIPTS * _WORD)
            finally:
                _winapi.close(receipts)
        except BaseException:
            _winapi.close(process)
            raise
        peer = self._peers[pid, start] = _Peer(process, words)
        return peer


_incoming = _Incoming()


def kept() -> set[int]:
    """Return the handles that stay open for later use: receipt memory, and processes that sent messages."""
    return {outgoing._section} | {peer.process for peer in _incoming._peers.values()}


# -- ends -----------------------------------------------------------------------------

# Handles of ends open here. A `Poll` waits for them differently than for processes.
_open: set[int] = set()


def _aborted(overlapped: Any) -> bool:
    """Cancel a pending operation; return False if it has completed meanwhile."""
    overlapped.cancel()
    try:
        return bool(overlapped.GetOverlappedResult(True)[1] == _ABORTED)
    except OSError as error:
        if error.winerror == _ABORTED:
            return True
        raise


def _wait_any(handles: Sequence[int], seconds: float) -> int:
    """Wait for one of the handles; return its index. A handled signal counts as a timeout."""
    try:
        return int(_win.WaitForMultipleObjects(handles, False, int(seconds * 1000)))
    except InterruptedError as error:
        if error.errno != errno.EINTR:  # a signal handler raised this exception
            raise
        return int(_win.WAIT_TIMEOUT)


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
        _open.add(handle)

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
        discard: Any = _open.discard,
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
        _open.discard(handle)
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
        self._write(_PLAIN.pack(0, len(data)) + data, wait=not flags & DONTWAIT)
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
        if code != _PENDING:
            return
        try:
            if not wait:
                if _aborted(overlapped):
                    raise BlockingIOError(errno.EAGAIN, "the pipe is full")
                return
            while _wait_any([overlapped.event], _PAUSE) == _win.WAIT_TIMEOUT:
                pass  # signal handlers run in between
            overlapped.GetOverlappedResult(True)
        except BlockingIOError:
            raise
        except OSError as error:
            raise _sending(error) from error
        except BaseException:
            if _aborted(overlapped):
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
            _wait_for([handle], [], None)

    def _read(self, bufsize: int) -> tuple[bytes | None, bool]:
        overlapped, code = _win.ReadFile(self._opened(), bufsize + _HEAD.size + _HANDLES, True)
        if code == _PENDING and _aborted(overlapped):  # another receiver got the message
            return None, False
        code = overlapped.GetOverlappedResult(True)[1]
        return overlapped.getbuffer(), code == _MORE_DATA


def _sending(error: OSError) -> OSError:
    if getattr(error, "winerror", None) in (_winapi.NO_DATA, _winapi.BROKEN_PIPE, 233):
        return BrokenPipeError(errno.EPIPE, "the other end of the pipe is closed")
    return error


def _parse(frame: bytes, bufsize: int, flags: int) -> tuple[bytes, list[Any], int, Any]:
    try:
        kind, nbytes = _PLAIN.unpack_from(frame)
        if kind != 1:
            return frame[_PLAIN.size : _PLAIN.size + nbytes], [], flags, None
        head = _HEAD.unpack_from(frame)
        start = _HEAD.size + head[2] * _WORD
        named = array.array("Q", frame[_HEAD.size : start])
        if len(named) != head[2]:
            return frame[1:], [], flags | TRUNCATED, None
    except (struct.error, ValueError):
        return frame[1:], [], flags | TRUNCATED, None
    data = frame[start : start + nbytes]
    try:
        fetched = _incoming.fetch(head, named)
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
    while _wait_any([overlapped.event], _PAUSE) == _win.WAIT_TIMEOUT:
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
    deadline = time.monotonic() + _FAREWELL_SECONDS
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


# -- waiting --------------------------------------------------------------------------


def _is_ready(handle: int) -> bool:
    try:
        return bool(_win.PeekNamedPipe(handle)[0])
    except OSError as error:
        if error.winerror in (_winapi.NO_SUCH_HANDLE, _winapi.NO_SUCH_FUNCTION):
            raise OSError(errno.EBADF, f"handle {handle} is not an open pipe") from error
        return True  # the pipe is broken, which the receiver has to learn


def _wait_for(pipes: Sequence[int], others: Sequence[int], seconds: float | None) -> list[int]:
    """Wait until a pipe has a message or another handle is signaled; return the handles that are ready."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ready = [handle for handle in pipes if _is_ready(handle)]
        ready += [handle for handle in others if _winapi.wait(handle, 0) == _winapi.WAIT_OBJECT_0]
        if ready:
            return ready
        left = _PAUSE_WITH_HANDLES if outgoing.sweep() else _PAUSE
        if deadline is not None:
            left = min(left, deadline - time.monotonic())
        if left <= 0:
            return ready
        # A read of zero bytes completes when a message is there, and leaves the message in the pipe.
        reads = []
        try:
            for handle in pipes:
                try:
                    overlapped, code = _win.ReadFile(handle, 0, True)
                except OSError:
                    break  # the pipe is broken: the check above sees it next time
                if code != _PENDING:
                    break
                reads.append(overlapped)
            else:
                events = [overlapped.event for overlapped in reads]
                # The kernel waits for 64 handles at most. With more, the others are polled in between.
                some = [*events, *others][:63]
                if len(events) + len(others) > 63:
                    left = min(left, 0.01)
                if some:
                    which = _wait_any(some, max(left, 0.001)) - len(events)
                    if 0 <= which < len(others):
                        return [others[which]]  # a semaphore has already counted this wait, so it must not be repeated
                else:
                    time.sleep(left)
        finally:
            for overlapped in reads:
                with contextlib.suppress(OSError):
                    _aborted(overlapped)


def wait_readable(handle: int, seconds: float | None) -> bool:
    """Wait until a message is there or the pipe is broken."""
    if handle < 0:
        raise OSError(errno.EBADF, "this end of a pipe was closed")
    return bool(_wait_for([handle], [], seconds))


class Poll:
    """The part of ``select.poll`` that is used, for pipes and processes."""

    def __init__(self) -> None:
        self._pipes: list[int] = []
        self._others: list[int] = []

    def register(self, fd: int, eventmask: int = 1, /) -> None:
        """Watch a pipe for messages, or another handle for being signaled."""
        (self._pipes if fd in _open else self._others).append(fd)

    def unregister(self, fd: int, /) -> None:
        """Stop watching a handle."""
        (self._pipes if fd in self._pipes else self._others).remove(fd)

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """Wait for up to *timeout* milliseconds, or forever; return the ready handles, each with its events."""
        ready = _wait_for(self._pipes, self._others, None if timeout is None else timeout / 1000)
        return [(handle, 1) for handle in ready]
