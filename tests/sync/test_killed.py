"""Killed holders and waiters of every classic lock: no process is stuck, and exclusion always holds.

Each kill is that of a process that was forked for it, at a random moment. By default a sample is run, and a thousand of
each under ``-m nightly``.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import warnings

import pytest

import forkshm
from forkshm.errors import ForkshmWarning

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore::forkshm.ForkshmWarning"),
]

KILLS = [12, pytest.param(1000, marks=pytest.mark.nightly)]
LONG = 30.0


@contextlib.contextmanager
def forked(action, *, ready=None):
    """Run *action* in a child, which is killed at the end of the block."""
    pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore", ForkshmWarning)
            action()
        finally:
            os._exit(0)
    try:
        if ready is not None:
            deadline = time.monotonic() + LONG
            while not ready():
                assert time.monotonic() < deadline, "the child was not ready in time"
                time.sleep(0.0005)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Inside:
    """The processes inside, in words of shared memory; two living ones are an error."""

    def __init__(self):
        self.words = forkshm.anonymous_shared_memory(4096).buf.cast("Q")

    def enter(self):
        other, me = self.words[0], os.getpid()
        if other not in (0, me) and self.words[2] != other:
            try:
                with open(f"/proc/{other}/stat") as stat:
                    if stat.read().rpartition(")")[2].split()[0] not in "ZX":
                        self.words[1] += 1
            except OSError:
                pass
        self.words[0] = me

    def leave(self):
        if self.words[0] != os.getpid():
            self.words[1] += 1
        self.words[0] = 0
        self.words[3] += 1

    @property
    def broken(self):
        return self.words[1]

    @property
    def times(self):
        return self.words[3]


EXCLUSIVE = {
    "Lock": forkshm.Lock,
    "RLock": forkshm.RLock,
    "Semaphore": lambda: forkshm.Semaphore(1),
    "BoundedSemaphore": lambda: forkshm.BoundedSemaphore(1),
    "Condition": forkshm.Condition,
    "Value": lambda: forkshm.Value("i", 0),
    "Array": lambda: forkshm.Array("i", 3),
}


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("name", EXCLUSIVE)
def test_a_killed_holder_blocks_no_process_and_two_never_hold_the_lock(name, kills):
    lock = EXCLUSIVE[name]()
    inside = Inside()

    def loop():
        while True:
            assert lock.acquire(timeout=LONG)
            inside.enter()
            inside.leave()
            lock.release()

    with forked(loop):  # a process that lives on
        for _ in range(kills):
            seen = inside.times
            with forked(loop, ready=lambda seen=seen: inside.times > seen + 3):
                time.sleep(random.random() / 1000)
            assert lock.acquire(timeout=LONG)
            inside.enter()
            inside.leave()
            lock.release()
    assert lock.acquire(timeout=LONG)
    lock.release()
    assert inside.broken == 0


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("name", EXCLUSIVE)
def test_a_killed_waiter_blocks_no_other_process(name, kills):
    lock = EXCLUSIVE[name]()
    for _ in range(kills):
        assert lock.acquire(timeout=LONG)
        with forked(lock.acquire), forked(lock.acquire):
            time.sleep(random.random() / 500)
            if random.random() < 0.5:
                # It is killed with the lock, or on its way to the lock.
                lock.release()
                lock.acquire(timeout=0.0005) and lock.release()
                continue
        lock.release()
    assert lock.acquire(timeout=LONG)
    lock.release()


@pytest.mark.parametrize("kills", KILLS)
def test_notify_does_not_wait_for_killed_waiters_and_the_living_are_woken(kills):
    condition = forkshm.Condition()
    words = forkshm.anonymous_shared_memory(64).buf.cast("Q")

    def wait(n=1):
        with condition:
            words[1] += 1
            condition.wait(LONG)
            words[0] += 1

    for _ in range(kills):
        words[0] = words[1] = 0
        with forked(wait, ready=lambda: words[1] == 1):
            with condition:
                pass  # it sleeps, or is about to
        with condition:
            begun = time.monotonic()
            condition.notify()
            assert time.monotonic() - begun < LONG
        with forked(wait, ready=lambda: words[1] == 2):
            deadline = time.monotonic() + LONG
            while words[0] == 0:
                with condition:
                    condition.notify_all()
                assert time.monotonic() < deadline
                time.sleep(0.0005)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_users_of_an_event_block_no_other_process(kills):
    event = forkshm.Event()
    turns = forkshm.anonymous_shared_memory(64).buf.cast("Q")

    def flap():
        while True:
            event.set()
            event.clear()
            turns[0] += 1

    for _ in range(kills):
        with forked(event.wait):
            time.sleep(random.random() / 1000)
        turns[0] = 0
        with forked(flap, ready=lambda: turns[0] > 2):
            time.sleep(random.random() / 1000)
        event.clear()
        waiter = threading.Thread(target=event.wait)
        waiter.start()
        event.set()
        waiter.join(LONG)
        assert not waiter.is_alive()
        event.clear()


@pytest.mark.parametrize("kills", [4, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_barrier_with_a_dead_party_breaks(kills):
    barrier = forkshm.Barrier(3)
    for _ in range(kills):
        with forked(barrier.wait, ready=lambda: barrier.n_waiting == 1):
            pass
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(LONG)
        assert barrier.broken
        barrier.reset()


@pytest.mark.parametrize("kills", [1, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_party_killed_in_the_action_breaks_the_barrier(kills, wait_until):
    barrier = forkshm.Barrier(2, action=lambda: time.sleep(LONG))

    def wait():
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait()

    for _ in range(kills):
        started = threading.Thread(target=wait)
        started.start()
        wait_until(lambda: barrier.n_waiting == 1)  # the last to arrive runs the action
        with forked(barrier.wait, ready=lambda: barrier.n_waiting == 2):
            pass
        started.join(LONG)
        assert not started.is_alive()
        assert barrier.broken
        barrier.reset()


def test_permits_of_a_signal_have_no_owner():
    """One process acquires and another releases: permits taken by a killed consumer do not come back."""
    semaphore = forkshm.Semaphore(0)
    took = forkshm.Event()

    def consume():
        semaphore.acquire()
        semaphore.acquire()
        took.set()
        signal.pause()

    with forked(consume):
        semaphore.release()
        semaphore.release()
        assert took.wait(LONG)
    assert semaphore.get_value() == 0
    assert not semaphore.acquire(timeout=0.3)


def test_permits_of_a_killed_process_come_back_all_at_once():
    semaphore = forkshm.BoundedSemaphore(3)
    took = forkshm.Event()

    def take_two():
        semaphore.acquire()
        semaphore.acquire()
        took.set()
        signal.pause()

    with forked(take_two) as pid:
        assert took.wait(LONG)
        assert semaphore.get_value() == 1
    assert semaphore.acquire()
    with pytest.warns(ForkshmWarning, match=f"process {pid} died while it held 2 of the permits of a BoundedSemaphore"):
        assert semaphore.acquire(timeout=LONG)
    assert semaphore.get_value() == 1
    semaphore.release()
    semaphore.release()
    with pytest.raises(ValueError, match="released too many times"):
        semaphore.release()
