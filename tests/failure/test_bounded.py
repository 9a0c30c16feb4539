"""Everything takes a bounded time: crash loops, malformed data in a channel, workers that do not end."""

import array
import contextlib
import copy
import functools
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time

import functions as f
import pytest
import started

import forkshm
from forkshm import ForkshmWarning, WorkerDiedError, _multiprocess
from forkshm._system import CAN_FORK
from forkshm.backend import kernel
from forkshm.channel import Kind, Receiver, Sender, write_message
from forkshm.errors import ChannelBrokenError
from forkshm.pickler import pack
from forkshm.pool import _oom, _worker, _worker_group
from forkshm.processes import exit_code
from forkshm.spmd._monitor import wait_gone

pytestmark = pytest.mark.slow


RIGHTS = kernel.RIGHTS


def workers_of(pool):
    return [worker.pid for worker in pool._worker_group.workers]


@pytest.mark.needs("inheritance")
def test_workers_that_die_whenever_they_take_a_task_end_the_pool(monkeypatch):
    """Such a task was never begun, so it would be sent again forever."""
    original, parent = Receiver.receive_nowait, os.getpid()

    def deadly(self):
        received = original(self)
        if os.getpid() != parent and received is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return received

    monkeypatch.setattr(Receiver, "receive_nowait", deadly)
    with forkshm.Pool(2) as pool:
        with pytest.raises(WorkerDiedError, match=r"before it could run a task; 10 workers in a row ended so"):
            pool.map(f.square, range(10))
        with pytest.raises(WorkerDiedError, match="no more are started"):
            pool.apply(f.square, (1,))
        assert pool.statistics().workers_replaced < 20


def test_an_initializer_that_exits_ends_the_pool_with_any_exit_code():
    with forkshm.Pool(2, os._exit, (0,)) as pool, pytest.raises(WorkerDiedError, match="its initializer; 4 workers"):
        pool.apply(f.square, (1,))


def test_an_unpicklable_exception_of_an_initializer_fails_the_pool():
    def initialize():
        raise f.Unbuildable(1, 2)

    with forkshm.Pool(2, initialize) as pool:
        with pytest.raises(forkshm.errors.NotUnpicklableError, match="Unbuildable") as caught:
            pool.map(f.square, range(10))
        assert "in initialize" in str(caught.value.__cause__)


def results_end():
    """Return the results channel of the pool; called in a worker."""
    import gc

    return next(thing._results for thing in gc.get_objects() if type(thing) is _worker._Worker)


@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense" * 10,
        b"x",
        b"x" * 100_000,
        b"fsm\x01\x09\x00" + bytes(18) + b"cut short",
        b"fsm\x01\x04\x01" + bytes(18) + b"?",
    ],
    ids=["no message", "short", "too long", "answers", "result"],
)
def test_nonsense_in_the_channel_is_passed_over(pool, garbage):
    def work(x):
        results_end()._socket.send(garbage)
        return x

    assert pool.map(work, range(4), chunksize=1) == list(range(4))
    assert pool.map(f.square, range(100), chunksize=1) == [x * x for x in range(100)]


@pytest.mark.needs("inheritance")
@pytest.mark.parametrize(
    "instead",
    [b"nonsense", b"", write_message(Kind.RESULT, 7, pack(1))[0], write_message(Kind.CALL, 20, pack(1), pack(2))[0]],
    ids=["nonsense", "empty", "another's", "no answer"],
)
def test_nonsense_in_place_of_an_answer_fails_that_task(monkeypatch, instead):
    original = _worker._Worker._send

    def send(self, kind, number, *payloads, **options):
        if number == 20:
            self._results._socket.send(instead)
        else:
            original(self, kind, number, *payloads, **options)

    original_tiny = _worker._Worker._send_tiny

    def send_tiny(self, number, began, payload):
        if number == 20:
            self._results._socket.send(instead)
        else:
            original_tiny(self, number, began, payload)

    monkeypatch.setattr(_worker._Worker, "_send", send)
    monkeypatch.setattr(_worker._Worker, "_send_tiny", send_tiny)
    with forkshm.Pool(2) as pool:
        results = [pool.apply_async(f.square, (x,)) for x in range(20)]
        for x, result in enumerate(results):
            if x == 4:  # numbers begin at 16
                with pytest.raises(ChannelBrokenError, match=r"the answer to square\(4\) is lost"):
                    result.get()
            else:
                assert result.get() == x * x


