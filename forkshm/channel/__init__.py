"""Layer 4 of 6. Sends payloads as messages between processes.

The kernel keeps the queue: a socket with message boundaries, shared by any number of senders and receivers. A message
is delivered whole, with its fds, to exactly one receiver, or not at all. There is no lock that a dying process could
keep.
"""

from forkshm._help import publish
from forkshm.channel._connection import Connection, Pipe
from forkshm.channel._endpoint import PrivateFd, Received, Receiver, Sender, close_in_children, ends_open, pair
from forkshm.channel._message import (
    HEADER_SIZE,
    Header,
    Kind,
    Message,
    open_answer,
    read_header,
    read_message,
    write_answers,
    write_message,
    write_result,
)
from forkshm.channel._queue import JoinableQueue, OnError, Queue
from forkshm.channel._simple_queue import SimpleQueue
from forkshm.channel._spin import SPINNERS, Spin

__all__ = [
    "HEADER_SIZE",
    "Connection",
    "Header",
    "JoinableQueue",
    "Kind",
    "Message",
    "Pipe",
    "PrivateFd",
    "Queue",
    "Received",
    "Receiver",
    "Sender",
    "SimpleQueue",
    "close_in_children",
    "ends_open",
    "open_answer",
    "pair",
    "read_header",
    "read_message",
    "write_answers",
    "write_message",
    "write_result",
]
# For the other packages of forkshm.
__all__ += [
    "SPINNERS",
    "OnError",
    "Spin",
]

publish(globals())
