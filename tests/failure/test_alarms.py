"""An alarm whose handler raises TimeoutError, which is an OSError, ends a call that waits."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time

import numpy as np
import pytest
from capability_skips import has

import forkshm
from forkshm.backend import kernel

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no interval timers")

GUARD = 30


@contextlib.contextmanager
def alarm_after(seconds, kind=TimeoutError):
    """Raise an exception after this time; and again after a long time, so that a failed test ends."""

    def expire(*_):
        raise kind("the alarm")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, GUARD)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ends_in_time(wait, kind=TimeoutError):
    began = time.monotonic()
    with alarm_after(0.05, kind), pytest.raises(kind, match="the alarm"):
        wait()
    return time.monotonic() - began < GUARD


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_an_alarm_ends_a_get(kind):
    queue = getattr(forkshm, kind)()
    assert ends_in_time(queue.get)
    queue.put("item")
    assert queue.get() == "item"
    queue.close()


def test_an_alarm_ends_a_recv():
    receiver, sender = forkshm.Pipe(duplex=False)
    with receiver, sender:
        assert ends_in_time(receiver.recv)
        sender.send("item")
        assert receiver.recv() == "item"


def test_an_alarm_ends_a_put_into_a_full_queue():
    queue = forkshm.Queue(1)
    queue.put("item")
    assert ends_in_time(lambda: queue.put("more"))
    assert queue.get() == "item"
    assert queue.empty()
    queue.close()


def test_an_alarm_ends_a_wait_for_a_result():
    with forkshm.Pool(1) as pool:
        result = pool.apply_async(time.sleep, (60,))
        assert ends_in_time(result.get)


@pytest.mark.parametrize("timeout", [None, 60])
def test_any_error_of_an_alarm_ends_a_get(timeout):
    queue = forkshm.Queue()
    assert ends_in_time(lambda: queue.get(timeout=timeout), BlockingIOError)
    queue.close()


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_an_alarm_ends_the_join_of_a_process(method, timeout):
    process = forkshm.get_context(method).Process(target=time.sleep, args=(60,))
    process.start()
    assert ends_in_time(lambda: process.join(timeout))
    assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()


@pytest.mark.parametrize(
    ("kind", "number"),
    [(BrokenPipeError, errno.EPIPE), (BlockingIOError, errno.EAGAIN), (OSError, errno.EBADF), (StopIteration, 0)],
)
def test_an_error_like_one_of_the_kernel_ends_a_wait(kind, number):
    receiver, sender = forkshm.Pipe(duplex=False)
    queue, simple = forkshm.Queue(), forkshm.SimpleQueue()
    process = forkshm.Process(target=time.sleep, args=(60,))
    process.start()

    def fill():
        while True:
            sender.send_bytes(bytes(10_000))

    with receiver, sender:
        for wait in (receiver.recv, receiver.recv_bytes, simple.get, queue.get, process.join, fill):
            with alarm_after(0.01, lambda _: kind(number, "the alarm")), pytest.raises(kind) as raised:
                wait()
            assert raised.value.args == (number, "the alarm"), wait
            assert type(raised.value) is kind, wait
        while receiver.poll():
            assert receiver.recv_bytes() == bytes(10_000)
    for channel in (queue, simple):
        channel.put("item")
        assert channel.get() == "item"
        channel.close()
    process.kill()
    process.join()
    process.close()


def test_an_alarm_ends_a_join():
    with forkshm.Pool(1) as pool:
        pool.apply_async(time.sleep, (60,))
        pool.close()
        assert ends_in_time(pool.join)


def signals_are_deferred():
    if has("signals_inside"):
        return False
    from forkshm.backend.posix._whole import _deferral

    return _deferral.is_on


@pytest.mark.needs("fd_numbers")
@pytest.mark.parametrize("at", range(12))
def test_an_alarm_while_the_kernel_tells_about_an_fd_is_raised_and_takes_no_memory(at, monkeypatch):
    """CPython runs signal handlers in os.fstat. Memory seemed to have been closed by other code, and was unmapped."""
    fstat, calls = os.fstat, []

    def interrupted(fd):
        if not signals_are_deferred():
            calls.append(fd)
        if len(calls) == at + 1:
            calls.append(fd)
            raise TimeoutError("the alarm")
        return fstat(fd)

    def send_and_receive(value):
        sender.send(np.full(20_000, value))
        return receiver.recv()

    receiver, sender = forkshm.Pipe(duplex=False)
    with receiver, sender:
        for value in range(3):
            send_and_receive(float(value))
        # A sleep makes the next use of each channel look at its fd.
        time.sleep(0.001)
        monkeypatch.setattr(os, "fstat", interrupted)
        try:
            for value in range(3):
                send_and_receive(float(value))
        except TimeoutError:
            pass
        else:
            assert len(calls) <= at, "the alarm was ignored"
        monkeypatch.undo()
        while receiver.poll():
            receiver.recv()
        assert (send_and_receive(7.0) == 7.0).all()


@pytest.mark.parametrize("calls", [1, 2])
def test_an_alarm_while_pages_are_mapped_is_raised(calls, monkeypatch):
    advise, advised = kernel.advise, []

    def interrupted(*arguments, **options):
        advised.append(arguments)
        if len(advised) == calls:
            raise TimeoutError("the alarm")
        return advise(*arguments, **options)

    receiver, sender = forkshm.Pipe(duplex=False)
    with receiver, sender:
        monkeypatch.setattr(kernel, "advise", interrupted)
        kept = []
        try:
            for _ in range(4):
                sender.send(np.ones(3_000_000))
                kept.append(receiver.recv())
        except TimeoutError:
            pass
        else:
            assert len(advised) < calls, "the alarm was ignored"
