"""SIGKILL of processes that put, get or wait: the others continue."""

from __future__ import annotations

import os
import queue
import random
import signal
import time

import functions as f
import numpy as np
import pytest
import started

import forkshm
from forkshm.backend import kernel


@pytest.fixture
def spawn():
    """Start children that run a function; end all of them at the end."""
    processes = {}

    def start(function):
        process = forkshm.Process(target=function)
        process.start()
        processes[process.pid] = process
        return process.pid

    def kill(pid):
        process = processes.pop(pid)
        process.kill()
        process.join()
        process.close()

    start.kill = kill
    yield start
    for pid in list(processes):
        kill(pid)


def count_up(it, start=0, size=0):
    number = start
    while True:
        it.put((number, "x" * size))
        number += 1


@pytest.mark.parametrize("maxsize", [0, 1, 100])
@pytest.mark.parametrize("size", [0, 2000])
def test_a_sender_is_killed_in_the_middle_of_its_puts(spawn, maxsize, size):
    it = forkshm.Queue(maxsize)
    chance = random.Random(maxsize + size)
    for _ in range(5):
        victim = spawn(lambda: count_up(it, 0, size))
        expected = 0
        for _ in range(chance.randrange(500, 1500)):
            assert it.get(timeout=30)[0] == expected
            expected += 1
        spawn.kill(victim)
        # The messages in the kernel are whole and in order; then there are none.
        with pytest.raises(queue.Empty):
            while True:
                assert it.get(timeout=0.01)[0] == expected
                expected += 1
        assert it.qsize() == 0
        for number in range(5):
            it.put(number, timeout=30)
            assert it.get(timeout=30) == number


@pytest.mark.parametrize("maxsize", [0, 1, 3])
def test_receivers_are_killed_and_lose_one_item_each_at_most(spawn, maxsize):
    it, back = forkshm.Queue(maxsize), forkshm.Queue()
    chance = random.Random(maxsize)

    def consume():
        while True:
            back.put(it.get())

    kills = 10
    spawn(consume)
    sent = 0
    for _ in range(kills):
        victim = spawn(consume)
        for _ in range(chance.randrange(50, 150)):
            it.put(sent, timeout=30)
            sent += 1
        spawn.kill(victim)
    got = set()
    with pytest.raises(queue.Empty):
        while len(got) < sent:
            got.add(back.get(timeout=1))
        raise queue.Empty
    # The process may die after taking an item from one queue and before putting it into the other.
    assert sent - kills <= len(got) <= sent
    assert got <= set(range(sent))


@pytest.mark.needs("inheritance")
@pytest.mark.parametrize("nowait", [False, True])
def test_room_that_a_killed_receiver_had_not_given_back_is_found(spawn, monkeypatch, nowait, wait_until):
    it = forkshm.Queue(1)
    it.put("lost")

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(forkshm.Queue, "_give_room", die)
        pid = spawn(it.get)
    wait_until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None)
    assert it.empty()
    assert it.qsize() == 0
    if not nowait:
        it.put("next", timeout=30)
    else:

        def put():
            try:
                it.put_nowait("next")
            except queue.Full:
                return False
            return True

        wait_until(put)
    assert it.get(timeout=30) == "next"
    it.put_nowait("and on")
    with pytest.raises(queue.Full):
        it.put_nowait("bound holds")


def test_a_waiter_for_room_is_killed(spawn):
    it = forkshm.Queue(1)
    it.put(0)
    waiting = [spawn(lambda: count_up(it, 100)) for _ in range(3)]
    time.sleep(0.05)  # most processes wait by then; the test must hold in any case
    spawn.kill(waiting[0])
    assert it.get(timeout=30) == 0
    spawn.kill(waiting[1])
    for _ in range(100):
        it.get(timeout=30)
    spawn.kill(waiting[2])
    while not it.empty():
        it.get(timeout=30)
    it.put("mine", timeout=30)
    assert it.get(timeout=30) == "mine"