@pytest.mark.parametrize("seed", range(3))
def test_stray_data_of_a_worker_never_becomes_an_answer(seed):
    """Random bytes and truncated answers, with and without fds: each task is answered correctly."""

    def misbehave(x):
        chance = random.Random(f"{seed} {x}")
        end = results_end()
        answer = write_message(Kind.RESULT, chance.choice([0, 3, 2**40]), pack([x] * 100))[0]
        for _ in range(chance.randrange(5)):
            what = chance.choice(["random", "cut", "kind", "empty", "large"])
            if what == "random":
                data = chance.randbytes(chance.randrange(1, 300))
            elif what == "cut":
                data = answer[: chance.randrange(1, len(answer))]
            elif what == "kind":
                data = answer[:4] + bytes([chance.randrange(5, 256)]) + answer[5:]
            else:
                data = b"" if what == "empty" else bytes(120_000)
            fds = array.array("i", [end.fileno()] * chance.choice([0, 0, 1, 16]))
            ancillary = [(*RIGHTS, fds)] if fds else []
            end._socket.sendmsg([data], ancillary)
        return x

    before = started.count_fds()
    with forkshm.Pool(3) as pool:
        within = started.count_fds()
        results = [pool.apply_async(misbehave, (x,)) for x in range(150)]
        assert [result.get(60) for result in results] == list(range(150))
        assert pool.map(misbehave, range(300)) == list(range(300))
        assert started.count_fds() == within
    assert started.count_fds() == before


def test_a_worker_that_never_stops_writing_blocks_no_caller(tmp_path, wait_until):
    def babble():
        end = results_end()
        (tmp_path / "begun").touch()
        while True:
            end._socket.send(b"nonsense")

    # Spawned workers import this module first, and Wine takes long for each message.
    seconds, numbers = (2.0, range(100)) if CAN_FORK else (30.0, range(20))
    with forkshm.Pool(2, task_timeout=seconds) as pool:
        babbling = pool.apply_async(babble)
        wait_until((tmp_path / "begun").exists, 60.0)
        assert pool.map(f.square, numbers, chunksize=1) == [x * x for x in numbers]
        with pytest.raises(forkshm.TaskTimeoutError, match="no result within"):
            babbling.get(timeout=0.05)
        with pytest.raises(forkshm.TaskTimeoutError, match="babble"):
            babbling.get()
        assert pool.map(f.square, numbers, chunksize=1) == [x * x for x in numbers]


def test_fds_beside_nonsense_are_closed(pool):
    def work():
        end = results_end()
        sender = Sender(end._socket.dup())
        sender.send(b"nonsense", [end.fileno(), end.fileno()])
        sender.close()

    before = started.count_fds()
    pool.apply(work)
    assert started.count_fds() == before


# -- out of memory ------------------------------------------------------------------------


def test_a_kill_by_the_kernel_is_told_with_the_evidence(tmp_path, monkeypatch):
    events, machine, membership = tmp_path / "memory.events", tmp_path / "vmstat", tmp_path / "cgroup"
    events.write_text("low 0\noom 1\noom_kill 1\n")
    machine.write_text("oom_kill 4\n")
    membership.write_text("1:name=systemd:/\n0::/\n")
    monkeypatch.setattr(_oom, "_GROUPS_V2", str(tmp_path))
    monkeypatch.setattr(_oom, "_MACHINE", str(machine))
    monkeypatch.setattr(_oom, "_MEMBERSHIP", str(membership))
    by_events, by_machine = re.escape(f"{tmp_path}/memory.events"), re.escape(str(machine))
    with forkshm.Pool(1) as pool:
        with pytest.raises(
            WorkerDiedError, match=f"; not by the out-of-memory killer: oom_kill in {by_events} did not"
        ):
            pool.apply(f.die, ("SIGKILL",))
        machine.write_text("oom_kill 5\n")  # of any process: it counts only if the group has no counter of its own
        with pytest.raises(WorkerDiedError, match=f"killer: oom_kill in {by_events} did not"):
            pool.apply(f.die, ("SIGKILL",))
        events.write_text("low 0\noom 1\noom_kill 3\n")
        with pytest.raises(WorkerDiedError, match=f"; the kernel's .*killer: oom_kill in {by_events} rose from 1 to 3"):
            pool.apply(f.die, ("SIGKILL",))
        with pytest.raises(WorkerDiedError) as caught:
            pool.apply(f.die, ("SIGTERM",))
        assert "memory" not in str(caught.value)
    events.unlink()
    with forkshm.Pool(1) as pool:
        machine.write_text("oom_kill 6\n")
        with pytest.raises(WorkerDiedError, match=f"probably the .*killer: oom_kill in {by_machine} rose from 5 to 6"):
            pool.apply(f.die, ("SIGKILL",))


