"""Both ends of a channel: whole messages, with their fds, to exactly one receiver."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import gc
import os
import random
import resource
import signal
import socket
import threading

import pytest
import started
from room import needs_fds
from system import open_fds

from forkshm import anonymous_shared_memory
from forkshm.backend import kernel
from forkshm.channel import Kind, close_in_children, pair, read_message, write_message
from forkshm.channel._endpoint import DIRECT_FDS, MAX_MESSAGE, Received
from forkshm.errors import ChannelBrokenError, ChannelClosedError, RegionGoneError
from forkshm.pickler import pack

FD_COUNTS = [0, 1, 2, DIRECT_FDS - 1, DIRECT_FDS, DIRECT_FDS + 1, 63, 64, 65, DIRECT_FDS + 64, 253, 254, 1000]


def as_on_linux(count):
    """Name a test alike on every backend, whatever number of fds fits one message there."""
    return str(count if count < DIRECT_FDS - 1 else count - DIRECT_FDS + 16)


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def channel():
    sender, receiver = pair()
    yield sender, receiver
    sender.close()
    receiver.close()


@contextlib.contextmanager
def files(count):
    """Provide *count* open files, each containing its number."""
    needs_fds(2 * count)
    fds = []
    try:
        for number in range(count):
            fds.append(os.memfd_create("numbered"))
            os.pwrite(fds[-1], str(number).encode(), 0)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def numbers_in(fds):
    return [int(os.pread(fd, 10, 0)) for fd in fds]


# -- messages -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4096, MAX_MESSAGE - 1, MAX_MESSAGE])
def test_a_message_arrives_whole(channel, size):
    sender, receiver = channel
    data = random.Random(size).randbytes(size)
    assert sender.send(data)
    assert receiver.receive_nowait() == Received(data, [])


def test_messages_arrive_in_order_and_are_not_joined(channel):
    sender, receiver = channel
    for number in range(20):
        sender.send(bytes([number]) * (number + 1))
    assert [receiver.receive_nowait().data for _ in range(20)] == [bytes([n]) * (n + 1) for n in range(20)]


def test_nothing_there_yet_is_said_at_once(channel):
    _, receiver = channel
    with pytest.raises(BlockingIOError):
        receiver.receive_nowait()


def test_a_message_that_is_too_long_is_refused_at_the_other_end_and_its_fds_are_closed(channel):
    sender, receiver = channel
    with files(3) as fds:
        sender.send(b"x" * (MAX_MESSAGE + 1), fds)
        before = open_fds()
        with pytest.raises(ChannelBrokenError, match="more than 65,536 bytes"):
            receiver.receive_nowait()
        assert open_fds() == before
        sender.send(b"next")
        assert receiver.receive_nowait().data == b"next"


def test_a_full_queue_says_so_when_told_not_to_wait(channel):
    sender, receiver = channel
    sent = 0
    while sender.send(b"x" * 1000, wait=False):
        sent += 1
    assert sent > 10
    for _ in range(sent):
        assert receiver.receive_nowait().data == b"x" * 1000
    with pytest.raises(BlockingIOError):
        receiver.receive_nowait()
    assert sender.send(b"again", wait=False)


def test_a_full_queue_keeps_the_fds_of_an_unsent_message(channel):
    sender, _ = channel
    with files(DIRECT_FDS + 5) as fds:
        before = open_fds()
        while sender.send(b"x" * 1000, fds, wait=False):
            pass
        assert open_fds() == before
        assert numbers_in(fds) == list(range(DIRECT_FDS + 5))


def test_has_message_is_true_until_the_message_is_received(channel):
    sender, receiver = channel
    assert not receiver.has_message()
    sender.send(b"abc")
    assert receiver.has_message()
    receiver.receive_nowait()
    assert not receiver.has_message()


# -- fds ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", FD_COUNTS, ids=as_on_linux)
def test_any_number_of_fds_arrives_in_order_beside_its_message(channel, count):
    sender, receiver = channel
    with files(count) as fds:
        before = open_fds()
        assert sender.send(b"here", fds)
        assert open_fds() == before
        received = receiver.receive_nowait()
        assert received.data == b"here"
        assert numbers_in(received.fds) == list(range(count))
        assert not any(os.get_inheritable(fd) for fd in received.fds)
        for fd in received.fds:
            os.close(fd)
        assert open_fds() == before


def test_fds_of_several_messages_are_not_mixed(channel):
    sender, receiver = channel
    with files(600) as fds:
        sender.send(b"first", fds[:300])
        sender.send(b"second")
        sender.send(b"third", fds[300:])
        for expected in (range(300), range(0), range(300, 600)):
            received = receiver.receive_nowait()
            assert numbers_in(received.fds) == list(expected)
            for fd in received.fds:
                os.close(fd)


@pytest.mark.needs("many_handles")
@pytest.mark.parametrize("count", [1, DIRECT_FDS + 70], ids=as_on_linux)
def test_fds_in_an_unread_message_are_closed_with_the_channel(count, wait_until):
    sender, receiver = pair()
    read_end, write_end = os.pipe()
    sender.send(b"here", [write_end] * count)
    os.close(write_end)
    sender.close()
    receiver.close()
    os.set_blocking(read_end, False)

    def at_end():
        try:
            return os.read(read_end, 1) == b""
        except BlockingIOError:
            return False

    wait_until(at_end)
    os.close(read_end)


def test_a_bad_fd_is_not_mistaken_for_a_closed_end(channel):
    sender, receiver = channel
    with pytest.raises(OSError, match=r"Bad file descriptor|Invalid handle") as caught:
        sender.send(b"here", [2**20])
    assert caught.value.errno == errno.EBADF
    assert not isinstance(caught.value, ChannelClosedError)
    sender.send(b"still open")
    assert receiver.receive_nowait().data == b"still open"


@pytest.mark.parametrize("count", [3, DIRECT_FDS, DIRECT_FDS + 1, DIRECT_FDS + 160], ids=as_on_linux)
@pytest.mark.parametrize("room", [0, 2])
def test_too_many_open_files_at_the_receiver_are_said_with_the_remedy_and_nothing_stays_open(in_child, count, room):
    needs_fds(count + 100)

    def receive():
        sender, receiver = pair()
        before = open_fds()
        regions = [anonymous_shared_memory(10) for _ in range(count)]
        payload = pack(regions)
        sender.send(*write_message(Kind.RESULT, 0, payload))
        payload.close()
        del regions, payload
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        fillers = [os.dup(0) for _ in range(used)]  # leaves no unused numbers below
        while max(fillers) < used:
            fillers.append(os.dup(0))
        full = max(fillers) + 1 + room
        resource.setrlimit(resource.RLIMIT_NOFILE, (full, full))
        received = receiver.receive_nowait()
        with pytest.raises(RegionGoneError, match=r"only \d+ arrived.*ulimit -n"):
            read_message(received)
        assert received.fds == []
        for fd in fillers:
            os.close(fd)
        gc.collect()  # the traceback keeps what was received until then
        assert open_fds() == before
        sender.send(b"next")
        assert receiver.receive_nowait() == Received(b"next", [])

    assert in_child(receive) == 0


@pytest.mark.parametrize("count", [3, DIRECT_FDS + 160], ids=as_on_linux)
def test_a_soft_limit_is_raised_before_a_message_is_lost(in_child, count):
    needs_fds(2 * count)

    def receive():
        sender, receiver = pair()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with files(count) as fds:
            sender.send(b"here", fds)
        used = len(open_fds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + DIRECT_FDS + 4, hard))
        kernel._roomy_below = 0  # the value, or less, in a process that started with this limit
        received = receiver.receive_nowait()
        assert numbers_in(received.fds) == list(range(count))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    assert in_child(receive) == 0


@contextlib.contextmanager
def nobody():
    """Run as a user whose fds in flight the kernel counts."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    yield


