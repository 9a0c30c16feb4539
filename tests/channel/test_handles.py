"""Queues, connections and sockets can be sent as arguments; the standard library only lets children inherit them."""

from __future__ import annotations

import contextlib
import gc
import os
import socket

import functions as f
import pytest
from capability_skips import has
from consuming import receive

import forkshm
from forkshm.backend import kernel
from forkshm.pickler import pack
from forkshm.pickler._handles import Handle


def through(thing):
    """Pickle and unpickle, with the fds duplicated as the kernel would."""
    payload = pack(thing)
    fds = [kernel.duplicate(fd) for fd in payload.fds]
    data = payload.data
    payload.close()
    del payload
    incoming, _ = receive(data, 0, fds)
    assert fds == []
    return incoming


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_a_queue_is_an_argument_of_a_pool_that_was_there_before(pool, kind):
    queue = getattr(forkshm, kind)()
    pool.apply(f.nothing)

    def put(it, what):
        it.put(what)
        return it

    again = pool.apply(put, (queue, "item"))
    assert queue.get() == "item"
    again.put("and back")
    assert type(again) is type(queue)
    assert queue.get() == "and back"


def test_a_bounded_joinable_queue_is_the_same_at_both_ends(pool):
    queue = forkshm.JoinableQueue(2)

    def use(it):
        assert it.get() == 1
        it.task_done()
        it.put(2)
        it.put(3)
        return it.full()

    queue.put(1)
    assert pool.apply(use, (queue,)) is True
    assert queue.full()
    assert [queue.get(), queue.get()] == [2, 3]
    queue.task_done()
    queue.task_done()
    queue.join()
    with pytest.raises(ValueError, match="too many times"):
        queue.task_done()


def test_a_connection_is_handed_over_and_its_end_is_noticed(pool):
    here, there = forkshm.Pipe()

    def talk(end):
        end.send(end.recv() + 1)
        end.close()

    result = pool.apply_async(talk, (there,))
    here.send(1)
    assert here.recv() == 2
    result.get()
    there.close()
    with pytest.raises(EOFError):
        here.recv()
    here.close()


@pytest.mark.parametrize("duplex", [True, False])
def test_a_connection_keeps_its_direction(duplex):
    with contextlib.closing(forkshm.Queue()) as queue:
        receiving, sending = forkshm.Pipe(duplex)
        queue.put((receiving, sending))
        receiving.close()
        sending.close()
        one, other = queue.get()
        other.send("through")
        assert one.recv() == "through"
        assert (one.readable, one.writable, other.readable, other.writable) == (True, duplex, duplex, True)
        one.close()
        other.close()


def test_queues_cross_through_queues_and_pipes_in_one_message():
    here, there = forkshm.Pipe()
    queue, other = forkshm.Queue(), forkshm.SimpleQueue()
    array = forkshm.zeros(5)
    here.send({"queues": [queue, other, queue], "array": array})
    got = there.recv()
    first, second, third = got["queues"]
    assert first is third
    first.put("a")
    second.put("b")
    got["array"][0] = 1
    assert (queue.get(), other.get(), array[0]) == ("a", "b", 1)
    here.close()
    there.close()


def test_sockets(pool):
    here, there = socket.socketpair()
    with here:
        with there:

            def talk(end):
                with end:
                    end.sendall(b"hello")
                    return end.family, end.type

            assert pool.apply(talk, (there,)) == (there.family, there.type)
        assert here.recv(10) == b"hello"
        assert here.recv(10) == b""
    if not has("handles_in_messages"):  # sent by the standard library's method, with a thread that stays
        forkshm.resource_sharer.stop(timeout=20)


def test_closed_ones_are_refused():
    here, there = forkshm.Pipe()
    queue, simple = forkshm.Queue(), forkshm.SimpleQueue()
    for thing in (here, there, queue, simple):
        thing.close()
        with pytest.raises(OSError, match="closed"):
            pack(thing)


def test_unclaimed_handles_are_closed():
    here, there = forkshm.Pipe()
    incoming = through([here, there])
    del incoming
    here.send(1)
    assert there.recv() == 1
    payload = pack(here)
    payload.close()
    del payload
    gc.collect()
    here.close()
    with pytest.raises(EOFError):
        there.recv()
    there.close()


@pytest.mark.needs("inheritance")
def test_a_child_keeps_no_handle_of_its_parents_messages(in_child):
    read_end, write_end = os.pipe()
    handle = Handle(write_end)
    os.close(write_end)
    fd = handle.fd
    assert in_child(lambda: os.path.lexists(f"/proc/self/fd/{fd}")) == 0
    del handle
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_a_sender_may_close_its_queue_at_once(pool):
    queue = forkshm.Queue()
    queue.put("inside")
    result = pool.apply_async(_get, (queue,))
    queue.close()
    assert result.get() == "inside"


def _get(queue):
    return queue.get(timeout=30)
