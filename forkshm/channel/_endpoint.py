"""The two ends of a channel."""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import itertools
import os
import socket
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from forkshm import _interrupts, _leaks, _system
from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.errors import ChannelBrokenError, ChannelClosedError
from forkshm.region import OwnedFd, give_back_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forkshm.backend import MessageSocket

__all__ = (
    "UNUSUAL",
    "PrivateFd",
    "Received",
    "Receiver",
    "Sender",
    "close_in_children",
    "ends_open",
    "pair",
)

MAX_MESSAGE = 64 * 1024
"""Maximum bytes of a message. Payloads with more than their share of it go into a block instead."""

DIRECT_FDS = kernel.DIRECT_FDS
"""Maximum number of fds beside a message. With more, the last is a *carrier*: a socket that queues the others."""

# Fds per message in a carrier. unix(7) sets a limit of 253. A receiver has room for as many as the backend keeps free,
# if the limits allow it.
_CARRIED_FDS = 64

# Looked up once instead of for each message.
_DONTWAIT, _TRUNCATED, _FDS_LOST = kernel.DONTWAIT, kernel.TRUNCATED, kernel.FDS_LOST
UNUSUAL = _TRUNCATED | _FDS_LOST
"""Flags of a message that did not arrive whole."""
_LEVEL, _KIND = kernel.RIGHTS
WAIT = kernel.TAKE
"""An argument of `Receiver.take`: wait for a message."""
_RECEIVE = _DONTWAIT | WAIT

# Arguments of calls that `map` makes.
_ONCE: tuple[tuple[()], ...] = ((),)
_MESSAGE_SIZE = (MAX_MESSAGE,)
_HOW = (_RECEIVE,)
_ANCILLARY_SIZE = (kernel.fds_space(DIRECT_FDS + 1),)
_CARRIED_ANCILLARY = kernel.fds_space(_CARRIED_FDS)

_FULL = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ETOOMANYREFS})
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

# Seconds to wait while too many fds of this user are in flight, and the interval between attempts.
_PATIENCE = 10.0
_PAUSE = 0.001

# Seconds for which the fd of an end counts as checked. A check takes a microsecond.
_CHECKED_FOR = 50e-6
_now = time.perf_counter

# A message must not be empty.
_CARRIER_ITEM = b"fds"


class Received:
    """A message as the kernel delivered it. Its owner closes it when all of it was read.

    Attributes:
        data: The bytes of the message.
        fds: The fds that came beside the message and are still open.
        is_read: Whether all of the message was read.
        message: The parsed message, if it is kept; see `read_message`.
    """

    __slots__ = ("data", "fds", "is_read", "message")

    @_interrupts.promptly
    def __init__(self, data: bytes, fds: list[int]) -> None:
        self.data = data
        self.fds = fds
        self.is_read = False
        self.message: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Received) and (self.data, self.fds) == (other.data, other.fds)

    __hash__ = None  # type: ignore[assignment]

    def close(self) -> None:
        """Close the fds, except those that mappings have taken over. Closing twice is allowed."""
        if self.fds:
            give_back_all(self.fds)


class _ReceivedWithFds(Received):
    """A message with fds, which are closed with it: a signal handler may raise while its reader handles an error."""

    __slots__ = ()

    # A default argument, because the names of this module may be gone when the program ends.
    @_interrupts.promptly
    def __del__(self, give_back: Any = give_back_all) -> None:
        if self.fds:
            give_back(self.fds)


class PrivateFd(OwnedFd):
    """An fd that is closed in forked children."""

    @_interrupts.promptly
    def __init__(self, fd: int = -1) -> None:
        self.fd = fd
        close_in_children(self)


class Closable(Protocol):
    """Anything with ``close()``."""

    def close(self) -> None:
        """Close it."""
        ...