@NEEDS_ROOT
def test_more_fds_in_a_message_than_may_be_on_their_way_are_refused_with_the_remedy(in_child):
    needs_fds(200)

    def send():
        sender, receiver = pair()
        with files(100) as fds:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            with nobody():
                before = open_fds()
                for wait in (True, False):
                    with pytest.raises(OSError, match=r"cannot send 1,000 fds .*ulimit -n") as caught:
                        sender.send(b"here", fds * 10, wait=wait)
                    assert caught.value.errno == errno.ETOOMANYREFS
                    assert open_fds() == before
                assert sender.send(b"fewer", fds)
            received = receiver.receive_nowait()
            assert (received.data, len(received.fds)) == (b"fewer", 100)

    assert in_child(send) == 0


@NEEDS_ROOT
def test_a_message_waits_until_the_fds_of_others_have_arrived(in_child):
    needs_fds(100)

    def send():
        sender, receiver = pair()
        with files(50) as fds:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            with nobody():
                sent = 0
                while sender.send(b"here", fds * 2, wait=False):
                    sent += 1
                assert 2 <= sent < 10

                def take():
                    for _ in range(sent):
                        for fd in receiver.receive().fds:
                            os.close(fd)

                thread = threading.Timer(0.05, take)
                thread.start()
                assert sender.send(b"late", fds * 2)
                thread.join()
                assert len(receiver.receive_nowait().fds) == 100

    assert in_child(send) == 0


@NEEDS_ROOT
def test_a_soft_limit_on_fds_that_are_on_their_way_is_raised(in_child):
    needs_fds(1200)

    def send():
        sender, receiver = pair()
        with files(100) as fds:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            with nobody():
                assert sender.send(b"here", fds * 10)
            assert len(receiver.receive_nowait().fds) == 1000

    assert in_child(send) == 0


@pytest.mark.parametrize("count", [0, 1, DIRECT_FDS], ids=as_on_linux)
def test_an_empty_message_is_not_the_end(channel, count):
    sender, receiver = channel
    fds = array.array("i", [sender.fileno()] * min(count, 16))
    before = started.count_fds()
    sender._socket.sendmsg([b""], [(*kernel.RIGHTS, fds)] if fds else [])
    with pytest.raises(ChannelBrokenError, match="empty message"):
        receiver.receive_nowait()
    assert started.count_fds() == before
    sender.send(b"next")
    assert receiver.receive_nowait().data == b"next"
    sender.end()
    assert receiver.receive_nowait() is None


