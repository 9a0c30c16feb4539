"""The parent has no forkshm thread when it forks, so a child never inherits a lock held by a missing thread."""

from __future__ import annotations

import pytest

# Records the number of threads, Python's and others, whenever this process is about to fork.
HEAD = """
import os, signal, sys, threading
seen = []

def count_threads():
    return len(os.listdir("/proc/self/task")) if hasattr(os, "fork") else threading.active_count()

if hasattr(os, "fork"):
    os.register_at_fork(before=lambda: seen.append(count_threads()))
import forkshm

def square(x):
    return x * x

def put(queue):
    queue.put(os.getpid())

def no_threads():
    assert count_threads() == 1 == threading.active_count(), threading.enumerate()
    assert set(seen) == {1}, seen
"""


@pytest.mark.needs("inheritance")
def test_a_pool_forks_without_threads(run_script):
    """At its start, when it replaces a worker that died or reached maxtasksperchild, and for a pool in between."""
    run_script(
        HEAD
        + """
with forkshm.Pool(2, maxtasksperchild=1) as pool:
    assert pool.map(square, range(4), chunksize=1) == [0, 1, 4, 9]
    with forkshm.Pool(1) as other:
        later = [other.apply_async(square, (x,)) for x in range(20)]
        assert [one.get() for one in later] == [x * x for x in range(20)]
        assert list(other.imap(square, range(20))) == [x * x for x in range(20)]
        try:
            other.apply(os._exit, (1,))
        except forkshm.WorkerDiedError:
            pass
        assert other.apply(square, (3,)) == 9
    no_threads()
assert len(seen) >= 6, seen
no_threads()
"""
    )


@pytest.mark.needs("inheritance")
def test_processes_queues_and_managers_are_made_without_threads(run_script):
    run_script(
        HEAD
        + """
queues = [forkshm.Queue(), forkshm.JoinableQueue(), forkshm.SimpleQueue()]
ends = forkshm.Pipe()
lock, value = forkshm.Lock(), forkshm.Value("i")
for queue in queues:
    for x in range(100):
        queue.put(x)
    process = forkshm.Process(target=put, args=(queue,))
    process.start()
    assert [queue.get() for _ in range(101)] == [*range(100), process.pid]
    process.join()
with forkshm.Manager() as manager:
    shared = manager.list([1])
    process = forkshm.Process(target=shared.append, args=(2,))
    process.start()
    process.join()
    assert list(shared) == [1, 2]
assert len(seen) == 5, seen
no_threads()
"""
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_other_start_methods_need_no_thread_here(run_script, method):
    run_script(
        HEAD
        + """
if __name__ == "__main__":
    seen.append(1)
    with forkshm.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(square, range(4)) == [0, 1, 4, 9]
        no_threads()
    no_threads()
""",
        method,
    )


@pytest.mark.needs("inheritance")
def test_a_thread_that_holds_a_lock_is_why_forkserver_is_one_argument_away(run_script):
    """Shows the problem and the remedy: a forked child inherits a lock that will never be released."""
    said = run_script(
        HEAD
        + """
import warnings
warnings.simplefilter("ignore")  # CPython 3.12 and later warn of just this

lock = threading.Lock()

def try_it():
    return lock.acquire(timeout=0.05)

if __name__ == "__main__":
    held, leave = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    for method in ("fork", "forkserver"):
        with forkshm.get_context(method).Pool(1) as pool:
            print(method, pool.apply(try_it))
    leave.set()
    thread.join()
"""
    )
    assert said == "fork False\nforkserver True\n"
