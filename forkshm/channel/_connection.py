"""Connection and Pipe(): a channel between two processes."""

from __future__ import annotations

import errno
import operator
import pickle
import struct
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from forkshm._interrupts import is_of_kernel
from forkshm.backend import kernel
from forkshm.channel._endpoint import MAX_MESSAGE, Receiver, Sender
from forkshm.channel._item import STREAM, open_item, small_stream, stream_of, wait_message, wait_ready
from forkshm.channel._spin import Spin
from forkshm.errors import BufferTooShort, ChannelBrokenError, ChannelClosedError, NotPicklableError
from forkshm.pickler import Handle, ReceivedFd, explain, importable_in_children, pack, register
from forkshm.region.blocks import arena, claim

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from typing_extensions import Buffer

    from forkshm._multiprocess import context
    from forkshm.backend import MessageSocket
    from forkshm.channel._endpoint import Received

__all__ = ("Connection", "Pipe")

T = TypeVar("T")

# The first byte of a message that is not an object. Payloads begin with smaller bytes, pickles with larger ones.
_BYTES = b"\x10"
# Header for bytes in a block: the block's offset and size, and the number of bytes in the message.
_BLOCK = struct.Struct("<B7xQQQ")
_IN_BLOCK = 0x11
# Longer bytes go through a block.
_INLINE = 16 * 1024

# The kernel limits senders by the bytes in the pipe, but a block puts only a small message there. Messages with large
# blocks therefore get *ballast*. Without it, hundreds of them would be in flight before a sender waits.
# Precedes such a message: its length without the ballast.
_BALLAST = struct.Struct("<B3xI")
_WITH_BALLAST = 0x12
# Block bytes per byte of ballast. Tens of MiB can then be in flight, in messages of up to about 1 MiB.
_BYTES_PER_BALLAST = 320
_LEAST_BYTES = 2**18
# Upper limit of the ballast, so that a few messages of any size can be in flight.
_MOST_BALLAST = 48 * 1024


