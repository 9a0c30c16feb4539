"""The POSIX backend, beside the backend in use."""

from __future__ import annotations

import _thread
import collections
import errno
import itertools
import os
import signal
import socket
import sys
import threading
import time

import pytest

import forkshm
from forkshm.backend import Access
from forkshm.backend import kernel as in_use
from forkshm.backend.posix import _backend
from forkshm.backend.posix import _record_locks as locks
from forkshm.errors import UnsupportedError

PAGE = in_use.page_size
kernel = in_use if in_use.name == "posix" else _backend.PosixBackend()


@pytest.fixture
def memory():
    fd = kernel.create_memory(3 * PAGE + 5, "region")
    yield fd
    kernel.close(fd)


@pytest.fixture
def ends():
    here, there = kernel.message_sockets()
    yield here, there
    here.close()
    there.close()


def beside(*fds):
    return [(*kernel.RIGHTS, fds)]


def take(end, flags=None):
    data, ancillary, _, _ = end.recvmsg(65536, kernel.fds_space(17), kernel.DONTWAIT if flags is None else flags)
    return data, kernel.received_fds(ancillary)


# -- memory ---------------------------------------------------------------------------


def test_memory_has_its_exact_size_and_no_name(memory):
    identity, size = kernel.identify(memory)
    assert size == 3 * PAGE + 5
    again = kernel.reopen(memory)
    other = kernel.create_memory(3 * PAGE + 5, "region")
    assert kernel.identify(again)[0] == identity != kernel.identify(other)[0]
    assert os.fstat(memory).st_nlink == 0
    assert not os.get_inheritable(memory)
    kernel.close(again)
    kernel.close(other)


def test_the_size_of_a_file_is_that_of_fstat(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE))
    with open(path) as file:
        status = os.fstat(file.fileno())
        assert kernel.identify(file.fileno()) == ((status.st_dev, status.st_ino), 3 * PAGE)


def test_an_existing_mapping_is_not_replaced(memory):
    address = kernel.map(memory, PAGE, Access.SHARED)
    with pytest.raises(FileExistsError):
        kernel.map_at([], address, memory, PAGE, Access.SHARED)
    kernel.unmap(address, PAGE)
    kernel.map_at([], address, memory, PAGE, Access.SHARED)
    kernel.unmap(address, PAGE)


def test_unsupported_features_name_an_alternative(memory):
    with pytest.raises(UnsupportedError, match="Use forkshm's own Queue, Pipe, Pool or Executor"):
        kernel.start_time(os.getpid())
    for refused in (lambda: kernel.seal_writes(memory), lambda: kernel.own_pages(0, PAGE), kernel.open_own_memory):
        with pytest.raises(OSError) as caught:
            refused()
        assert caught.value.errno == errno.ENOTSUP


# -- leases ---------------------------------------------------------------------------


def lent(memory, position):
    """A lease on a byte, in the form in which it is sent."""
    fd = kernel.reopen(memory)
    kernel.lock_shared(fd, position)
    return fd


def test_a_byte_is_held_until_the_lease_is_closed(memory):
    assert not kernel.is_held(memory, 0)
    lease = lent(memory, 0)
    assert kernel.is_held(memory, 0)
    assert not kernel.is_held(memory, PAGE)
    kernel.close(lease)
    assert not kernel.is_held(memory, 0)


def test_a_lease_holds_in_the_queue_of_a_channel_and_not_when_that_is_gone(memory):
    here, there = kernel.message_sockets()
    lease = lent(memory, PAGE)
    here.sendmsg([b"x"], beside(lease))
    kernel.close(lease)
    assert kernel.is_held(memory, PAGE)
    here.close()
    there.close()
    assert not kernel.is_held(memory, PAGE)


def test_a_received_lease_is_held_and_can_be_passed_on(memory, ends):
    here, there = ends
    lease = lent(memory, PAGE)
    here.sendmsg([b"x"], beside(lease))
    kernel.close(lease)
    _, (got,) = take(there)
    assert kernel.is_held(memory, PAGE)
    own = kernel.reopen(got)
    kernel.lock_shared(own, PAGE)
    kernel.close(got)
    assert kernel.is_held(memory, PAGE)
    kernel.unlock(own, PAGE)
    assert not kernel.is_held(memory, PAGE)
    kernel.close(own)


