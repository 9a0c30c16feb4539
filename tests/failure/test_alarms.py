"""An alarm whose handler raises TimeoutError, which is an OSError, ends a call that waits."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

import forkshm

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


def test_an_alarm_ends_a_join():
    with forkshm.Pool(1) as pool:
        pool.apply_async(time.sleep, (60,))
        pool.close()
        assert ends_in_time(pool.join)
