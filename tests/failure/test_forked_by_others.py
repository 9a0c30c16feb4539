"""Forks by other code while forkshm's objects live."""

import concurrent.futures
import faulthandler
import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm.region.blocks._arena import arena


def test_a_forked_child_keeps_its_blocks(pool, tmp_path, wait_until):
    """The parent's views are dropped and the child's remain: the worker must not reuse the block."""
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
    assert "memfd:forkshm" not in listing
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
        # The tables and the arena are consistent, whatever the other threads were doing.
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


def sum_of(array):
    return float(np.sum(array))


def total_here(_):
    return float(inherited.sum())


@pytest.mark.needs("foreign_channels")
def test_a_pool_of_the_standard_library_uses_inherited_views(pool):
    global inherited
    inherited = pool.apply(np.full, (500_000, 3.0))
    shared = forkshm.full(1000, 2.0)
    try:
        with multiprocessing.get_context("fork").Pool(2) as theirs:
            assert theirs.map(total_here, range(4)) == [1_500_000.0] * 4
            for value in range(5):
                assert pool.apply(np.full, (500_000, float(value)))[0] == value
            assert theirs.map(total_here, range(4)) == [1_500_000.0] * 4
            assert theirs.apply(sum_of, (shared,)) == 2000.0
        assert pool.apply(sum_of, (inherited,)) == 1_500_000.0
    finally:
        inherited = None


@pytest.mark.needs("foreign_channels")
def test_an_executor_forks_from_its_own_thread_while_ours_work(pool):
    context = multiprocessing.get_context("fork")
    kept = pool.apply(np.full, (500_000, 3.0))
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        futures = [executor.submit(sum_of, forkshm.full(1000, float(n))) for n in range(10)]
        assert pool.map(sum_of, [kept] * 10) == [1_500_000.0] * 10
        assert [future.result() for future in futures] == [n * 1000.0 for n in range(10)]


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3), os.abort])
def test_a_crash_of_a_child_with_views_affects_no_other_process(pool, end):
    kept = pool.apply(np.full, (500_000, 3.0))
    shared, queue = forkshm.full(1000, 2.0), forkshm.SimpleQueue()
    queue.put(shared)
    pid = os.fork()
    if pid == 0:
        shared[0] = 5.0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        end()
        os._exit(0)
    os.waitpid(pid, 0)
    assert shared[0] == 5.0
    for value in range(5):
        assert pool.apply(np.full, (500_000, float(value)))[0] == value
    assert (kept == 3.0).all()
    assert queue.get()[0] == 5.0
    assert pool.apply(sum_of, (kept,)) == 1_500_000.0
    queue.close()


def test_a_grandchild_keeps_the_blocks_when_its_parents_are_gone(pool):
    kept = pool.apply(np.full, (500_000, 3.0))
    go_read, go_write = os.pipe()
    answer_read, answer_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os.close(go_write)
            os.read(go_read, 1)
            os.write(answer_write, b"y" if (kept == 3.0).all() else b"n")
        os._exit(0)
    os.waitpid(pid, 0)
    del kept
    os.close(answer_write)
    os.close(go_read)
    for value in range(10):
        assert pool.apply(np.full, (500_000, float(value)))[0] == value
    os.close(go_write)
    assert os.read(answer_read, 1) == b"y"
    assert os.read(answer_read, 1) == b""  # the child has ended
    os.close(answer_read)


def test_a_child_that_becomes_another_program_lets_go_of_everything(pool, wait_until):
    arena.trim()
    kept = np.ones(500_000)
    echoed = pool.apply(np.negative, (kept,))
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"])
    del echoed
    try:
        # Only the pages of the program itself are left, and no fd of forkshm.
        wait_until(lambda: "memfd:forkshm" not in pathlib.Path(f"/proc/{pid}/maps").read_text())
        listing = subprocess.run(["ls", "-l", f"/proc/{pid}/fd"], capture_output=True, text=True, check=False).stdout
        assert "memfd:forkshm" not in listing
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_programs_started_while_fds_arrive_inherit_none(pool):
    """An fd must be close-on-exec from the moment it is received."""
    stop, errors = threading.Event(), []

    def receive():
        try:
            while not stop.is_set():
                made = pool.apply(forkshm.ones, (10,))
                assert made.sum() == 10
                assert pool.apply(sum_of, (np.ones(20_000),)) == 20_000
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=receive) for _ in range(2)]
    for thread in threads:
        thread.start()
    look = ["/bin/sh", "-c", "ls -l /proc/self/fd"]
    try:
        for _ in range(40):
            listing = subprocess.run(look, capture_output=True, text=True, check=True, close_fds=False).stdout
            assert "memfd:forkshm" not in listing
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_posix_spawn_inherits_nothing(pool, tmp_path):
    region = forkshm.anonymous_shared_memory(10)
    out = tmp_path / "out"
    to_file = [(os.POSIX_SPAWN_OPEN, 1, str(out), os.O_WRONLY | os.O_CREAT, 0o600)]
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "ls -l /proc/self/fd"], os.environ, file_actions=to_file)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert out.read_text()
    assert "memfd:forkshm" not in out.read_text()
    region.close()


FORK_SERVER_OF_PARENT = """
import os, threading
import forkshm
from multiprocess import forkserver, resource_tracker

def use(method):
    with forkshm.get_context(method).Pool(1) as pool:
        return pool.apply(abs, (-1,))

def in_child():
    use("forkserver")
    use("spawn")

if __name__ == "__main__":
    use("forkserver")
    server = forkserver._forkserver
    started, pid = server._forkserver_pid, os.fork()
    if pid == 0:
        try:
            in_child()
            assert server._forkserver_pid != started
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    process = forkshm.Process(target=in_child)
    process.start()
    process.join()
    print(process.exitcode)
    # Another thread may start a process at the time of a fork.
    held, go = threading.Event(), threading.Event()
    def hold():
        with resource_tracker._resource_tracker._lock, server._lock:
            held.set()
            go.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    process = forkshm.Process(target=in_child)
    process.start()
    process.join(20)
    print(process.exitcode)
    process.kill()
    go.set()
    thread.join()
    use("forkserver")
    print(server._forkserver_pid == started)
"""


@pytest.mark.needs("fork")
def test_a_forked_child_has_a_fork_server_of_its_own(run_script):
    assert run_script(FORK_SERVER_OF_PARENT) == "0\n0\nTrue\n"