class Sender:
    """The sending end of a channel. Any number of processes may share it."""

    def __init__(self, end: MessageSocket) -> None:
        self._socket = end
        self._checked_until = 0.0
        _ends.add(self)
        if _leaks.is_on:
            _leaks.made(self, "channel end")

    def fileno(self) -> int:
        """Return the fd; -1 when closed."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether this end was closed in this process."""
        return self._socket.fileno() < 0

    def send(self, data: bytes, fds: Sequence[int] = (), *, wait: bool = True, sent: list[int] | None = None) -> bool:
        """Send one message, whole.

        Args:
            data: At most `MAX_MESSAGE` bytes, at least 1.
            fds: Sent beside the message; they stay open here as well.
            wait: Wait for room in the kernel's queue.
            sent: Gets an item in the C call that sends, so that an interrupted caller knows whether the message was
                sent.

        Returns:
            False if there is no room and *wait* is false.

        Raises:
            ChannelBrokenError: No process can receive any more.
            ChannelClosedError: This end was closed.
            OSError: The kernel refused, and nothing was sent. ``EMFILE``: this process has too many open files.
                ``ETOOMANYREFS``: too many fds of this user are in flight, and waiting did not help. ``EMSGSIZE``:
                *data* is larger than ``net.core.wmem_max`` allows.
        """
        if _now() > self._checked_until:
            self._check_again()
        if fds:
            return self._send_with_fds(data, fds, sent, wait=wait)
        flags = 0 if wait else _DONTWAIT
        try:
            if sent is None:
                self._socket.send(data, flags)
            else:
                next(map(sent.append, map(self._socket.send, (data,), (flags,))))
        except OSError as error:
            return self._may_send_again(error, data, wait=wait) and self._send_once(
                data, (), sent, wait=wait, may_grow=False
            )
        ledger.messages += 1
        if ledger.watches:
            _note(data, "sent")
        return True

    def _send_with_fds(self, data: bytes, fds: Sequence[int], sent: list[int] | None, *, wait: bool) -> bool:
        try:
            return self._send_once(data, fds, sent, wait=wait)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS or not wait or len(fds) > kernel.fd_limit():
                raise
        # Other processes of this user have fds in flight. The kernel does not report when these arrive.
        deadline = time.monotonic() + _PATIENCE
        while not self._send_once(data, fds, sent, wait=time.monotonic() > deadline):
            time.sleep(_PAUSE)
        return True

    def _send_once(
        self, data: bytes, fds: Sequence[int], sent: list[int] | None, *, wait: bool, may_grow: bool = True
    ) -> bool:
        carrier = None
        direct = fds
        flags = 0 if wait else _DONTWAIT
        if len(fds) > DIRECT_FDS:
            carrier = _carry(fds[DIRECT_FDS:], wait=wait)
            if carrier is None:
                return False
            direct = [*fds[:DIRECT_FDS], carrier.fileno()]
        try:
            ancillary = [(_LEVEL, _KIND, array.array("i", direct))] if direct else []
            if sent is None:
                self._socket.sendmsg([data], ancillary, flags)
            else:
                next(map(sent.append, map(self._socket.sendmsg, ([data],), (ancillary,), (flags,))))
        except OSError as error:
            if not self._may_send_again(error, data, wait=wait):
                return False
            if not may_grow:
                raise
            return self._send_once(data, fds, sent, wait=wait, may_grow=False)
        finally:
            if carrier is not None:
                carrier.close()
        ledger.messages += 1
        if ledger.watches:
            _note(data, "sent")
        return True

    def _may_send_again(self, error: OSError, data: bytes, *, wait: bool) -> bool:
        """Return False if there was no room, and True if the kernel's queue has grown; otherwise raise."""
        if not _interrupts.is_of_kernel(error):
            raise error
        if error.errno in _FULL and not wait:
            return False
        if error.errno == errno.EMSGSIZE and len(data) <= MAX_MESSAGE:
            # The message is larger than the kernel's queue. The kernel doubles the size that is asked for.
            self.grow(len(data))
            return True
        if error.errno == errno.EBADF and self._socket.fileno() < 0:  # otherwise one of the fds is bad
            raise ChannelClosedError(errno.EBADF, "cannot send: this end of the channel was closed") from error
        _raise_if_lost(self._socket, error, "send")
        if error.errno in _GONE:
            raise ChannelBrokenError(errno.EPIPE, "cannot send: every process at the other end is gone") from error
        raise error

    def sending(self, data: bytes) -> tuple[Any, ...]:
        """Return a C function and its arguments that send *data* if there is room at once; otherwise it raises.

        A caller can combine it with another C call, so that no signal handler runs between the two.
        """
        if _now() > self._checked_until:
            self._check_again()
        return self._socket.send, data, _DONTWAIT

    def _check_again(self) -> None:
        # The number may belong to a socket of the program by now, which would get the message.
        _check(self._socket, "send")
        self._checked_until = _now() + _CHECKED_FOR

    def duplicate(self) -> Sender:
        """Return the same end under another fd."""
        self.check("share this end")
        return Sender(self._socket.dup())

    def check(self, what: str) -> None:
        """Raise `ChannelClosedError`, which begins with *what*, if other code in this process has closed the fd."""
        _check(self._socket, what)

    def grow(self, nbytes: int) -> None:
        """Ask the kernel to buffer up to this many bytes; it may grant less."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def forget_sent(self) -> None:
        """Release fds that were sent and will never be received, on platforms where the sender has to do so."""
        kernel.forget_sent(self._socket)

    def end(self) -> None:
        """End the stream: receivers get None once every message is received."""
        if self._socket.fileno() >= 0:
            self.check("end this stream")
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end in this process. Closing twice is allowed."""
        self._socket.close()
        if _leaks.is_on:
            _leaks.unmade(self)