# -- ends -----------------------------------------------------------------------------


def test_when_the_sender_is_gone_the_receiver_gets_the_rest_and_then_none(channel):
    sender, receiver = channel
    sender.send(b"last")
    sender.close()
    assert receiver.receive_nowait().data == b"last"
    assert receiver.receive_nowait() is None
    assert receiver.receive_nowait() is None


def test_an_ended_channel_gives_the_rest_and_then_none(channel):
    sender, receiver = channel
    sender.send(b"last")
    sender.end()
    assert receiver.receive_nowait().data == b"last"
    assert receiver.receive_nowait() is None
    with pytest.raises(ChannelBrokenError):
        sender.send(b"too late")


def test_sending_without_a_receiver_raises(channel):
    sender, receiver = channel
    receiver.close()
    with files(300) as fds:
        for beside in ([], fds[:1], fds):
            before = open_fds()
            with pytest.raises(ChannelBrokenError, match="every process at the other end is gone") as caught:
                sender.send(b"hello", beside)
            assert isinstance(caught.value, BrokenPipeError)
            assert open_fds() == before


def test_a_receiver_that_left_messages_unread_is_noticed_as_gone(channel):
    sender, receiver = channel
    sender.send(b"unread")
    receiver.close()
    with pytest.raises(ChannelBrokenError):
        sender.send(b"hello")


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_a_killed_receiver_is_noticed_as_gone(channel, number):
    sender, receiver = channel
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    receiver.close()
    assert sender.send(b"queued")
    os.kill(pid, number)
    os.waitpid(pid, 0)
    with pytest.raises(ChannelBrokenError):
        sender.send(b"hello")


def test_closed_ends_say_that_they_were_closed(channel):
    sender, receiver = channel
    for end in channel:
        end.close()
        end.close()
        assert end.fileno() == -1
    with pytest.raises(ChannelClosedError, match="cannot send: this end of the channel was closed"):
        sender.send(b"hello")
    with files(1) as fds, pytest.raises(ChannelClosedError, match="cannot send"):
        sender.send(b"hello", fds)
    with pytest.raises(ChannelClosedError, match="cannot receive: this end of the channel was closed"):
        receiver.receive_nowait()
    sender.end()


def test_a_duplicate_is_the_same_end_and_closed_by_itself(channel):
    sender, receiver = channel
    other_sender, other_receiver = sender.duplicate(), receiver.duplicate()
    assert other_sender.fileno() != sender.fileno()
    sender.close()
    other_sender.send(b"hello")
    receiver.close()
    assert other_receiver.receive_nowait().data == b"hello"
    other_sender.close()
    assert other_receiver.receive_nowait() is None
    other_receiver.close()


def test_no_end_is_inherited_by_other_programs(channel):
    for end in channel:
        assert fcntl.fcntl(end.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.needs("inheritance")
def test_ends_of_one_process_only_are_closed_in_its_children(in_child):
    sender, receiver = pair()
    close_in_children(sender)

    def look():
        assert sender.fileno() == -1
        assert receiver.fileno() >= 0

    assert in_child(look) == 0
    assert sender.send(b"still mine")
    sender.close()
    receiver.close()


# -- many receivers -------------------------------------------------------------------


def test_each_message_goes_to_exactly_one_of_several_processes(channel):
    needs_fds(200)
    sender, receiver = channel
    back, here = pair()
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                sender.close()
                while True:
                    try:
                        received = receiver.receive_nowait()
                    except BlockingIOError:
                        os.sched_yield()
                        continue
                    if received is None:
                        os._exit(0)
                    (number,) = numbers_in(received.fds)
                    received.close()
                    assert str(number) == received.data.decode()
                    back.send(received.data)
            os._exit(1)
        pids.append(pid)
    receiver.close()
    back.close()
    answers = []
    with files(100) as fds:
        for number, fd in enumerate(fds):
            sender.send(str(number).encode(), [fd])
        sender.close()
        while True:
            try:
                received = here.receive_nowait()
            except BlockingIOError:
                os.sched_yield()
                continue
            if received is None:
                break
            answers.append(int(received.data))
    here.close()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert sorted(answers) == list(range(100))


@pytest.mark.parametrize("count", [1, DIRECT_FDS, DIRECT_FDS + 1, 253, 254], ids=as_on_linux)
def test_fds_that_are_sockets_themselves_arrive_as_any_other(channel, count):
    needs_fds(count)
    sender, receiver = channel
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sender.send(b"here", [ours.fileno()] * count)
        received = receiver.receive_nowait()
        assert len(received.fds) == count
        assert {os.fstat(fd).st_ino for fd in received.fds} == {os.fstat(ours.fileno()).st_ino}
        for fd in received.fds:
            os.close(fd)