def test_a_killed_process_holds_nothing(memory, wait_until):
    lease = lent(memory, 0)
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    kernel.close(lease)
    assert kernel.is_held(memory, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not kernel.is_held(memory, 0)


def test_a_lease_held_only_by_its_process_takes_no_fd(memory):
    before = kernel.more_fds()
    kernel.lock_shared(memory, 0)
    assert kernel.more_fds() == before
    other = kernel.reopen(memory)
    assert kernel.is_held(other, 0)
    assert not kernel.is_held(memory, 0)  # by other descriptions
    kernel.unlock(memory, 0)
    assert not kernel.is_held(other, 0)
    kernel.close(other)


# -- messages -------------------------------------------------------------------------


def test_a_message_is_whole_and_the_end_is_told_after_the_last(ends):
    here, there = ends
    here.send(b"one")
    here.send(b"two")
    here.close()
    assert [take(there)[0], take(there)[0], take(there)[0]] == [b"one", b"two", b""]


def test_nothing_is_there_is_not_the_end(ends):
    with pytest.raises(BlockingIOError):
        take(ends[1])


def test_a_receiver_that_sleeps_is_told_of_a_killed_sender(ends, wait_until):
    here, there = ends
    pid = os.fork()
    if pid == 0:
        there.close()
        signal.pause()
        os._exit(0)
    here.close()
    got = []
    thread = threading.Thread(target=lambda: got.append(take(there, 0)))
    thread.start()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    thread.join(10)
    assert got == [(b"", [])]


def test_to_say_that_nothing_more_comes_is_not_to_stop_receiving(ends):
    here, there = ends
    here.shutdown(socket.SHUT_WR)
    there.send(b"back")
    assert take(here)[0] == b"back"
    assert take(there)[0] == b""
    with pytest.raises(BrokenPipeError):
        here.send(b"more")


def test_sending_without_a_receiver_raises(ends):
    here, there = ends
    there.close()
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            here.send(b"x")
        assert caught.value.errno in (errno.EPIPE, errno.ENOTCONN)


def test_an_end_that_was_sent_still_tells_of_the_other(ends):
    here, there = ends
    first, second = kernel.message_sockets()
    here.sendmsg([b"x"], beside(second.fileno()))
    second.close()
    _, (fd,) = take(there)
    arrived = kernel.message_socket(fd)
    first.send(b"hello")
    first.close()
    assert (take(arrived)[0], take(arrived)[0]) == (b"hello", b"")
    arrived.close()


def test_each_message_goes_to_one_of_many_receivers(ends):
    here, there = ends
    pids = []
    back, results = kernel.message_sockets()
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            here.close()
            while data := take(there, 0)[0]:
                results.send(data)
            os._exit(0)
        pids.append(pid)
    for number in range(300):
        here.send(b"%d" % number)
    got = sorted(int(take(back, 0)[0]) for _ in range(300))
    here.close()
    there.close()
    assert got == list(range(300))
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    back.close()
    results.close()


# -- processes ------------------------------------------------------------------------


@pytest.mark.skipif(in_use.name != "posix", reason="about processes watched with this backend in use")
def test_the_end_of_a_spawned_process_that_forked_is_seen_while_its_child_lives(run_script):
    script = """
import os, signal
import forkshm

def leave_a_child_behind(end):
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    end.send(pid)

if __name__ == "__main__":
    context = forkshm.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=leave_a_child_behind, args=(there,))
    process.start()
    there.close()
    pid = here.recv()
    try:
        print(bool(forkshm.connection.wait([process.sentinel], 20)))
    finally:
        os.kill(pid, signal.SIGKILL)
"""
    assert run_script(script) == "True\n"


def ended(sentinel):
    poll = kernel.poller()
    poll.register(sentinel, kernel.READABLE)
    return bool(poll.poll(5000))


def test_the_end_of_a_child_is_told_though_its_own_child_lives():
    read_end, write_end = os.pipe()
    with kernel.forking() as birth:
        pid = os.fork()
        if pid:
            sentinel = kernel.open_process(pid, birth)
    if not pid:
        grandchild = os.fork()
        if grandchild == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        os._exit(3)
    assert ended(sentinel)
    with pytest.raises(ProcessLookupError):
        kernel.signal_process(sentinel, pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    kernel.close(sentinel)
    os.close(write_end)
    os.close(read_end)


def test_stopped_running_and_ended_children_are_distinguished(wait_until):
    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(10)
    assert kernel.is_stopped(pid) is False
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: kernel.is_stopped(pid))
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: kernel.is_stopped(pid) is False)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: kernel.is_stopped(pid) is None)
    os.waitpid(pid, 0)


