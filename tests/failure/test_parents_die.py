"""Deaths of a parent in each phase and in each way: its workers end with it, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import functions as f
import pytest
import started

from forkshm.backend import kernel

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
import forkshm, functions as f
from forkshm.pool import _worker_group, _tasks

def say_who(processes):
    print(*[process.pid for process in processes], flush=True)

def with_pool(use):
    pool = forkshm.get_context(method).Pool(2)
    shared = forkshm.anonymous_shared_memory(2**20)
    assert pool.map(f.square, range(10)) == [x * x for x in range(10)]
    pool.apply_async(f.ignore_sigterm_and_hang, ({path!r} + "/busy",))
    while not os.path.exists({path!r} + "/busy"):
        pool.apply(f.nothing, (shared,))
    say_who(pool._pool)
    use(pool)

def idle(pool):
    f.end(how)

def pickling(pool):
    pool.apply(f.nothing, (f.DieAtPickle(how, -1),))

def sending(pool):
    _tasks.Outstanding.enter = lambda *_: f.end(how)
    pool.apply(f.nothing, (bytes(100_000),))

def unpickling(pool):
    pool.apply(f.die_in_parent, (how, os.getpid()))

def callback(pool):
    import threading
    pool.apply_async(f.nothing, callback=lambda _: f.end(how))
    threading.Event().wait()

def replacing(pool):
    begin = _worker_group.WorkerGroup._begin
    _worker_group.WorkerGroup._begin = lambda *args: (begin(*args), f.end(how))
    pool.apply(f.end, ("SIGKILL",))

def terminating(pool):
    _worker_group._still_there = lambda *_: f.end(how)
    pool.terminate()

def joining(pool):
    _worker_group._still_there = lambda *_: f.end(how)
    pool._dispatcher._accepting = False
    pool.close()
    pool._join_idle()

def starting(_):
    begin = _worker_group.WorkerGroup._begin
    processes = []
    def begin_and_end(worker_group, slot, process, start):
        begin(worker_group, slot, process, start)
        processes.append(process)
        if slot == 1:
            say_who(processes)
            f.end(how)
    _worker_group.WorkerGroup._begin = begin_and_end
    forkshm.get_context(method).Pool(3)

if __name__ == "__main__":
    method, where, how = sys.argv[1:]
    starting(None) if where == "starting" else with_pool(globals()[where])
"""

WHERE = [
    "idle",
    "starting",
    "pickling",
    "sending",
    "unpickling",
    "callback",
    "replacing",
    "terminating",
    "joining",
]
METHODS = started.methods("fork", "forkserver")
WAYS = {"SIGKILL": started.KILLED, "SIGSEGV": -signal.SIGSEGV, "exit": 17}
# The way to end a process does not depend on the phase; and only running Python code can exit normally.
TABLE = [
    *((METHODS[0], where, "SIGKILL") for where in WHERE),
    *((METHODS[1], where, "SIGKILL") for where in WHERE),
    *((METHODS[0], where, how) for where in ("idle", "unpickling", "replacing") for how in ("SIGSEGV", "exit")),
]


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as status:
        return status.read().rpartition(")")[2].split()[0] == "T"


is_alive = kernel.is_running


def run(path, *arguments):
    path.joinpath("script.py").write_text(PROGRAM.format(tests=os.path.dirname(f.__file__), path=str(path)))
    return subprocess.run(
        [sys.executable, str(path / "script.py"), *arguments], capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(("method", "where", "how"), TABLE)
def test_workers_end_with_a_parent_that_dies(method, where, how, tmp_path, wait_until):
    named = set(os.listdir(kernel.folder_of_named()))
    done = run(tmp_path, method, where, how)
    assert done.returncode == WAYS[how], done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert not [
        name for name in set(os.listdir(kernel.folder_of_named())) - named if any(str(pid) in name for pid in pids)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["idle", "pickling"])
def test_workers_end_with_a_parent_that_leaves(method, where, tmp_path, wait_until):
    """The parent exits by sys.exit, with a pool that was never closed and a worker that ignores SIGTERM."""
    done = run(tmp_path, method, where, "sys.exit")
    assert done.returncode == 17, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


STOPPED = """
import os, sys
sys.path.insert(0, {tests!r})
import forkshm, functions as f
if __name__ == "__main__":
    with forkshm.get_context(sys.argv[1]).Pool(2, task_timeout=30) as pool:
        results = [pool.apply_async(f.square, (x,)) for x in range(100)]
        print(*[worker.pid for worker in pool._worker_group.workers], flush=True)
        os.kill(os.getpid(), 19)
        assert [result.get() for result in results] == [x * x for x in range(100)]
        print("went on")
"""


@pytest.mark.needs("signals")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("then", ["goes on", "is killed"])
def test_a_parent_that_is_stopped_goes_on_or_takes_its_workers_along(method, then, tmp_path, wait_until):
    script = tmp_path / "script.py"
    script.write_text(STOPPED.format(tests=os.path.dirname(f.__file__)))
    with subprocess.Popen([sys.executable, str(script), method], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_until(lambda: is_stopped(parent.pid))
        parent.send_signal(signal.SIGCONT if then == "goes on" else signal.SIGKILL)
        said = parent.stdout.read()
        assert parent.wait() == (0 if then == "goes on" else -signal.SIGKILL)
    assert said == ("went on\n" if then == "goes on" else "")
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
