"""A kernel queue that is smaller than one message."""

from __future__ import annotations

import errno
import socket

import numpy as np
import pytest

import forkshm
from forkshm.backend import kernel
from forkshm.channel import pair
from forkshm.channel._endpoint import DIRECT_FDS, MAX_MESSAGE


@pytest.fixture
def _tiny_queues(monkeypatch):
    """A small net.core.wmem_default: the kernel's minimum is 4.5 KB."""
    made = kernel.message_sockets

    def message_sockets():
        ends = made()
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return ends

    monkeypatch.setattr(kernel, "message_sockets", message_sockets)


@pytest.mark.needs("queue_sizes")
@pytest.mark.usefixtures("_tiny_queues")
@pytest.mark.parametrize("count", [0, 1, DIRECT_FDS, DIRECT_FDS + 1], ids=["0", "1", "16", "17"])
@pytest.mark.parametrize("size", [10_000, MAX_MESSAGE])
def test_a_message_larger_than_the_queue_enlarges_the_queue(size, count):
    sender, receiver = pair()
    data = bytes(range(256)) * (size // 256)
    for _ in range(3):
        assert sender.send(data, [0] * count, wait=False)
        received = receiver.receive_nowait()
        assert (received.data, len(received.fds)) == (data, count)
        for fd in received.fds:
            kernel.identify(fd)
        received.close()
    sender.close()
    receiver.close()


@pytest.mark.needs("queue_sizes")
@pytest.mark.usefixtures("_tiny_queues")
def test_a_queue_that_may_not_be_larger_says_so(monkeypatch):
    sender, receiver = pair()
    monkeypatch.setattr(type(sender), "grow", lambda self, nbytes: None)  # as with a small net.core.wmem_max
    with pytest.raises(OSError, match="too long") as caught:
        sender.send(bytes(MAX_MESSAGE))
    assert caught.value.errno == errno.EMSGSIZE
    sender.send(b"small")
    assert receiver.receive_nowait().data == b"small"
    sender.close()
    receiver.close()


@pytest.mark.usefixtures("_tiny_queues")
def test_a_pool_and_a_queue_work_over_tiny_queues():
    """Send messages of all sizes, from a few bytes to those whose pickle goes through the arena."""
    with forkshm.Pool(2) as pool:
        for size in (0, 100, 5_000, 30_000, 65_000, 70_000, 10**6):
            words = ["x" * 10] * (size // 10)
            text, plain = "y" * size, np.arange(size)
            assert pool.apply(lambda *args: args, (words, text)) == (words, text)
            assert (pool.apply(np.copy, (plain,)) == plain).all()
        results = [pool.apply_async(len, (["z"] * 5_000,)) for _ in range(200)]
        assert [result.get() for result in results] == [5_000] * 200
        assert pool.map(abs, range(2_000)) == list(range(2_000))
    queue = forkshm.Queue()
    for size in (0, 100, 5_000, 65_000, 10**6):
        queue.put("y" * size)
        assert queue.get(timeout=30) == "y" * size
    for number in range(100):
        queue.put([number] * 2_000)
    assert [queue.get(timeout=30)[7] for _ in range(100)] == list(range(100))
    queue.close()
