"""A signal handler uses the pool that the interrupted call waits for, inside the waiting system call."""

from __future__ import annotations

import signal
import time

import pytest

import forkshm

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")


def wait_until_set(flags, number):
    while not flags[number]:
        time.sleep(0.002)
    return number


def set_flag(flags, number):
    flags[number] = 1
    return number


@pytest.mark.parametrize("call", ["apply", "map", "imap"])
def test_a_handler_calls_the_pool_whose_result_is_waited_for(call):
    flags = forkshm.zeros(4)
    got = []
    with forkshm.Pool(2) as pool:
        assert pool.apply(set_flag, (flags, 0)) == 0

        def handler(*_):
            # The interrupted call is answered only after this one.
            got.append(pool.apply(set_flag, (flags, 1)))

        before = signal.signal(signal.SIGALRM, handler)
        try:
            # Longer than the time after which a waiting thread looks again.
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            if call == "apply":
                assert pool.apply(wait_until_set, (flags, 1)) == 1
            elif call == "map":
                assert pool.starmap(wait_until_set, [(flags, 1)], chunksize=1) == [1]
            else:
                assert list(pool.imap(lambda number: wait_until_set(flags, number), [1])) == [1]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert got == [1]
        assert pool.map(abs, [-1, 2]) == [1, 2]
