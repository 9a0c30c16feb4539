"""A signal handler uses the pool that the interrupted call waits for, inside the waiting system call."""

from __future__ import annotations

import signal
import time

import functions as f
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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["last_words", "exit_code", "reap", "start", "_make", "_begin", "_enter", "look_at"])
def test_a_handler_calls_the_pool_while_a_dead_worker_is_replaced(step, when, monkeypatch, tmp_path):
    with forkshm.Pool(2, retries=1) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
        worker_group = pool._dispatcher._worker_group
        real = getattr(worker_group, step)
        got = []

        def handler():
            if not got:
                got.append(0)
                got.append(pool.apply(abs, (-3,)))

        def interrupted(*args):
            if when == "before":
                handler()
            value = real(*args)
            handler()
            return value

        monkeypatch.setattr(worker_group, step, interrupted)
        assert pool.apply(f.die_once, (tmp_path / "died", 5)) == 5
        monkeypatch.undo()
        assert got == [0, 3]
        assert pool.map(abs, [-1] * 20, chunksize=1) == [1] * 20
        assert sorted(worker.slot for worker in worker_group.workers) == [0, 1]
        assert len(forkshm.active_children()) == 2
        assert pool.apply(f.die_once, (tmp_path / "again", 6)) == 6


@pytest.mark.needs("fork")
def test_a_handler_cannot_wait_for_the_only_worker_while_it_starts(monkeypatch, tmp_path):
    with forkshm.Pool(1, retries=1) as pool:
        worker_group = pool._dispatcher._worker_group
        real = worker_group._make

        def interrupted(*args):
            with pytest.raises(forkshm.DeadlockError, match="its only worker"):
                pool.apply(abs, (-3,))
            monkeypatch.undo()
            return real(*args)

        monkeypatch.setattr(worker_group, "_make", interrupted)
        assert pool.apply(f.die_once, (tmp_path / "died", 5)) == 5
        assert pool.apply(abs, (-4,)) == 4


def test_an_interrupt_at_the_end_of_a_block_leaves_no_worker(monkeypatch):
    def interrupted(self):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with forkshm.Pool(1) as pool:
            worker_group = pool._worker_group
            monkeypatch.setattr(type(worker_group), "kill", interrupted)
    assert not worker_group.workers
    pool.join()