class Receiver:
    """The receiving end of a channel. Each message goes to one of the processes that share it."""

    def __init__(self, end: MessageSocket) -> None:
        self._socket = end
        self._checked_until = 0.0
        # Messages that were received but not read completely: as the kernel returned them, or `Received`.
        self.inbox: collections.deque[Any] = collections.deque()
        _ends.add(self)
        if _leaks.is_on:
            _leaks.made(self, "channel end")

    def fileno(self) -> int:
        """Return the fd, which is readable when a message is there; -1 when closed."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether this end was closed in this process."""
        return self._socket.fileno() < 0

    def receive_nowait(self) -> Received | None:
        """Receive a message without waiting.

        Raises:
            BlockingIOError: There is none.
            ChannelClosedError: This end was closed.
            ChannelBrokenError: The received bytes are not a message; they are discarded.

        Returns:
            The message, or None if all senders are gone and every message was received.
        """
        return self.take(_RECEIVE)

    def receive(self) -> Received | None:
        """Wait for a message; otherwise as `receive_nowait`.

        If several processes and threads wait, the kernel wakes one of them.
        """
        return self.take(WAIT)

    def has_message(self) -> bool:
        """Return whether a message can be received."""
        return bool(self.inbox) or kernel.has_message(self._socket)

    def looker(self) -> Callable[[int], Any]:
        """Return a function that, called with 0, returns whether there is something to receive; for one wait only.

        It takes a tenth of the time of trying to receive, which raises if there is nothing. It does not see messages
        that an interrupt has left in `inbox`.
        """
        # A new poller for each wait, because a signal handler may use this end during a call.
        poller = kernel.poller()
        poller.register(self._socket.fileno(), kernel.READABLE)
        return poller.poll

    def first(self) -> Received | None:
        """Return the first message, and leave it in place until `drop` removes it.

        For one thread at a time, which drops a message only when all of it was read, so that an interrupt loses no
        message.

        Raises:
            BlockingIOError, ChannelClosedError, ChannelBrokenError: As for `receive_nowait`.
        """
        inbox = self.inbox
        while True:
            if not inbox:
                self._fill(inbox, _RECEIVE)
                continue  # a signal handler may have read it
            arrived: Any = inbox[0]
            if isinstance(arrived, Received):
                return arrived
            received = None
            data, ancillary, flags, _ = arrived
            if not ancillary and not flags & UNUSUAL and data:
                # A fast path of the code below, for most messages.
                received = Received(data, [])
                if inbox and inbox[0] is arrived:
                    inbox[0] = received
                    ledger.messages += 1
                    if ledger.watches:
                        _note(data, "received")
                continue
            try:
                received = self._opened(arrived)
            except ChannelBrokenError:
                if inbox and inbox[0] is arrived:
                    del inbox[0]
                raise
            # No call may come from here to the end of the loop, because a signal handler may read messages, too.
            if inbox and inbox[0] is arrived:
                if received is None:
                    del inbox[0]
                    return None
                inbox[0] = received
            elif received is not None:
                received.fds = []  # a signal handler has read it, and owns them

    def drop(self, received: Received) -> None:
        """Remove a message that `first` returned, unless another process has removed it."""
        received.close()
        inbox = self.inbox
        if inbox and inbox[0] is received:
            del inbox[0]

    def receiving(self) -> Iterator[Any]:
        """Return an iterator that receives a message as the kernel returns it, or raises if there is none."""
        if _now() > self._checked_until:
            self._check_again()
        return map(self._socket.recvmsg, _MESSAGE_SIZE, _ANCILLARY_SIZE, _HOW)

    def take(self, how: int = _RECEIVE) -> Received | None:
        """Receive a message: wait for one, or as `receive_nowait`."""
        arrived: list[Any] = []
        inbox = self.inbox
        try:
            if inbox:
                with contextlib.suppress(IndexError):  # another thread was faster
                    arrived.extend(itertools.starmap(inbox.popleft, _ONCE))
            if not arrived:
                if _now() > self._checked_until:
                    self._check_again()
                try:
                    # As in `_fill`.
                    next(map(arrived.append, map(self._socket.recvmsg, _MESSAGE_SIZE, _ANCILLARY_SIZE, (how,))))
                except BlockingIOError:
                    raise
                except OSError as error:
                    if not _interrupts.is_of_kernel(error):  # such as the TimeoutError of an alarm
                        raise
                    self._fill(arrived, how)
            first = arrived[0]
            if isinstance(first, Received):
                return first
            data, ancillary, flags, _ = first
            if not ancillary and not flags & UNUSUAL and data:
                # A fast path of the code below, for most messages.
                ledger.messages += 1
                if ledger.watches:
                    _note(data, "received")
                return Received(data, [])
            return self._opened(first)
        except ChannelBrokenError:
            raise
        except BaseException:
            # Put it at the front, so that it is received next.
            inbox.extendleft(arrived)
            raise

    @_interrupts.promptly
    def put_back(self, received: Received) -> None:
        """Put back a message that was not read completely because of an interrupt."""
        if received.is_read:
            received.close()
        else:
            self.inbox.appendleft(received)

    def _check_again(self) -> None:
        # The number may belong to a socket of the program by now, which would lose a message.
        _check(self._socket, "receive")
        self._checked_until = _now() + _CHECKED_FOR

    def _fill(self, arrived: list[Any] | collections.deque[Any], how: int) -> None:
        if _now() > self._checked_until:
            self._check_again()
        try:
            # CLOEXEC is set by the same call. Otherwise another thread might start a program in between, which would
            # inherit the fd. One C call receives and stores the message, so that no signal handler runs in between.
            # ``extend`` would lose the StopIteration of a handler.
            next(map(arrived.append, map(self._socket.recvmsg, _MESSAGE_SIZE, _ANCILLARY_SIZE, (how,))))
        except BlockingIOError:
            raise
        except OSError as error:
            if not _interrupts.is_of_kernel(error):
                raise
            if error.errno == errno.ECONNRESET:
                # The other end was closed before it had read all our messages. The kernel reports this once, before
                # the messages that the other end had sent.
                self._fill(arrived, how)
                return
            if error.errno == errno.EBADF and self._socket.fileno() < 0:
                raise ChannelClosedError(errno.EBADF, "cannot receive: this end of the channel was closed") from error
            _raise_if_lost(self._socket, error, "receive")
            raise

    def _opened(self, arrived: tuple[bytes, list[Any], int, Any]) -> Received | None:
        data, ancillary, flags, _ = arrived
        fds = _fds_in(ancillary) if ancillary else []
        if len(fds) > DIRECT_FDS or len(ancillary) > 1:
            _unload(ancillary)
            fds = _fds_in(ancillary)
        if flags & UNUSUAL or not data:
            if flags & _FDS_LOST:
                kernel.raise_fd_limit()  # too late for this message; its reader reports the missing fds
            if not data:
                kernel.close_all(fds)
                if kernel.has_ended(self._socket):
                    return None
                raise ChannelBrokenError("received an empty message, which forkshm never sends")
            if flags & _TRUNCATED:
                kernel.close_all(fds)
                raise ChannelBrokenError(
                    f"received a message of more than {MAX_MESSAGE:,} bytes, which forkshm never sends"
                )
        ledger.messages += 1
        if ledger.watches:
            _note(data, "received")
        if not fds:
            return Received(data, fds)
        received = _ReceivedWithFds(data, [])
        # No call from here to the return: until then, the message as it came owns the fds.
        received.fds = fds
        return received

    def duplicate(self) -> Receiver:
        """Return the same end under another fd."""
        self.check("share this end")
        return Receiver(self._socket.dup())

    def check(self, what: str) -> None:
        """Raise `ChannelClosedError`, which begins with *what*, if other code in this process has closed the fd."""
        _check(self._socket, what)

    def close(self) -> None:
        """Close this end in this process and discard unread messages. Closing twice is allowed."""
        self._socket.close()
        inbox = self.inbox
        while inbox:
            arrived = inbox[0]
            if not isinstance(arrived, Received) and arrived[1]:
                arrived = Received(arrived[0], _fds_in(arrived[1]))
                if inbox:
                    inbox[0] = arrived
            if isinstance(arrived, Received):
                arrived.close()
            if inbox and inbox[0] is arrived:
                del inbox[0]
        if _leaks.is_on:
            _leaks.unmade(self)


