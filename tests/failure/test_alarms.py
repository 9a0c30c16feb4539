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
def alarm_after(seconds):
    """Raise TimeoutError after this time; and again after a long time, so that a failed test ends."""

    def expire(*_):
        raise TimeoutError("the alarm")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, GUARD)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ends_in_time(wait):
    began = time.monotonic()
    with alarm_after(0.05), pytest.raises(TimeoutError, match="the alarm"):
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


def test_an_alarm_ends_a_join():
    with forkshm.Pool(1) as pool:
        pool.apply_async(time.sleep, (60,))
        pool.close()
        assert ends_in_time(pool.join)
