"""Messages of one object, which queues and connections send."""

from __future__ import annotations

import pickle
import time
from typing import TYPE_CHECKING, Any

from forkshm._interrupts import is_of_kernel
from forkshm.backend import kernel
from forkshm.channel._endpoint import WAIT
from forkshm.descriptor import is_plain
from forkshm.errors import ChannelBrokenError
from forkshm.pickler import receive

if TYPE_CHECKING:
    from forkshm.channel._endpoint import Received, Receiver
    from forkshm.channel._spin import Spin

__all__ = ("STREAM", "open_item", "small_stream", "stream_of", "wait_message", "wait_ready")

STREAM = 0x80
"""The first byte of every pickle of protocol 2 and later. A payload begins with its flags, which are smaller."""

_wait_readable = kernel.wait_readable
_dumps, _loads = pickle.dumps, pickle.loads
_NUMBERS = frozenset({int, float, bool, type(None), complex})
_MAY_BE_SMALL = _NUMBERS | {str, bytes, tuple, list, dict}
_FEW, _SHORT, _SMALL = 16, 1024, 16 * 1024


def wait_message(receiver: Receiver, spin: Spin, timeout: float | None) -> Received | None:
    """Wait for a message: spin for a while, then sleep.

    Raises:
        BlockingIOError: There was none within *timeout* seconds.
        ChannelClosedError: This end was closed.

    Returns:
        As for `Receiver.take`.
    """
    received: Received | None = None
    try:
        began = time.perf_counter()
        look = spin.begin()
        look_until = began + (look if timeout is None else min(look, timeout))
        while time.perf_counter() < look_until:
            try:
                received = receiver.take()
            except BlockingIOError as error:
                if not is_of_kernel(error):  # raised by a signal handler
                    raise
                continue
            spin.end(time.perf_counter() - began)
            return received
        receiver.check("receive")
        if timeout is None:
            received = receiver.take(WAIT)
        else:
            while True:
                ready = wait_ready(receiver, began + timeout - time.perf_counter())
                try:
                    received = receiver.take()
                    break
                except BlockingIOError as error:
                    if not ready or not is_of_kernel(error):
                        raise
                    # Another receiver was faster.
        spin.end(time.perf_counter() - began)
        return received
    except BaseException:
        if received is not None:  # a signal handler has raised: the next call gets the message
            receiver.put_back(received)
        raise


def wait_ready(receiver: Receiver, timeout: float | None) -> bool:
    """Wait until there is a message or all senders are gone; return False if neither happened in time."""
    if receiver.inbox:
        return True
    if timeout != 0:
        receiver.check("wait for a message")
    return _wait_readable(receiver, timeout)


def small_stream(thing: Any) -> bytes | None:
    """Return the pickle of a number, a short text, or a few of them; None for anything else.

    Most items are of this kind. They do not need forkshm's pickler, which takes four times as long, and have no head.
    """
    kind = type(thing)
    if kind not in _MAY_BE_SMALL:
        return None
    if kind is tuple or kind is list or kind is dict:
        if len(thing) > _FEW:
            return None
        for item in thing if kind is not dict else (*thing, *thing.values()):
            kind = type(item)
            if kind not in _NUMBERS and ((kind is not str and kind is not bytes) or len(item) > _SHORT):
                return None
    elif kind not in _NUMBERS and ((kind is not str and kind is not bytes) or len(thing) > _SHORT):
        return None
    stream = _dumps(thing, 5)
    return stream if len(stream) <= _SMALL else None


def stream_of(data: bytes) -> memoryview | None:
    """Return the pickle in a message that contains nothing else, or None."""
    if data[0] == STREAM:
        return memoryview(data)
    start = is_plain(data, 0)
    return memoryview(data)[start:] if start else None


def open_item(received: Received) -> Any:
    """Unpickle the one object of a message, and close its fds. An interrupted call can be repeated.

    Raises:
        ChannelBrokenError: The bytes are not a payload.
        RegionGoneError: Memory that the payload names did not arrive.
        OSError: The kernel refused a mapping or a lock.
        Exception: Whatever unpickling raises.
    """
    data = received.data
    if not received.fds:
        if data[0] == STREAM:
            return _loads(data)
        if start := is_plain(data, 0):
            return _loads(memoryview(data)[start:])
    left = list(received.fds)
    incoming, position = receive(data, 0, left)
    if position != len(data) or left:
        raise ChannelBrokenError(f"a message has {len(data) - position} bytes and {len(left)} fds too many")
    value = incoming.open()
    received.is_read = True
    received.close()
    return value
