"""SIGKILL from outside: of idle workers, busy workers, the parent, and all of them at once."""

import contextlib
import os
import random
import signal

import functions as f
import numpy as np
import pytest
import started

import forkshm
from forkshm import WorkerDiedError
from forkshm.backend import kernel


def kill(pid):
    with contextlib.suppress(ProcessLookupError):  # the pool's thread has reaped it meanwhile
        os.kill(pid, signal.SIGKILL)


def workers_of(pool):
    return [worker.pid for worker in pool._worker_group.workers]


def test_an_idle_worker_may_be_killed(pool):
    for _ in range(5):
        for pid in workers_of(pool):
            kill(pid)
        assert pool.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]


def test_an_idle_worker_may_be_killed_while_tasks_come(pool):
    """Each task is answered, or fails with its own worker, whatever the worker was doing."""
    for _ in range(30):
        results = [pool.apply_async(f.square, (x,)) for x in range(20)]
        kill(workers_of(pool)[0])
        failed = 0
        for x, result in enumerate(results):
            try:
                assert result.get(timeout=60) == x * x
            except WorkerDiedError:
                failed += 1
        assert failed <= 1


def test_random_kills_under_load_lose_and_double_nothing(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    marks = tmp_path / "marks"
    table = np.arange(50_000)

    def work(x, array):
        f.touch_file(marks, x)
        return x, int(array.sum())

    answered = failed = 0
    with forkshm.Pool(3) as pool:
        results = {}
        for x in range(600):
            results[x] = pool.apply_async(work, (x, table))
            # All workers may have died, and not been replaced yet.
            if chance.random() < 0.05 and (workers := workers_of(pool)):
                kill(chance.choice(workers))
        for x, result in results.items():
            try:
                assert result.get(timeout=60) == (x, 1249975000)
                answered += 1
            except WorkerDiedError:
                failed += 1
        assert answered + failed == 600
        assert failed <= pool.statistics().workers_replaced
    lines = [int(line) for line in marks.read_text().split()]
    assert len(lines) == len(set(lines)), "a task ran twice"
    assert len(lines) >= answered


@pytest.mark.needs("children")
def test_exit_codes_that_others_collect_do_not_confuse_the_pool(run_script):
    out = run_script("""
import os, signal, sys, forkshm
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel keeps no exit codes
pool = forkshm.Pool(1)
try:
    pool.apply(os._exit, (3,))
except forkshm.WorkerDiedError as error:
    print(error.exitcode, "_exit(3)" in str(error))
print(pool.apply(abs, (-1,)))
pool.close()
pool.join()
""")
    kept = "3" if f.keeps_exit_codes() else "None"
    assert out == f"{kept} True\n1\n"


@pytest.mark.needs("inheritance")
def test_a_worker_dies_before_naming_its_task(pool, monkeypatch):
    """The task was not begun, so it is sent again; the caller notices nothing."""
    assert pool.apply(f.square, (2,)) == 4

    from forkshm.channel import Receiver

    original = Receiver.receive_nowait
    # Workers started now die right after their first message. Their replacements, started after the patch is undone, do
    # not.
    parent = os.getpid()

    def deadly(self):
        received = original(self)
        if os.getpid() != parent and received is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return received

    monkeypatch.setattr(Receiver, "receive_nowait", deadly)
    with forkshm.Pool(2) as doomed:
        monkeypatch.undo()
        results = [doomed.apply_async(f.square, (x,)) for x in range(40)]
        assert [result.get(timeout=60) for result in results] == [x * x for x in range(40)]
        # Both tasks, unless the replacement of the first worker was faster than the second worker.
        assert doomed.statistics().workers_replaced in (1, 2)


@pytest.mark.needs("inheritance")
def test_a_worker_dies_after_its_answer_but_before_recording_it(monkeypatch):
    """The answer counts."""
    from forkshm.pool import _worker

    original = _worker._Worker._send

    def send_and_die(self, kind, number, *payloads, **options):
        original(self, kind, number, *payloads, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    original_tiny = _worker._Worker._send_tiny

    def send_tiny_and_die(self, number, began, payload):
        original_tiny(self, number, began, payload)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(_worker._Worker, "_send", send_and_die)
    monkeypatch.setattr(_worker._Worker, "_send_tiny", send_tiny_and_die)
    with forkshm.Pool(2) as pool:
        monkeypatch.undo()
        assert pool.map(f.square, range(40), chunksize=1) == [x * x for x in range(40)]


PARENT = """
import os, sys, time, forkshm, numpy as np
sys.path.insert(0, {tests!r})
import functions as f
pool = forkshm.Pool(3)
shared = forkshm.ones(1_000_000)
pool.apply(np.sum, (np.ones(1_000_000),))
results = [pool.apply_async(f.hang, ({path!r} + str(i),)) for i in range(2)]
kept = pool.apply(np.ones, (100_000,))
while not all(os.path.exists({path!r} + str(i)) for i in range(2)):
    pool.apply(f.nothing)
print(os.getpid(), *[worker.pid for worker in pool._worker_group.workers], flush=True)
os.kill(os.getpid(), 9) if {suicide} else time.sleep(100)
"""


alive = kernel.is_running


def test_workers_end_with_a_parent_that_is_killed(run_script, tmp_path, wait_until):
    before = set(os.listdir(kernel.folder_of_named()))
    source = PARENT.format(tests=os.path.dirname(f.__file__), path=str(tmp_path / "begun"), suicide=True)
    done = run_script(source, check=False)
    assert done.returncode == started.KILLED, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    wait_until(lambda: not any(alive(pid) for pid in pids))
    # Files of other tests' programs may be there as well.
    left = set(os.listdir(kernel.folder_of_named())) - before
    assert not [name for name in left if any(str(pid) in name for pid in pids)]


@pytest.mark.needs("inheritance")
def test_a_sibling_that_the_parent_forked_does_not_keep_the_workers_alive(run_script, tmp_path, wait_until):
    source = """
import os, time, forkshm, sys
pool = forkshm.Pool(1)
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print(pool._worker_group.workers[0].pid, flush=True)
os.close(1)
os.kill(os.getpid(), 9)
"""
    import subprocess
    import sys

    path = tmp_path / "script.py"
    path.write_text(source)
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        worker = int(process.stdout.readline())
        process.wait()
        wait_until(lambda: not alive(worker))
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.needs("interrupts")
def test_ctrl_c_ends_a_map_and_leaves_no_process(tmp_path, wait_until):
    import subprocess
    import sys

    path = tmp_path / "script.py"
    path.write_text(
        f"""
import sys, forkshm
sys.path.insert(0, {os.path.dirname(f.__file__)!r})
import functions as f
with forkshm.Pool(2) as pool:
    print(*[worker.pid for worker in pool._worker_group.workers], flush=True)
    pool.map(f.hang, [{str(tmp_path)!r} + "/" + str(i) for i in range(8)], chunksize=1)
"""
    )
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait() == -signal.SIGINT
    assert errors.count("Traceback (most recent call last)") == 1
    assert "KeyboardInterrupt" in errors
    assert not any(alive(pid) for pid in pids)


def test_terminate_returns_whatever_the_workers_do(tmp_path, wait_until):
    def stubborn(path):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        f.hang(path)

    pool = forkshm.Pool(2)
    pool.apply_async(stubborn, (tmp_path / "begun",))
    wait_until((tmp_path / "begun").exists)
    pids = workers_of(pool)
    os.kill(pids[0], signal.SIGSTOP)
    os.kill(pids[1], signal.SIGSTOP)
    pool.terminate()
    assert not any(alive(pid) for pid in pids)


def test_a_stopped_worker_does_not_hold_the_others_back(pool):
    stopped = workers_of(pool)[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        done = 0
        for _ in range(20):
            try:
                assert pool.apply_async(f.square, (3,)).get(timeout=5) == 9
                done += 1
            except forkshm.TaskTimeoutError:
                pass  # the task that the stopped worker had taken
        assert done >= 19
    finally:
        os.kill(stopped, signal.SIGCONT)


@pytest.mark.needs("inheritance")
def test_a_pool_in_a_forked_child_says_that_it_is_the_parents(pool, in_child):
    parent = os.getpid()

    def use():
        with pytest.raises(forkshm.PoolClosedError, match=rf"belongs to (the parent )?process {parent}"):
            pool.apply(f.square, (1,))
        pool.terminate()

    assert in_child(use) == 0
    assert pool.apply(f.square, (2,)) == 4


@pytest.mark.needs("inheritance")
def test_a_child_that_ends_normally_does_not_end_its_parents_pool(run_script):
    out = run_script("""
import os, sys, forkshm
pool = forkshm.Pool(1)
shared = forkshm.ones(10)
if os.fork() == 0:
    shared[0] = 5
    sys.exit(0)  # with atexit and finalizers
os.wait()
print(pool.apply(abs, (-1,)), shared[0])
""")
    assert out == "1 5.0\n"