def test_a_process_dies_with_the_other_end_of_its_lifeline():
    hung, held = kernel.create_lifeline()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        kernel.die_with(hung)
        time.sleep(60)
        os._exit(0)
    os.close(hung)
    os.close(held)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_counter_counts_for_all_processes(memory):
    counter = kernel.create_counter(memory)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            for _ in range(500):
                kernel.count(counter, 1)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert kernel.count(counter) == 1500
    with pytest.raises(OSError) as caught:
        kernel.count(counter, -1501)
    assert caught.value.errno == errno.EINVAL
    kernel.clear_counter(counter)
    assert kernel.count(counter) == 0
    kernel.close(counter)


# -- locks ----------------------------------------------------------------------------


@pytest.fixture
def place():
    with forkshm.anonymous_shared_memory(64) as region:
        yield region.address


def test_acquiring_a_mutex_of_a_killed_holder_reports_the_death(place, in_child):
    assert locks.mutex_init(place) == 0
    pid = os.fork()
    if pid == 0:
        locks.mutex_trylock(place)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert locks.mutex_trylock(place) == errno.EOWNERDEAD
    assert locks.mutex_trylock(place) == errno.EDEADLK
    assert in_child(lambda: locks.mutex_trylock(place) != errno.EBUSY) == 0
    assert locks.mutex_consistent(place) == 0
    assert locks.mutex_unlock(place) == 0
    assert locks.mutex_unlock(place) == errno.EPERM
    assert in_child(lambda: locks.mutex_trylock(place)) == 0


def test_an_unrepaired_mutex_cannot_be_acquired(place, in_child):
    locks.mutex_init(place)
    assert in_child(lambda: locks.mutex_trylock(place)) == 0
    assert locks.mutex_trylock(place) == errno.EOWNERDEAD
    assert locks.mutex_unlock(place) == 0
    assert locks.mutex_trylock(place) == errno.ENOTRECOVERABLE


def test_a_thread_that_ended_is_as_dead_as_a_process(place):
    locks.mutex_init(place)
    thread = threading.Thread(target=locks.mutex_trylock, args=(place,))
    thread.start()
    thread.join()
    assert locks.mutex_trylock(place) == errno.EOWNERDEAD
    locks.mutex_consistent(place)
    locks.mutex_unlock(place)


def test_only_one_of_many_is_inside(place):
    counter = forkshm.anonymous_shared_memory(8)
    word = counter.buf.cast("Q")
    locks.mutex_init(place)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            for _ in range(200):
                assert locks.mutex_lock(place, 30) == 0
                word[0] += 1
                locks.mutex_unlock(place)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    assert word[0] == 600


def test_permits_are_not_lost_to_a_kill(place):
    locks.sem_init(place, 1)
    assert list(locks.sem_try(place)) == [0]
    assert list(locks.sem_try(place)) == [-1]
    pid = os.fork()
    if pid == 0:
        locks.sem_post(place)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert locks.sem_value(place) == 1
    assert list(locks.sem_wait(place, 5)) == [0]


def test_an_end_that_is_collected_closes_its_fds_although_a_signal_handler_raises(monkeypatch):
    def stop(*_):
        raise InterruptedError("stop")

    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: ignored.append(str(found.exc_value)))
    before = signal.signal(signal.SIGUSR1, stop)
    fds = set(os.listdir("/proc/self/fd"))
    try:
        ends = list(kernel.message_sockets())
        # The signal is pending when the end is collected, so the handler is called when `__del__` begins.
        for _ in range(2):
            collections.deque(itertools.chain(map(_thread.interrupt_main, (signal.SIGUSR1,)), map(ends.pop, (-1,))), 0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert set(os.listdir("/proc/self/fd")) == fds
    assert len(ignored) == 2
