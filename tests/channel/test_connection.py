"""Pipe(): the contract of the standard library, and forkshm's additions."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import pickle
import selectors
import socket
import threading
import time

import numpy as np
import pytest
from capability_skips import has

import forkshm
from forkshm.backend import kernel

SIZES = [0, 1, 100, 16 * 1024, 16 * 1024 + 1, 65_536, 1_000_000]


@pytest.fixture(params=[True, False], ids=["duplex", "simplex"])
def ends(request, mp):
    """Provide a receiving and a sending end."""
    receiving, sending = mp.Pipe(request.param)
    with receiving, sending:
        yield receiving, sending


@pytest.fixture
def ours():
    one, other = forkshm.Pipe()
    with one, other:
        yield one, other


class TestContract:
    """The promises of multiprocessing; both implementations are tested."""

    def test_objects_arrive_in_order(self, ends):
        receiving, sending = ends
        items = [None, 7, "text", b"bytes", [1, [2]], {"a": (1, 2)}, "x" * 5000]
        for item in items:
            sending.send(item)
        assert [receiving.recv() for _ in items] == items

    @pytest.mark.parametrize("size", SIZES)
    def test_bytes_arrive(self, ends, size):
        receiving, sending = ends
        data = os.urandom(size)
        thread = threading.Thread(target=sending.send_bytes, args=(data,))
        thread.start()
        got = receiving.recv_bytes()
        thread.join()
        assert type(got) is bytes
        assert got == data

    def test_a_part_of_a_buffer(self, ends):
        receiving, sending = ends
        sending.send_bytes(b"abcdef", 2)
        sending.send_bytes(b"abcdef", 2, 3)
        sending.send_bytes(memoryview(b"abcdef"), 6)
        assert [receiving.recv_bytes() for _ in range(3)] == [b"cdef", b"cde", b""]
        for arguments in ((-1,), (7,), (2, 5), (2, -1)):
            with pytest.raises(ValueError):
                sending.send_bytes(b"abcdef", *arguments)

    def test_buffers_of_other_items_are_their_bytes(self, ends):
        receiving, sending = ends
        import array

        numbers = array.array("i", range(5))
        sending.send_bytes(numbers)
        target = array.array("i", [0] * 6)
        assert receiving.recv_bytes_into(target, 4) == 20
        assert target.tolist() == [0, *range(5)]

    def test_bytes_into_a_buffer(self, ends):
        receiving, sending = ends
        target = bytearray(5)
        sending.send_bytes(b"abc")
        assert receiving.recv_bytes_into(target) == 3
        sending.send_bytes(b"de")
        assert receiving.recv_bytes_into(target, 3) == 2
        assert target == b"abcde"
        sending.send_bytes(b"abcdef")
        with pytest.raises(multiprocessing.BufferTooShort) as caught:
            receiving.recv_bytes_into(target)
        assert caught.value.args == (b"abcdef",)
        for offset in (-1, 6):
            with pytest.raises(ValueError):
                receiving.recv_bytes_into(target, offset)

    def test_bytes_that_are_too_many_are_refused(self, ends):
        receiving, sending = ends
        sending.send_bytes(b"abc")
        assert receiving.recv_bytes(3) == b"abc"
        with pytest.raises(ValueError):
            receiving.recv_bytes(-1)
        sending.send_bytes(b"abcd")
        with pytest.raises(OSError, match="bad message length"):
            receiving.recv_bytes(3)
        with pytest.raises(OSError):
            receiving.recv()

    def test_objects_and_their_pickles_are_the_same(self, ends):
        receiving, sending = ends
        sending.send({"a": 1})
        sending.send_bytes(pickle.dumps([1, 2]))
        assert pickle.loads(receiving.recv_bytes()) == {"a": 1}
        assert receiving.recv() == [1, 2]

    def test_poll(self, ends):
        receiving, sending = ends
        assert receiving.poll() is False
        began = time.monotonic()
        assert receiving.poll(0.05) is False
        # The standard library uses this clock, which has a resolution of 16 ms on Windows.
        assert time.monotonic() - began >= 0.05 - time.get_clock_info("monotonic").resolution
        sending.send(1)
        assert receiving.poll() is True
        assert receiving.poll(None) is True
        assert receiving.recv() == 1
        sending.close()
        if not has("unix_sockets") and not isinstance(receiving, forkshm.connection.Connection):
            return  # the standard library raises there
        assert receiving.poll(5) is True

    def test_the_end_of_the_other_side_is_told_after_the_last_message(self, ends):
        receiving, sending = ends
        sending.send("last")
        sending.close()
        assert receiving.recv() == "last"
        for call in (receiving.recv, receiving.recv_bytes, lambda: receiving.recv_bytes_into(bytearray(1))):
            with pytest.raises(EOFError):
                call()

    def test_sending_without_a_receiver_raises(self, ends):
        receiving, sending = ends
        receiving.close()
        for call in (
            lambda: sending.send(1),
            lambda: sending.send_bytes(b"x"),
            lambda: sending.send_bytes(bytes(10**5)),
        ):
            with pytest.raises(BrokenPipeError) as caught:
                call()
            assert caught.value.errno == errno.EPIPE

    def test_a_closed_end_is_refused(self, mp):
        for end in mp.Pipe():
            assert not end.closed
            assert end.fileno() >= 0
            end.close()
            end.close()
            assert end.closed
            for call in (
                functools.partial(end.send, 1),
                end.recv,
                end.poll,
                end.fileno,
                functools.partial(end.send_bytes, b""),
                end.recv_bytes,
            ):
                with pytest.raises(OSError, match="handle is closed"):
                    call()

    def test_one_way_is_one_way(self, mp):
        receiving, sending = mp.Pipe(duplex=False)
        with receiving, sending:
            assert (receiving.readable, receiving.writable) == (True, False)
            assert (sending.readable, sending.writable) == (False, True)
            for call in (lambda: receiving.send(1), lambda: receiving.send_bytes(b"")):
                with pytest.raises(OSError, match="read-only"):
                    call()
            for call in (sending.recv, sending.recv_bytes, sending.poll):
                with pytest.raises(OSError, match="write-only"):
                    call()

    def test_wait_and_selectors_take_them(self, ends):
        receiving, sending = ends
        assert multiprocessing.connection.wait([receiving], 0) == []
        sending.send(1)
        assert multiprocessing.connection.wait([receiving], 5) == [receiving]
        if not has("unix_sockets"):  # selectors accept only sockets there
            return
        with selectors.DefaultSelector() as selector:
            selector.register(receiving, selectors.EVENT_READ)
            assert [key.fileobj for key, _ in selector.select(5)] == [receiving]

    def test_a_child_talks_back(self, mp, run):
        here, there = mp.Pipe()
        with here, there:

            def answer():
                here.close()
                while (item := there.recv()) is not None:
                    there.send(item * 2)

            run(answer)
            there.close()
            for number in range(100):
                here.send(number)
                assert here.recv() == 2 * number
            here.send(None)
            with pytest.raises(EOFError):
                here.recv()

    def test_a_message_sent_before_the_other_end_closed_is_received(self, mp):
        here, there = mp.Pipe()
        with here:
            here.send("never read")
            there.send("read")
            there.close()
            assert here.recv() == "read"
            with pytest.raises((EOFError, ConnectionResetError)):
                here.recv()


class TestOurs:
    def test_a_plain_pickle_is_refused(self, ours):
        for end in ours:
            with pytest.raises(RuntimeError, match="through a queue or pipe of forkshm"):
                pickle.dumps(end)

    def test_the_threads_of_both_sides_may_share_an_end(self, ours):
        here, there = ours
        got = []
        receivers = [threading.Thread(target=lambda: got.extend(iter(there.recv, None))) for _ in range(2)]
        senders = [threading.Thread(target=lambda: [here.send((n, "x" * 3000)) for n in range(200)]) for _ in range(2)]
        for thread in receivers + senders:
            thread.start()
        for thread in senders:
            thread.join()
        for _ in receivers:
            here.send(None)
        for thread in receivers:
            thread.join()
        assert sorted(n for n, _ in got) == sorted([*range(200)] * 2)

    def test_shared_memory_is_the_same(self, ours):
        here, there = ours
        array = forkshm.zeros(10)
        here.send(array[2:])
        there.recv()[0] = 7
        assert array[2] == 7

    def test_large_copies_arrive_equal_and_writable(self, ours):
        here, there = ours
        sent = np.arange(1_000_000)
        here.send([sent, sent[:10]])
        got, head = there.recv()
        assert np.array_equal(got, sent)
        got[0] = 5
        assert (sent[0], head[1]) == (0, 1)

    def test_bytes_of_shared_memory_are_sent_as_they_are_now(self, ours):
        here, there = ours
        array = forkshm.zeros(100_000)
        here.send_bytes(array)
        array[:] = 1
        assert not any(there.recv_bytes())

    def test_bytes_of_an_object_with_large_buffers_are_refused_with_the_remedy(self, ours):
        here, there = ours
        here.send(np.arange(100_000))
        with pytest.raises(OSError, match=r"receive it by recv\(\)"):
            there.recv_bytes()
        here.send(1)
        assert there.recv() == 1

    @pytest.mark.parametrize(("nbytes", "most"), [(300_000, 150), (2_000_000, 50), (40_000_000, 6)])
    @pytest.mark.parametrize("send", ["send", "send_bytes"])
    def test_a_sender_waits_before_the_memory_is_full(self, ours, nbytes, most, send):
        """The kernel holds hundreds of messages, whatever the size of the blocks that they name."""
        here, there = ours
        os.set_blocking(here.fileno(), False)  # to get an error instead of waiting
        item = np.ones(nbytes, np.uint8)
        for _ in range(2):
            sent = 0
            with pytest.raises(BlockingIOError):
                while sent < 300:
                    item[0] = sent
                    getattr(here, send)(item)
                    sent += 1
            assert 2 <= sent <= most
            for number in range(sent):
                got = there.recv() if send == "send" else np.frombuffer(there.recv_bytes(), np.uint8)
                assert (got[0], int(got[1:].sum())) == (number, nbytes - 1)
                del got

    def test_shared_memory_takes_no_room_in_a_pipe(self, ours):
        here, there = ours
        os.set_blocking(here.fileno(), False)
        shared = forkshm.zeros(10_000_000, np.uint8)
        for number in range(50):
            here.send((number, shared))
        assert [there.recv()[0] for _ in range(50)] == [*range(50)]

    @pytest.mark.parametrize("message", [b"\x12", b"\x12" + bytes(7), b"\x12" + bytes(8), b"\x12\0\0\0\x03\0\0\0ab"])
    def test_ballast_that_is_none_is_refused(self, ours, message):
        here, there = ours
        here._sender.send(message, [there.fileno()])
        with pytest.raises(forkshm.errors.ChannelBrokenError, match="how many of them are ballast"):
            there.recv()
        here.send(1)
        assert there.recv() == 1

    def test_ends_are_given_back_without_close(self):
        forkshm.Pipe()  # the leak check finds ends that stay open

    def test_no_end_is_inherited_by_other_programs(self, ours):
        assert not any(os.get_inheritable(end.fileno()) for end in ours)


def test_a_connection_is_made_of_the_fd_of_one():
    here, there = forkshm.Pipe()
    with here, there, forkshm.connection.Connection(kernel.duplicate(there.fileno()), writable=False) as again:
        here.send([1])
        assert again.recv() == [1]
        with pytest.raises(OSError, match="read-only"):
            again.send(2)
    with pytest.raises(ValueError, match="at least one"):
        forkshm.connection.Connection(3, False, False)
    with pytest.raises((OSError, ValueError)):
        forkshm.connection.Connection(-1)
    stream, other = socket.socketpair()
    with stream, other:
        with pytest.raises(OSError, match=r"not an end of a forkshm pipe \((a socket of AF_UNIX, SOCK_STREAM|no pipe)"):
            forkshm.connection.Connection(stream.fileno())
        other.send(b"still open")
        assert stream.recv(100) == b"still open"


def test_an_invalid_fd_is_refused_on_use():
    one, other = forkshm.Pipe()
    number = one.fileno()
    one.close()
    other.close()
    connection = forkshm.connection.Connection(number)
    with pytest.raises(OSError, match="closed"):
        connection.poll()
    # The number belongs to another fd by now, which must not be closed with the connection.
    here, there = forkshm.Pipe()
    with here, there:
        assert number in (here.fileno(), there.fileno())
        connection.close()
        del connection
        here.send("still open")
        assert there.recv() == "still open"


def test_ends_in_a_cycle_of_garbage_are_closed_without_a_warning(run_script):
    done = run_script(
        """
import gc
import forkshm

for make in (forkshm.Pipe, forkshm.SimpleQueue):
    cycle = [make()]
    cycle.append(cycle)
    del cycle
    gc.collect()
""",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