# What the kernel says of an fd that other code has closed.
_LOST = frozenset((errno.EBADF, errno.ENOTSOCK))


def _raise_if_lost(end: MessageSocket, error: OSError, what: str) -> None:
    """Raise an error that says so if other code has closed the fd of a channel. Its number may be in use again."""
    # Otherwise an fd in the message is bad.
    if error.errno in _LOST or error.errno in _GONE:
        _check(end, what, error)


def _check(end: MessageSocket, what: str, error: OSError | None = None) -> None:
    if end.fileno() >= 0 and not end.is_intact():
        raise ChannelClosedError(
            errno.EBADF,
            f"cannot {what}: this channel used fd {end.fileno()}, which other code in this process has closed. Close "
            "only fds that your code has opened, and create the pool, queue or pipe anew.",
        ) from error


def _note(data: bytes, direction: str) -> None:
    ledger.note([(len(data), "a message")], direction, message=True)


# All open ends of this process.
_ends: weakref.WeakSet[Sender | Receiver] = weakref.WeakSet()


def ends_open() -> int:
    """Return the number of channel ends open in this process, each of which is an fd."""
    return len({end.fileno() for end in list(_ends)} - {-1})


def pair() -> tuple[Sender, Receiver]:
    """Return a new channel: its sending and its receiving end.

    Raises:
        OSError: The limit on open files is reached.
    """
    out, into = kernel.message_sockets()
    return Sender(out), Receiver(into)


