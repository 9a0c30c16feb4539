"""Forks that are not ours, while our objects live."""

import os
import subprocess
import sys
import threading

import functions as f
import numpy as np

import forkshm
from forkshm.region._arena import arena


def test_a_forked_child_keeps_the_blocks_it_sees(pool, tmp_path, wait_until):
    """The parent's views go, the child's stay: the worker must not write there again."""
    kept = pool.apply(np.full, (500_000, 3.0))
    go, seen = tmp_path / "go", tmp_path / "seen"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            wait_until(go.exists)
            code = 0 if (kept == 3.0).all() else 2
        finally:
            os._exit(code)
    del kept
    for value in range(10):
        assert pool.apply(np.full, (500_000, float(value)))[0] == value
    go.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not seen.exists()


def test_the_parent_keeps_its_blocks_when_a_child_drops_its_own(pool, in_child):
    kept = pool.apply(np.full, (500_000, 3.0))

    def drop():
        nonlocal kept
        del kept

    assert in_child(drop) == 0
    for value in range(10):
        pool.apply(np.full, (500_000, float(value)))
    assert (kept == 3.0).all()


def test_a_forked_child_has_an_arena_and_pools_of_its_own(pool, in_child):
    def work():
        assert arena.statistics().segments == 0
        with forkshm.Pool(2) as mine:
            assert mine.map(f.square, range(20)) == [x * x for x in range(20)]
            assert mine.apply(np.sum, (np.ones(100_000),)) == 100_000

    pool.apply(np.sum, (np.ones(100_000),))
    assert in_child(work) == 0
    assert pool.apply(np.sum, (np.ones(100_000),)) == 100_000


PROGRAM = """
import os
for name in os.listdir("/proc/self/fd"):
    try:
        print(os.readlink("/proc/self/fd/" + name))
    except FileNotFoundError:
        pass
"""


def test_fds_do_not_leak_into_programs_that_are_started(pool):
    region = forkshm.anonymous_shared_memory(10)
    kept = pool.apply(np.ones, (100_000,))
    listing = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        close_fds=False,
    ).stdout
    assert "forkshm" not in listing
    assert kept.sum() == 100_000
    region.close()


def test_forks_while_other_threads_use_the_pool(pool, in_child):
    stop = threading.Event()
    errors = []

    def use():
        try:
            while not stop.is_set():
                assert pool.apply(np.sum, (np.ones(20_000),)) == 20_000
                forkshm.ones(100)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()

    def child():
        # The tables and the arena are whole, whatever the other threads were at.
        mine = forkshm.ones(1000)
        assert mine.sum() == 1000
        block = arena.allocate(100_000)
        arena.free(block)

    try:
        for _ in range(40):
            assert in_child(child) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