def test_the_first_version_of_groups_is_read_too(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    (tmp_path / "cgroup").write_text("9:cpu:/b\n4:hugetlb,memory:/a\n0::/\n")
    monkeypatch.setattr(_oom, "_GROUPS_V1", str(tmp_path))
    monkeypatch.setattr(_oom, "_MACHINE", str(tmp_path / "none"))
    monkeypatch.setattr(_oom, "_MEMBERSHIP", str(tmp_path / "cgroup"))
    assert "memory.oom_control did not change" in _oom.OomKills().hint()


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(_oom, "_MACHINE", str(tmp_path / "none"))
    monkeypatch.setattr(_oom, "_MEMBERSHIP", str(tmp_path / "none"))
    with forkshm.Pool(1) as pool, pytest.raises(WorkerDiedError, match="the usual cause is"):
        pool.apply(f.die, ("SIGKILL",))


def test_an_exit_code_is_known_although_other_threads_ask_the_kernel_for_every_child():
    """active_children() reaps all children that have ended."""
    over = threading.Event()

    def collect():
        while not over.is_set():
            forkshm.active_children()

    threads = [threading.Thread(target=collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            process = forkshm.Process(target=os._exit, args=(7,))
            process.start()
            gone = kernel.open_process(process.pid, process.sentinel)
            wait_gone(gone)
            kernel.close(gone)
            assert exit_code(process, kernel.COLLECT_SECONDS) == 7
    finally:
        over.set()
        for thread in threads:
            thread.join()


# -- the end of a pool --------------------------------------------------------------------


@pytest.mark.parametrize("method", started.methods("fork", "forkserver"))
@pytest.mark.usefixtures("_fork_server")
def test_terminate_ends_workers_that_ignore_sigterm_or_are_stopped(method, tmp_path, wait_until):
    pool = forkshm.get_context(method).Pool(3)
    pool.map_async(f.hang_on, [tmp_path / str(x) for x in range(2)], chunksize=1)
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    pids = workers_of(pool)
    os.kill(pids[0], signal.SIGSTOP)
    before = time.monotonic()
    pool.terminate()
    pool.join()
    assert time.monotonic() - before < 15
    assert not any(kernel.is_running(pid) for pid in pids)


def test_join_ends_workers_that_do_not_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(_worker_group, "_FAREWELL_SECONDS", 0.2)
    pool = forkshm.Pool(2)
    result = pool.map_async(f.square, range(10))
    assert result.get()[3] == 9
    os.kill(workers_of(pool)[0], signal.SIGSTOP)
    pool.close()
    pool.join()
    assert not workers_of(pool)


def test_join_lets_workers_finish_their_exit_functions(tmp_path):
    def leave_a_mark():
        time.sleep(0.3)
        (tmp_path / "mark").touch()

    def initialize():
        _multiprocess.util.Finalize(None, leave_a_mark, exitpriority=1)

    pool = forkshm.Pool(1, initialize)
    pool.apply(f.nothing)
    pool.close()
    pool.join()
    assert (tmp_path / "mark").exists()


@pytest.mark.skipif(not CAN_FORK, reason="needs fork: replaces the loop of the workers")
def test_join_does_not_wait_for_workers_that_are_not_up(monkeypatch):
    monkeypatch.setattr(_worker_group, "run_worker", lambda assignment: threading.Event().wait())
    pool = forkshm.Pool(2)
    began = time.monotonic()
    pool.close()
    pool.join()
    assert time.monotonic() - began < _worker_group._FAREWELL_SECONDS


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", started.methods("fork", "forkserver", "spawn"))
def test_join_waits_for_workers_that_are_not_up_when_something_of_the_callers_is_to_run_in_them(method, tmp_path):
    initializer = {"initializer": f.begin_late, "initargs": (tmp_path,)}
    for options in (initializer, {"worker_exit": functools.partial(f.leave, tmp_path)}):
        pool = forkshm.get_context(method).Pool(2, **options)
        pool.close()
        pool.join()
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["exit"] * 2 + ["initializer"] * 2


@pytest.mark.skipif(not CAN_FORK, reason="needs fork: a subclass of ForkProcess")
def test_join_waits_for_processes_that_run_something_of_the_callers(tmp_path):
    class Writes(forkshm.get_context("fork").Process):
        def run(self):
            time.sleep(0.2)
            (tmp_path / f"{os.getpid()}").touch()
            super().run()

    context = copy.copy(forkshm.get_context("fork"))
    context.Process = Writes
    pool = forkshm.Pool(2, context=context)
    pool.close()
    pool.join()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.needs("children")
def test_a_worker_that_cannot_be_killed_is_left_behind(monkeypatch):
    """A stand-in for a worker in a system call that cannot be interrupted: signals do not reach it here."""
    monkeypatch.setattr(_worker_group, "_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(_worker_group, "_LAST_SECONDS", 0.05)
    pool = forkshm.Pool(1)
    pool.apply(f.nothing)
    pid = workers_of(pool)[0]
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(_worker_group, "_signal", lambda worker, number: None)
        with pytest.warns(ForkshmWarning, match=rf"\(pid {pid}\) did not end within 0.05 seconds of SIGKILL"):
            pool.terminate()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_program_with_a_stopped_worker_ends(run_script):
    """The order of other exit functions does not matter."""
    out = run_script("""
import weakref
class Early: pass
early = Early()
weakref.finalize(early, print, "early")
import os, signal, forkshm
pool = forkshm.Pool(2)
os.kill(pool._worker_group.workers[0].pid, signal.SIGSTOP)
print("end")
""")
    assert out == "end\nearly\n"


CTRL_C = """
import sys, forkshm
sys.path.insert(0, {tests!r})
import functions as f
if __name__ == "__main__":
    with forkshm.get_context({method!r}).Pool(2) as pool:
        pool.map(f.nothing, range(2))
        print(*[worker.pid for worker in pool._worker_group.workers], flush=True)
        pool.map(f.hang, [{path!r} + "/" + str(i) for i in range(8)], chunksize=1)
"""


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_ctrl_c_ends_a_map_at_once_with_one_traceback(method, tmp_path, wait_until):
    path = tmp_path / "script.py"
    path.write_text(CTRL_C.format(tests=os.path.dirname(f.__file__), path=str(tmp_path), method=method))
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait() == -signal.SIGINT
    assert errors.count("Traceback (most recent call last)") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert len(pids) == 2
    # Workers of the fork server are its children, and it may be about to reap them.
    wait_until(lambda: not any(kernel.is_running(pid) for pid in pids))
    with pytest.raises(ProcessLookupError):
        while True:  # wait until the whole group has ended, with the fork server and the resource tracker
            os.killpg(process.pid, 0)
            time.sleep(0.01)


# -- the parent dies ----------------------------------------------------------------------

ORPHANS = """
import os, sys, forkshm, numpy as np
sys.path.insert(0, {tests!r})
import functions as f
if __name__ == "__main__":
    pool = forkshm.get_context({method!r}).Pool(3)
    shared = forkshm.ones(1_000_000)
    pool.map_async(f.ignore_sigterm_and_hang, [{path!r} + "/" + str(i) for i in range(2)], chunksize=1)
    while not all(os.path.exists({path!r} + "/" + str(i)) for i in range(2)):
        pool.apply(np.sum, (np.ones(1_000_000),))
    print(*[worker.pid for worker in pool._worker_group.workers], flush=True)
    sys.stdin.read()
"""


@pytest.mark.needs("parent_death_signal", only="while a worker is stopped")
@pytest.mark.parametrize("at_once", ["alone", "with a worker", "while a worker is stopped"])
@pytest.mark.parametrize("method", started.methods("fork", "forkserver"))
def test_workers_are_gone_within_a_second_of_their_parent(method, at_once, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(ORPHANS.format(tests=os.path.dirname(f.__file__), path=str(tmp_path), method=method))
    with subprocess.Popen([sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        pidfds = [os.pidfd_open(pid) for pid in pids]
        if at_once == "while a worker is stopped":
            os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
        if at_once == "with a worker":
            with contextlib.suppress(ProcessLookupError):  # the worker has already ended
                signal.pidfd_send_signal(pidfds[0], signal.SIGKILL)
        died = time.monotonic()
        for pidfd in pidfds:
            # With the last fd and mapping of a worker, its memory is gone, too.
            assert select.select([pidfd], [], [], 10)[0]
            os.close(pidfd)
        # This takes milliseconds; the limit is for a very busy machine.
        assert time.monotonic() - died < 5
    assert parent.returncode == -signal.SIGKILL