def _carry(fds: Sequence[int], *, wait: bool) -> MessageSocket | None:
    """Put fds into the queue of a new socket; return its receiving end, or None if there is no room now."""
    out, into = kernel.message_sockets()
    start = 0
    try:
        while True:
            if start >= len(fds):
                break
            some = fds[start : start + _CARRIED_FDS]
            try:
                out.sendmsg([_CARRIER_ITEM], [(_LEVEL, _KIND, array.array("i", some))], _DONTWAIT)
            except OSError as error:
                # The soft limit on open files also limits a user's fds in flight.
                if error.errno == errno.ETOOMANYREFS and kernel.raise_fd_limit():
                    continue
                raise
            start += len(some)
    except BaseException as error:
        into.close()
        if not isinstance(error, OSError) or error.errno not in _FULL or not _interrupts.is_of_kernel(error):
            raise
        if start and len(fds) + DIRECT_FDS > kernel.fd_limit():  # too many even if no others were in flight
            raise _too_many(error, len(fds) + DIRECT_FDS, start + DIRECT_FDS) from error
        if wait:
            raise
        return None
    finally:
        out.close()
    return into


def _too_many(error: OSError, wanted: int, fitted: int) -> OSError:
    return OSError(
        error.errno,
        f"cannot send {wanted:,} fds in one message ({os.strerror(error.errno or 0)} after {fitted:,}): the kernel "
        "limits the fds that a user has in flight to about the number of files that a process may open. Let arrays "
        "share one region, send fewer at once, or raise the limit (ulimit -n).",
    )


def _fds_in(ancillary: list[Any]) -> list[int]:
    """Return the fds of a message, with those of its carrier that `_unload` has added."""
    if len(ancillary) == 1:
        return kernel.received_fds(ancillary)
    carried = itertools.chain.from_iterable(added[1] for added in ancillary[2:])
    return kernel.received_fds([*ancillary[:1], *carried])


def _unload(ancillary: list[Any]) -> None:
    """Add to a message's ancillary data the messages in the queue of its carrier, the last of its fds.

    The ancillary data owns the carrier and all fds at every moment, so an interrupted call can be repeated. If the
    limit on open files leaves no room, the remaining fds are lost. The fds before them are in their places.
    """
    if len(ancillary) == 1:
        fds = kernel.received_fds(ancillary)
        direct = _LEVEL, _KIND, array.array("i", fds[:-1]).tobytes()
        try:
            carrier = kernel.message_socket(fds[-1])
        except OSError:
            return  # not sent by forkshm: the reader of the message finds one fd too many
        # No call between the creation of the carrier and this store.
        ancillary[:] = direct, carrier
    carrier = ancillary[1]
    arguments = (len(_CARRIER_ITEM),), (_CARRIED_ANCILLARY,), (_RECEIVE,)
    with contextlib.suppress(OSError):  # not a carrier of forkshm, or an interrupted call has closed it
        while True:
            ancillary.extend(map(carrier.recvmsg, *arguments))
            data, added, flags, _ = ancillary[-1]
            kernel.received_fds(added)  # raises the soft limit on open files before the next message needs it
            if flags & _FDS_LOST:
                kernel.raise_fd_limit()
                break
            if not data:
                break
    carrier.close()


# Ends that only this process may hold. If a child kept a copy, the other side would not notice that this process is
# gone.
_private_ends: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_in_children(*ends: Closable) -> None:
    """Close these ends in every process that is forked from now on."""
    _private_ends.update(ends)


def _in_child() -> None:
    for end in list(_private_ends):
        end.close()
    _private_ends.clear()


_system.register_at_fork(after_in_child=_in_child)
