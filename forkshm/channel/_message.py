"""The format of messages: a kind, a number, and payloads."""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm.descriptor import write_plain
from forkshm.errors import ChannelBrokenError
from forkshm.pickler import Payload, ReceivedPayload, open_plain, receive, skip

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from forkshm.channel._endpoint import Received

__all__ = (
    "HEADER_SIZE",
    "Header",
    "Kind",
    "Message",
    "open_answer",
    "read_header",
    "read_message",
    "write_answers",
    "write_message",
    "write_result",
)

_HEADER = struct.Struct("<3sBBB2xQQ")
_MAGIC = b"fsm"
HEADER_SIZE = _HEADER.size
"""Bytes before the payloads."""
_VERSION = 1


class Kind(enum.IntEnum):
    """The subject of a message."""

    CALL = 1
    """Payloads: function; (arguments, keyword arguments)."""
    MAP = 2
    """Payloads: function; list of single arguments."""
    STARMAP = 3
    """Payloads: function; list of argument tuples."""
    RESULT = 4
    """Payload: the return value of a task."""
    ERROR = 5
    """Payloads: the exception of a task; its traceback as text."""
    INITIALIZER_FAILED = 6
    """Payloads: the exception of the initializer; its traceback as text."""
    BATCH = 8
    """Payloads: function; (MAP or STARMAP, chunks). Each chunk is a task. The first has the message's number, the
    others the numbers that follow."""
    ANSWERS = 9
    """No payloads, but many small answers in a row; see `ResultBatch` of the pool."""
    WAKE = 7
    """No payloads. Wakes the receiver, which looks for changes."""
    CANCELLED = 10
    """No payloads. A task was not begun, because it is marked as cancelled."""


_KINDS = {int(kind): kind for kind in Kind}


class Header(NamedTuple):
    """The header of a message, which precedes its payloads."""

    kind: Kind
    number: int
    """The number of the task."""
    group: int
    """For a task: tasks of one group have the same function payload; 0 is no group. For a result: the nanoseconds that
    the task took."""
    payloads: int
    """The number of payloads."""


class Message(NamedTuple):
    """A received message, whose payloads are not opened yet."""

    kind: Kind
    number: int
    group: int
    """As in `Header`."""
    payloads: list[ReceivedPayload | None]
    """None stands for a function payload that the receiver already has from the group."""


def write_message(kind: Kind, number: int, *payloads: Payload, group: int = 0) -> tuple[bytes, Sequence[int]]:
    """Return the bytes of a message, and the fds to send beside them."""
    header = _HEADER.pack(_MAGIC, _VERSION, kind, len(payloads), number, group)
    if len(payloads) == 1:
        return header + payloads[0].data, payloads[0].fds
    return header + b"".join([payload.data for payload in payloads]), [fd for payload in payloads for fd in payload.fds]


def write_answers(content: bytes) -> bytes:
    """Return the message with the content of a result batch."""
    return _HEADER.pack(_MAGIC, _VERSION, Kind.ANSWERS, 0, 0, 0) + content


def write_result(number: int, stream: bytes, nanoseconds: int) -> bytes:
    """Return the message with a result that is only a pickle; a fast path of `write_message`."""
    # Kind.RESULT
    return _HEADER.pack(_MAGIC, _VERSION, 4, 1, number, nanoseconds) + write_plain(len(stream)) + stream


def read_header(data: bytes) -> Header:
    """Return the header of a message, without reading its payloads.

    Raises:
        ChannelBrokenError: The bytes are not a message.
    """
    try:
        magic, version, kind, count, number, group = _HEADER.unpack_from(data)
    except struct.error:
        raise ChannelBrokenError(f"received {len(data)} bytes, too few for a message of forkshm") from None
    if magic != _MAGIC or version != _VERSION or kind not in _KINDS:
        raise ChannelBrokenError(f"received bytes that are not a message of forkshm {_VERSION}: {data[:16]!r}")
    return Header(_KINDS[kind], number, group, count)


def open_answer(data: bytes) -> Any:
    """Unpickle the one plain payload of a small answer.

    Raises:
        LookupError: The message has more than that; use `read_message`.
        Exception: Whatever unpickling raises.
    """
    if data[5] != 1:
        raise LookupError("not one payload")
    return open_plain(data, _HEADER.size)


def read_message(
    received: Received, header: Header | None = None, known_groups: Container[int] = (), *, keep: bool = False
) -> Message:
    """Read a message, take over its memory, and close its fds. An interrupted call can be repeated.

    The first payload is skipped if the message's group is in *known_groups*. With *keep*, the result is kept in
    ``received.message``, for a signal handler that reads the same message before it is dropped.

    Raises:
        ChannelBrokenError: The bytes are not a message.
        RegionGoneError: Memory that the message names did not arrive.
        OSError: The kernel refused a mapping or a lock.
    """
    data, fds = received.data, list(received.fds)
    try:
        kind, number, group, count = read_header(data) if header is None else header
        position = _HEADER.size
        payloads: list[ReceivedPayload | None] = []
        for index in range(count):
            if index == 0 and group in known_groups:
                position = skip(data, position, fds)
                payloads.append(None)
            else:
                incoming, position = receive(data, position, fds)
                payloads.append(incoming)
        if position != len(data) or fds:
            raise ChannelBrokenError(f"a message has {len(data) - position} bytes and {len(fds)} fds too many")
    except Exception:
        received.close()
        raise
    message = Message(kind, number, group, payloads)
    if keep:
        received.message = message  # before its fds are closed
    received.close()
    return message