def test_a_waiter_for_items_is_killed(spawn):
    it = forkshm.Queue()
    waiting = [spawn(it.get) for _ in range(3)]
    time.sleep(0.05)  # as above
    for pid in waiting:
        spawn.kill(pid)
    for number in range(10):
        it.put(number)
    assert [it.get(timeout=30) for _ in range(10)] == list(range(10))


ENDS = {"SIGKILL": started.KILLED, "SIGSEGV": -signal.SIGSEGV, "exit": 17, "sys.exit": 17}


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("method", started.methods("fork", "forkserver"))
def test_a_sender_ends_with_a_backlog(method, how):
    """Messages in the kernel's queue arrive; a process that ends normally sends its backlog first."""
    context = forkshm.get_context(method)
    it = context.Queue()
    process = context.Process(target=f.put_and_end, args=(it, how))
    process.start()
    if how != "sys.exit":
        process.join()
    got = []
    while True:
        was_alive = process.is_alive()
        try:
            number, _ = it.get(timeout=0.05)
        except queue.Empty:
            if was_alive:
                continue
            break
        got.append(number)
    process.join()
    assert process.exitcode == ENDS[how]
    assert got == list(range(len(got)))
    assert 100 < len(got) <= 2000
    assert len(got) == 2000 or how != "sys.exit"
    it.put("and on")
    assert it.get(timeout=30) == "and on"
    it.close()


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("method", started.methods("fork", "forkserver"))
def test_a_process_with_unsent_items_ends(method, how):
    """Unreceived messages vanish with the queue, and their memory is released; other messages arrive."""
    context = forkshm.get_context(method)
    it, back = context.Queue(5), context.Queue()
    process = context.Process(target=f.get_and_end, args=(it, back, how))
    process.start()
    for number in range(5):
        it.put(np.full(100_000, float(number)))
    assert back.get(timeout=30) == 100_000.0
    process.join()
    assert process.exitcode == ENDS[how]
    for number in range(5, 7):
        it.put(np.full(100_000, float(number)), timeout=30)
    assert [it.get(timeout=30)[7] for _ in range(5)] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert it.qsize() == 0
    it.close()
    back.close()


def test_stopped_senders_and_receivers_block_no_other_process(spawn, wait_until):
    it = forkshm.Queue(5)

    def take_all():
        while True:
            it.get()

    stopped = [spawn(lambda: count_up(it)), spawn(take_all), spawn(lambda: (it.get(), time.sleep(600)))]
    it.put("there is traffic")
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for pid in stopped:
        wait_until(lambda pid=pid: kernel.is_stopped(pid))
    while not it.empty():
        it.get(timeout=30)
    # Each of the two receivers may have taken an item without returning its place.
    for number in range(100):
        it.put(number, timeout=30)
        assert it.get(timeout=30) == number


def test_memory_of_unreceived_messages_is_released(spawn):
    for _ in range(10):
        it = forkshm.Queue()
        for _ in range(3):
            it.put(np.ones(200_000))
        victim = spawn(lambda it=it: (it.get(), time.sleep(600)))
        spawn.kill(victim)
        del it
    # The leak check looks for blocks that are still held.


def test_join_continues_when_a_worker_is_killed_before_its_first_item(spawn):
    it = forkshm.JoinableQueue()
    victim = spawn(it.get)
    time.sleep(0.02)  # as above
    spawn.kill(victim)

    def work():
        while True:
            it.get()
            it.task_done()

    spawn(work)
    for number in range(100):
        it.put(number)
    it.join()
    assert it.empty()


def test_the_end_of_a_pipe_is_noticed_when_its_process_is_killed(spawn):
    here, there = forkshm.Pipe()

    def child():
        here.close()
        there.send("ready")
        time.sleep(600)

    victim = spawn(child)
    there.close()
    assert here.recv() == "ready"
    spawn.kill(victim)
    with pytest.raises(EOFError):
        here.recv()
    with pytest.raises(BrokenPipeError):
        here.send(1)
    here.close()