class Connection:
    """Open one end of a pipe, as ``multiprocessing.connection.Connection``. `Pipe` makes both ends.

    Args:
        handle: The fd of an end, such as a duplicate of what `fileno` returned. This object takes ownership.
        readable: Whether the end can receive.
        writable: Whether the end can send.

    Raises:
        ValueError: *readable* and *writable* are both False.
        OSError: *handle* is not an open fd, or not an end of a pipe.

    Shared memory is sent as a descriptor; other large buffers are copied once. A message arrives completely or not at
    all. Processes and threads may share an end, and each message goes to one receiver.

    The end is closed by `close`, at the end of a ``with`` block, or when it is collected. When every process has
    closed the other end, or died, `recv` raises ``EOFError`` after the last message and `send`
    ``BrokenPipeError``.

    Fork and threads:
        A forked child shares both ends. Close the end that a process does not use; otherwise the other side does not
        notice when a process is gone. Safe to use from any thread.

    Example:
        >>> from forkshm import Pipe
        >>> here, there = Pipe()
        >>> with here, there:
        ...     here.send({"answer": 42})
        ...     there.recv()
        {'answer': 42}

    See Also:
        `multiprocessing.connection.wait`, which accepts these connections too.
    """

    def __init__(
        self,
        handle: MessageSocket | int,
        readable: bool = True,
        writable: bool = True,
        *,
        start_method: str | None = None,
    ) -> None:
        if not (readable or writable):
            raise ValueError("at least one of readable and writable must be True")
        end = _socket_of(handle) if isinstance(handle, int) else handle
        self._end = end
        self._sender = Sender(end)
        self._receiver = Receiver(end)
        self._readable = readable
        self._writable = writable
        self._spin = Spin()
        # The names of __main__ that exist now also exist at the other end, or in a process that will be forked to have
        # it.
        self._importable = importable_in_children(start_method)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        receiver = getattr(self, "_receiver", None)
        # At the interpreter's end the names of modules are gone, and the socket closes its fd itself.
        if receiver is not None and not is_finalizing():
            receiver.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self.fileno()}"
        return f"<{type(self).__name__} {state}>"

    # -- objects ----------------------------------------------------------------------

    def send(self, obj: Any) -> None:
        """Send an object. Wait while the kernel's buffer is full, or about 50 MiB of copies are in flight.

        Raises:
            BrokenPipeError: No process has the other end any more.
            OSError: This end is closed or can only receive; or the kernel has no memory or fds.
            Exception: Whatever pickling *obj* raises; nothing was sent.
        """
        if not self._writable or self._end.fileno() < 0:
            self._check_writable()
        if (stream := small_stream(obj)) is not None:
            self._sender.send(stream)
            return
        try:
            payload = pack(obj, importable=self._importable)
        except Exception as error:
            explain(error, {"obj": obj}, self._importable)
            raise
        try:
            self._send(payload.data, payload.fds, payload.copied)
        finally:
            payload.close()

    def recv(self) -> Any:
        """Wait for the next message and return its object.

        Raises:
            EOFError: Every message was received, and no process has the other end any more.
            OSError: This end is closed or can only send.
            Exception: Whatever unpickling raises; the message is used up.
        """
        return self._read(_object_of)

    # -- bytes ------------------------------------------------------------------------

    def send_bytes(self, buf: Buffer, offset: int = 0, size: int | None = None) -> None:
        """Send bytes as one message; large ones are copied once, into shared memory.

        Args:
            buf: Any contiguous buffer.
            offset: Where to begin, in bytes.
            size: Number of bytes; by default all that follow *offset*.

        Raises:
            ValueError: *offset* or *size* is negative or beyond the buffer.
            BrokenPipeError: As for `send`, whose other errors apply too.
        """
        self._check_writable()
        view = memoryview(buf).cast("B")
        offset = operator.index(offset)
        if not 0 <= offset <= view.nbytes:
            raise ValueError(f"offset must be between 0 and the buffer's {view.nbytes:,} bytes, got {offset:,}")
        size = view.nbytes - offset if size is None else operator.index(size)
        if not 0 <= size <= view.nbytes - offset:
            raise ValueError(f"size must be between 0 and the {view.nbytes - offset:,} bytes left, got {size:,}")
        part = view[offset : offset + size]
        if size <= _INLINE:
            self._send(b"".join((_BYTES, part)))
            return
        block = arena.allocate(size)
        try:
            block.write(0, part, size)
        except BaseException:
            arena.free(block)
            raise
        lease = arena.lend(block)
        try:
            self._send(_BLOCK.pack(_IN_BLOCK, block.offset, block.size, size), [lease.fd], size)
        finally:
            lease.close()

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Wait for the next message and return its bytes, or those of the object's pickle.

        Args:
            maxlength: Maximum length to accept. After a longer message the connection can no longer be read.

        Raises:
            ValueError: *maxlength* is negative.
            EOFError: As for `recv`.
            OSError: As for `recv`; or the message is longer than *maxlength*, or is an object whose memory is
                not in its pickle: use `recv`.
        """
        if maxlength is not None and maxlength < 0:
            raise ValueError(f"maxlength must be 0 or more, got {maxlength}")
        view = self._read(_bytes_of)
        if maxlength is not None and view.nbytes > maxlength:
            if self._writable:
                self._readable = False
            else:
                self.close()
            raise OSError(f"bad message length: {view.nbytes:,} bytes, and at most {maxlength:,} were allowed")
        return view.tobytes()

    def recv_bytes_into(self, buf: Buffer, offset: int = 0) -> int:
        """Wait for the next message, write its bytes into a buffer, and return their number.

        Args:
            buf: Any writable contiguous buffer.
            offset: Where to begin writing, in bytes.

        Raises:
            BufferTooShort: The message does not fit. The exception's ``args[0]`` holds the message.
            ValueError: *offset* is negative or beyond the buffer.
            EOFError: As for `recv_bytes`, whose other errors apply too.
        """
        target = memoryview(buf).cast("B")
        if not 0 <= offset <= target.nbytes:
            raise ValueError(f"offset must be between 0 and the buffer's {target.nbytes:,} bytes, got {offset:,}")
        view = self._read(_bytes_of)
        if view.nbytes > target.nbytes - offset:
            raise BufferTooShort(view.tobytes())
        target[offset : offset + view.nbytes] = view
        return view.nbytes

    # -- both -------------------------------------------------------------------------

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Return whether `recv` would not wait: there is a message, or the other end is gone.

        Args:
            timeout: Seconds to wait for that; None waits forever.

        Raises:
            OSError: This end is closed or can only send.
        """
        self._check_readable()
        return wait_ready(self._receiver, timeout)

    def fileno(self) -> int:
        """Return the fd, for ``select`` and similar functions.

        Raises:
            OSError: This end is closed.
        """
        self._check_open()
        return self._end.fileno()

    def close(self) -> None:
        """Close this end in this process. Closing twice is allowed."""
        self._end.close()
        self._receiver.close()  # discards a message that an interrupted call left unread

    @property
    def closed(self) -> bool:
        """Whether this end was closed in this process."""
        return self._end.fileno() < 0

    @property
    def readable(self) -> bool:
        """Whether this end can receive."""
        return self._readable

    @property
    def writable(self) -> bool:
        """Whether this end can send."""
        return self._writable

    def grow(self, nbytes: int) -> None:
        """Ask the kernel to buffer up to this many bytes; it may grant less."""
        self._sender.grow(nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise NotPicklableError(
            f"cannot pickle {self!r}: plain pickle cannot carry its fd. "
            "Pass it to a forked process, or send it through a queue or pipe of forkshm."
        )

    def _send(self, data: bytes, fds: Sequence[int] = (), nbytes: int = 0) -> None:
        """Send a message, *nbytes* of which are in blocks."""
        if nbytes >= _LEAST_BYTES:
            ballast = min(nbytes // _BYTES_PER_BALLAST, _MOST_BALLAST, MAX_MESSAGE - _BALLAST.size - len(data))
            if ballast > 0:
                data = b"".join((_BALLAST.pack(_WITH_BALLAST, len(data)), data, bytes(ballast)))
        self._sender.send(data, fds)

    def _read(self, read: Callable[[Received], T]) -> T:
        """Return the result of *read* on the next message. An interrupted call leaves the message to the next call."""
        if not self._readable or self._end.fileno() < 0:
            self._check_readable()
        try:
            received = self._receiver.take()
        except BlockingIOError as error:
            if not is_of_kernel(error):  # raised by a signal handler
                raise
            received = wait_message(self._receiver, self._spin, None)
        if received is None:
            raise ChannelBrokenError("nothing more to receive: every process at the other end is gone")
        try:
            if received.data[0] == _WITH_BALLAST:
                received.data = _unballasted(received.data)
            return read(received)
        except Exception:
            received.close()
            raise
        except BaseException:
            self._receiver.put_back(received)
            raise

    def _check_open(self) -> None:
        if self._end.fileno() < 0:
            raise ChannelClosedError(errno.EBADF, "handle is closed: this end of the pipe was closed in this process")

    def _check_readable(self) -> None:
        self._check_open()
        if not self._readable:
            raise OSError("connection is write-only: receive from the other end")

    def _check_writable(self) -> None:
        self._check_open()
        if not self._writable:
            raise OSError("connection is read-only: send from the other end")


def _socket_of(fd: int) -> MessageSocket:
    """Return the socket of an fd and take ownership of the fd."""
    if fd < 0:
        raise ValueError(f"an fd is 0 or more, got {fd}")
    try:
        return kernel.message_socket(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            # As in multiprocessing, using a bad fd raises. The number is not kept: it may be another file's later.
            closed, other = kernel.message_sockets()
            closed.close()
            other.close()
            return closed
        if error.errno != errno.EPROTOTYPE:
            raise
        raise OSError(
            errno.EPROTOTYPE,
            f"fd {fd} is not an end of a forkshm pipe ({error.strerror}): "
            "use multiprocessing.connection.Connection for pipes and streams of others",
        ) from None


def Pipe(  # noqa: N802 - the standard library's name
    duplex: bool = True, *, ctx: context.BaseContext | None = None
) -> tuple[Connection, Connection]:
    """Return the two ends of a new pipe.

    Args:
        duplex: Both ends send and receive. Otherwise the first only receives and the second only sends.
        ctx: The context whose processes will have them; by default the default one.

    Raises:
        OSError: The limit on open files is reached.

    See Also:
        `Connection`.
    """
    method = getattr(ctx, "_name", None)
    first, second = kernel.message_sockets()
    return (
        Connection(first, writable=duplex, start_method=method),
        Connection(second, readable=duplex, start_method=method),
    )


def _unballasted(data: bytes) -> bytes:
    if len(data) > _BALLAST.size:
        length = _BALLAST.unpack_from(data)[1]
        if 0 < length <= len(data) - _BALLAST.size:
            return data[_BALLAST.size : _BALLAST.size + length]
    raise ChannelBrokenError(f"a message of {len(data):,} bytes does not say how many of them are ballast")


def _object_of(received: Received) -> Any:
    kind = received.data[0]
    if kind == STREAM and not received.fds:
        return pickle.loads(received.data)
    if kind == _BYTES[0] or kind == _IN_BLOCK:
        return pickle.loads(_bytes_of(received))
    return open_item(received)


def _bytes_of(received: Received) -> memoryview:
    """Return the bytes of a message."""
    data, fds = received.data, received.fds
    if data[0] == _BYTES[0]:
        received.close()
        return memoryview(data)[1:]
    if data[0] == _IN_BLOCK and len(data) == _BLOCK.size and fds:
        _, offset, size, nbytes = _BLOCK.unpack(data)
        try:
            view = memoryview(claim(fds[0], offset, size)).cast("B")
        except ValueError as error:
            raise ChannelBrokenError(f"a message names a block that is not what arrived beside it: {error}") from error
        if nbytes > view.nbytes:
            raise ChannelBrokenError(f"a message has {nbytes:,} bytes in a block of {view.nbytes:,}")
        received.is_read = True
        received.close()
        return view[:nbytes]
    received.close()
    if (stream := stream_of(data)) is not None:
        return stream
    raise OSError("the message is an object with large buffers or shared memory, not bytes: receive it by recv()")


def reduce_connection(connection: Connection) -> Any:
    """Return what to pickle for a connection; the receiver gets the same end."""
    connection._sender.check("send this end of a pipe")
    handle = pickle.PickleBuffer(Handle(connection.fileno()))
    return rebuild_connection, (handle, connection.readable, connection.writable)


def rebuild_connection(received: ReceivedFd, readable: bool, writable: bool) -> Connection:
    """Return the connection that arrived."""
    return Connection(received.take_socket(), readable=readable, writable=writable)


register(Connection, reduce_connection)
