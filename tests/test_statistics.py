"""The statistics of this process: what it has moved and holds."""

from __future__ import annotations

import dataclasses
import sys
import threading

import functions as f
import numpy as np
import pytest
from system import open_fds

import forkshm
from forkshm.channel import pair
from forkshm.region.blocks._arena import Arena

PLAIN = np.ones(100_000)  # 800,000 bytes


def since(before):
    now = forkshm.statistics()
    return {
        field.name: getattr(now, field.name) - getattr(before, field.name)
        for field in dataclasses.fields(forkshm.accounting.Statistics)
    }


def test_statistics_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        forkshm.statistics().tasks = 0


def test_every_call_is_counted(pool):
    before = forkshm.statistics()
    pool.apply(f.nothing)
    assert since(before)["tasks"] == 1
    assert since(before)["messages"] == 2
    with pytest.raises(ValueError):
        pool.apply(f.fail, (1,))
    pool.map(f.square, range(8), chunksize=2)
    moved = since(before)
    assert moved["tasks"] == 6
    assert moved["bytes_copied"] == moved["bytes_shared"] == 0
    assert pool.statistics().tasks == 6


@pytest.mark.parametrize(
    ("thing", "copied", "shared"),
    [
        (PLAIN, PLAIN.nbytes, 0),
        (forkshm.ones(100_000), 0, PLAIN.nbytes),
        ([PLAIN, PLAIN[10:]], PLAIN.nbytes, 0),
        (b"x" * 500_000, 500_000, 0),
        (np.ones(100), 0, 0),
        (b"small", 0, 0),
    ],
    ids=["plain", "shared", "aliases", "bytes", "small array", "small bytes"],
)
def test_sent_bytes_count_as_copied_or_shared(pool, thing, copied, shared):
    before, of_pool = forkshm.statistics(), pool.statistics()
    pool.apply(f.nothing, (thing,))
    moved = since(before)
    assert copied <= moved["bytes_copied"] <= copied + 200
    assert moved["bytes_shared"] == shared
    assert pool.statistics().bytes_copied - of_pool.bytes_copied == moved["bytes_copied"]
    assert pool.statistics().bytes_shared - of_pool.bytes_shared == moved["bytes_shared"]


def test_returned_bytes_are_counted(pool):
    before = forkshm.statistics()
    made = pool.apply(np.ones, (100_000,))
    assert since(before)["bytes_copied"] == made.nbytes
    shared = pool.apply(forkshm.ones, (100_000,))
    assert since(before)["bytes_copied"] == made.nbytes
    assert since(before)["bytes_shared"] == shared.nbytes


@pytest.mark.needs("written_pages")
def test_arrays_sent_on_are_not_copied_again(pool):
    before = forkshm.statistics()
    pool.apply(f.echo, (PLAIN,))
    moved = since(before)
    assert moved["bytes_copied"] == PLAIN.nbytes
    assert moved["bytes_shared"] == PLAIN.nbytes


def test_a_closure_is_counted_once(pool):
    table = PLAIN.copy()
    before = forkshm.statistics()
    pool.map(lambda i: float(table[i]), range(50), chunksize=1)
    assert since(before)["bytes_copied"] == PLAIN.nbytes


def test_a_worker_has_numbers_of_its_own():
    with forkshm.Pool(1) as pool:
        pool.map(f.square, range(3), chunksize=1)
        theirs = pool.apply(forkshm.statistics)
        assert theirs.tasks == 4
        # Messages received by then, and answered before.
        assert 7 <= theirs.messages <= 8
        pool.apply(f.nothing, (PLAIN,))
        assert pool.apply(forkshm.statistics).bytes_copied == PLAIN.nbytes


def test_a_forked_child_begins_at_zero(pool, in_child):
    pool.apply(f.echo, (PLAIN,))

    def check():
        mine = forkshm.statistics()
        assert (mine.tasks, mine.messages, mine.bytes_copied, mine.bytes_shared) == (0, 0, 0, 0)
        assert (mine.segments, mine.blocks_live, mine.bytes_peak) == (0, 0, 0)

    assert in_child(check) == 0


@pytest.mark.usefixtures("_warm_up")
def test_the_number_of_fds_matches_the_kernel():
    def fds():
        return len(open_fds())

    before, fds_before = forkshm.statistics(), fds()

    def check():
        assert since(before)["descriptors"] == fds() - fds_before

    check()
    region = forkshm.anonymous_shared_memory(5000)
    arrays = [forkshm.zeros(10) for _ in range(5)]
    assert since(before)["regions"] == 6
    check()
    with forkshm.Pool(3) as pool:
        check()
        made = pool.map(np.ones, [100_000] * 9, chunksize=1)
        check()
        back = pool.apply(f.echo, (PLAIN, arrays))
        check()
        with pytest.raises(forkshm.WorkerDiedError):
            pool.apply(f.die, ("SIGKILL",))
        pool.apply(f.nothing)
        check()
        pool.terminate()
        check()
    sender, receiver = pair()
    check()
    sender.close()
    check()
    receiver.close()
    del made, back, arrays, region, pool
    assert since(before)["regions"] == 0
    check()


@pytest.mark.needs("written_pages")
def test_blocks_are_live_while_held(pool, wait_until):
    before = forkshm.statistics()
    back = pool.apply(f.echo, (PLAIN,))
    now = since(before)
    assert (now["blocks_live"], now["segments"] >= 0) == (1, True)
    assert now["bytes_live"] >= PLAIN.nbytes
    assert forkshm.statistics().bytes_peak >= forkshm.statistics().bytes_live
    del back
    # The worker may not have released the array yet.
    wait_until(lambda: since(before)["blocks_live"] == since(before)["bytes_live"] == 0)


def test_the_peak_is_that_of_all_time():
    arena = Arena()
    large = arena.allocate(5_000_000)
    peak = arena.statistics().peak_bytes
    assert peak == large.size
    arena.free(large)
    for _ in range(300):  # more than the period of the recent demand
        arena.free(arena.allocate(4096))
    assert arena.statistics().peak_bytes == peak
    assert arena.statistics().used_bytes == 0
    from forkshm.region._lifetime import guard
    from forkshm.region.blocks._segment import drop_segment

    with guard:
        drop_segment(arena._carved[0].segment)


def test_no_count_is_lost_between_threads():
    """With a switch of threads wherever CPython allows one."""
    threads, times = 8, 2000
    before = forkshm.statistics()

    def talk():
        sender, receiver = pair()
        for _ in range(times):
            sender.send(b"x")
            receiver.receive_nowait()
        sender.close()
        receiver.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        talking = [threading.Thread(target=talk) for _ in range(threads)]
        for thread in talking:
            thread.start()
        for thread in talking:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert since(before)["messages"] == 2 * threads * times
