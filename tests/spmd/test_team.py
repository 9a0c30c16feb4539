"""A team: a block that several forked processes run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import forkshm
from forkshm.errors import RemoteTraceback, TeamBrokenError, WorkerDiedError
from forkshm.spmd._team_state import LEFT, LOOPS

np = pytest.importorskip("numpy")

SIZES = [1, 2, 5]
HERE = os.getpid()


class Boom(Exception):
    def __init__(self, what, rank):
        super().__init__(what, rank)
        self.rank = rank


@pytest.mark.parametrize("size", SIZES)
def test_all_members_run_the_block_and_one_process_goes_on(size):
    pids = forkshm.zeros(size, int)
    with forkshm.team(size) as t:
        assert t.size == size
        pids[t.rank] = os.getpid()
    assert pids[0] == os.getpid()
    assert len(set(pids.tolist())) == size
    assert 0 not in pids
    assert t.rank == 0


def test_the_default_size_is_the_number_of_usable_cores():
    with forkshm.team() as t:
        assert t.size == len(os.sched_getaffinity(0))


def test_members_do_not_run_the_code_after_the_block(run_script):
    script = """
import atexit, forkshm, os, sys
atexit.register(print, "at exit")
print("before", flush=True)
try:
    with forkshm.team(3) as t:
        os.write(1, b"in %d\\n" % t.rank)
        t.barrier()
        if t.rank == 1:
            sys.exit("no more")
except SystemExit as error:
    print("raised", error)
finally:
    print("finally")
print("after")
"""
    said = run_script(script).splitlines()
    assert sorted(said) == sorted(["before", "in 0", "in 1", "in 2", "raised no more", "finally", "after", "at exit"])


def test_a_team_is_used_once_and_collectives_need_a_block():
    t = forkshm.team(2)
    with pytest.raises(forkshm.ForkshmError, match="has not begun or has ended"):
        t.barrier()
    with t:
        pass
    with pytest.raises(forkshm.ForkshmError, match="has ended"):
        t.reduce(1)
    with pytest.raises(forkshm.ForkshmError, match="can be used once"):
        t.__enter__()


@pytest.mark.parametrize("size", [0, -1])
def test_a_team_has_a_member(size):
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        forkshm.team(size)


# -- common work of members -------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", ["static", "dynamic", "guided"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_each_number_of_a_range_goes_to_one_member(size, schedule, chunk):
    lengths = [0, 1, 7, 64]
    seen = forkshm.zeros((len(lengths), 200), int)
    with forkshm.team(size) as t:
        for row, length in enumerate(lengths):
            for i in t.range(10, 10 + 3 * length, 3, schedule=schedule, chunksize=chunk):
                with t.lock:
                    seen[row, (i - 10) // 3] += 1
    for row, length in enumerate(lengths):
        assert seen[row].tolist() == [1] * length + [0] * (200 - length)


def test_static_parts_are_the_same_every_time():
    with forkshm.team(3) as t:
        parts = t.reduce({t.rank: [list(t.range(7)), list(t.range(7, chunksize=2))]}, lambda a, b: {**a, **b})
    assert parts == {
        0: [[0, 1, 2], [0, 1, 6]],
        1: [[3, 4], [2, 3]],
        2: [[5, 6], [4, 5]],
    }


def test_more_loops_than_may_be_under_way(wait_until):
    counts = forkshm.zeros(3, int)
    with forkshm.team(3) as t:
        for loop in range(2 * LOOPS + 5):
            counts[t.rank] += sum(1 for _ in t.range(4, schedule="dynamic"))
            if t.rank == 2 and loop == 0:
                # The others run ahead as far as allowed, and wait there.
                wait_until(lambda: t._team_state.loops_begun[0] == t._team_state.loops_begun[1] == LOOPS + 1)
    assert counts.sum() == 4 * (2 * LOOPS + 5)


def test_members_that_come_to_different_loops_are_told():
    with pytest.raises(ValueError, match="members disagree about loop 1: it has"), forkshm.team(2) as t:
        list(t.range(5 + t.rank, schedule="dynamic"))


@pytest.mark.parametrize("kind", [list, iter, tuple, np.array])
@pytest.mark.parametrize("chunk", [1, 4])
def test_each_element_of_an_iterable_goes_to_one_member(kind, chunk):
    with forkshm.team(3) as t:
        mine = [int(x) for x in t.iterate(kind(list(range(50))), chunksize=chunk)]
        everybody = t.reduce(mine)
    assert sorted(everybody) == list(range(50))


@pytest.mark.parametrize(
    "options", [{"schedule": "chaotic"}, {"chunksize": 0}, {"schedule": "dynamic", "chunksize": -1}]
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match=r"schedule must be|chunksize must be"), forkshm.team(1) as t:
        t.range(3, **options)


@pytest.mark.parametrize("size", SIZES)
def test_single_is_one_of_them(size):
    done = forkshm.zeros(20, int)
    with forkshm.team(size) as t:
        for i in range(20):
            if t.single():
                done[i] += 1
    assert done.tolist() == [1] * 20


@pytest.mark.parametrize("size", SIZES)
def test_barriers_keep_step(size):
    steps = forkshm.zeros(size, int)
    with forkshm.team(size) as t:
        for step in range(100):
            steps[t.rank] = step
            t.barrier()
            assert (steps == step).all()
            t.barrier()


def test_a_member_that_leaves_after_a_barrier_has_reached_it():
    """Even if another member looked before the last one arrived, and for members that left after that."""
    go = forkshm.zeros(1, "int64")
    with forkshm.team(2) as t:
        if t.rank == 1:
            check = t._check

            def check_late(where):
                go[0] = 1
                while t._team_state.states[0] < LEFT:
                    time.sleep(0.001)
                check(where)

            t._check = check_late
        else:
            while not go[0]:
                time.sleep(0.001)
        t.barrier()


@pytest.mark.parametrize(
    ("op", "expected"), [("sum", 15), ("product", 120), ("min", 1), ("max", 5), (lambda a, b: a * 10 + b, 12345)]
)
def test_all_members_get_the_result_of_a_reduction(op, expected):
    with forkshm.team(5) as t:
        assert t.reduce(t.rank + 1, op) == expected
    with forkshm.team(1) as t:
        assert t.reduce(7, op) == 7


@pytest.mark.parametrize("nbytes", [8, 1000, 4096, 2**20])
def test_arrays_of_any_size_are_reduced(nbytes):
    with forkshm.team(3) as t:
        for turn in range(4):
            mine = np.arange(nbytes // 8) + t.rank + turn
            assert np.array_equal(t.reduce(mine, "max"), np.arange(nbytes // 8) + 2 + turn)
            assert t.reduce(mine, "min")[0] == turn
            text = t.reduce("x" * nbytes)
            assert len(text) == 3 * nbytes


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match=r"one of .*'max'.*got 'median'"), forkshm.team(1) as t:
        t.reduce(1, "median")


def test_the_lock_is_had_by_one_and_may_be_taken_again():
    count = forkshm.zeros(1, int)
    with forkshm.team(4) as t:
        for _ in range(200):
            with t.lock, t.lock:
                count[0] += 1
        t.barrier()
        if t.rank == 0:
            t.lock.acquire()
        t.barrier()
        if t.rank:
            assert not t.lock.acquire(timeout=0)
        t.barrier()
        if t.rank == 0:
            t.lock.release()
    assert count[0] == 800


def test_nested_teams():
    pids = forkshm.zeros((2, 3), int)
    with forkshm.team(2) as outer:
        with forkshm.team(3) as inner:
            pids[outer.rank, inner.rank] = os.getpid()
            if inner.rank:
                with pytest.raises(forkshm.ForkshmError, match="it is not a member, but was forked"):
                    outer.barrier()
            assert inner.reduce(1) == 3
        assert outer.reduce(1) == 2
    assert len(set(pids.ravel().tolist())) == 6


def in_a_worker():
    with forkshm.team(3) as t:
        return t.reduce(t.rank)


def test_a_team_in_a_worker_of_a_pool_and_a_pool_in_a_team(pool):
    assert pool.apply(in_a_worker) == 3
    with forkshm.team(2) as t:
        with forkshm.Pool(2) as own:
            total = sum(own.map(abs, [1, -2]))
        assert t.reduce(total) == 6


def test_a_team_may_be_started_by_any_thread():
    results = []

    def run():
        with forkshm.team(2) as t:
            total = t.reduce(1)
        results.append(total)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [2]


def test_items_put_by_a_member_arrive():
    queue = forkshm.Queue()
    with forkshm.team(3) as t:
        if t.rank:
            for item in range(500):
                queue.put((t.rank, item, "x" * 1000))
        else:
            items = [queue.get(timeout=60) for _ in range(1000)]
    assert len({item[:2] for item in items}) == 1000
    queue.close()
    queue.join_thread()


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("waiting", ["barrier", "reduce", "nothing"])
def test_an_exception_of_a_member_is_raised_in_the_caller(rank, waiting):
    with pytest.raises(Boom) as raised, forkshm.team(3) as t:
        if t.rank == rank:
            raise Boom("went wrong", t.rank)
        if waiting == "barrier":
            t.barrier()
        elif waiting == "reduce":
            t.reduce(1)
    assert raised.value.rank == rank
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert f"member {rank} of a team of 3 raised" in str(raised.value.__cause__)
    assert 'raise Boom("went wrong", t.rank)' in str(raised.value.__cause__)


def test_members_in_a_barrier_are_freed_and_can_clean_up(monkeypatch):
    monkeypatch.setattr("forkshm.spmd._monitor.GRACE_SECONDS", 60.0)
    freed = forkshm.zeros(3, int)
    with pytest.raises(Boom), forkshm.team(3) as t:
        if t.rank == 2:
            raise Boom("here", 2)
        try:
            t.barrier()
        except TeamBrokenError as error:
            freed[t.rank] = 10 + error.rank
            raise
    # By then the other of the two may have failed, too.
    assert freed[0] in (12, 11)
    assert freed[1] in (12, 10)
    assert 12 in freed


@pytest.mark.parametrize("waiting", ["barrier", "reduce", "lock", "nothing"])
def test_a_killed_member_is_an_error_and_frees_the_others(waiting):
    with pytest.raises(WorkerDiedError, match=r"member 1 of a team of 3 \(pid \d+\) was killed by SIGKILL"):
        with forkshm.team(3) as t:
            if t.rank == 1:
                if waiting == "lock":
                    t.lock.acquire()
                os.kill(os.getpid(), signal.SIGKILL)
            if waiting == "barrier":
                t.barrier()
            elif waiting == "reduce":
                t.reduce(1)
            elif waiting == "lock":
                while True:  # until the dead member has had it
                    with t.lock:
                        pass


def test_a_member_killed_anywhere_blocks_no_other():
    """A member is killed from outside, whatever it is doing."""
    for attempt in range(10):
        pids = forkshm.zeros(3, int)
        with pytest.raises(WorkerDiedError), forkshm.team(3) as t:
            pids[t.rank] = os.getpid()
            t.barrier()
            if t.rank == 0:
                for _ in range(attempt * 3):
                    t.reduce(1)
                os.kill(int(pids[2]), signal.SIGKILL)
            while True:
                t.reduce(sum(t.range(5, schedule="dynamic")))
                with t.lock:
                    pass


def test_a_member_that_ends_without_leaving_is_an_error():
    with pytest.raises(WorkerDiedError, match="exited with code 0 while running the block"), forkshm.team(2) as t:
        if t.rank == 1:
            os._exit(0)


def test_a_member_that_leaves_early_is_not_waited_for():
    with pytest.raises(TeamBrokenError, match=r"member 1 .* has left and will not arrive"), forkshm.team(2) as t:
        if t.rank == 0:
            t.barrier()
    with pytest.raises(TeamBrokenError, match=r"member 0 .* has left and will not arrive"), forkshm.team(2) as t:
        if t.rank == 1:
            t.barrier()


def test_an_exception_of_the_first_member_ends_the_others():
    pids = forkshm.zeros(3, int)
    with pytest.raises(Boom), forkshm.team(3) as t:
        pids[t.rank] = os.getpid()
        t.barrier()
        if t.rank == 0:
            raise Boom("mine", 0)
        signal.pause()
    for pid in pids[1:]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_the_callers_exception_has_a_members_exception_as_context():
    with pytest.raises(Boom) as raised, forkshm.team(2) as t:
        if t.rank == 1:
            raise Boom("cause", 1)
        with pytest.raises(TeamBrokenError):
            t.barrier()
        raise Boom("result", 0)
    assert raised.value.rank == 0
    assert isinstance(raised.value.__context__, (Boom, TeamBrokenError))


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("not me")


def test_an_exception_that_cannot_be_sent_is_told():
    with (
        pytest.raises(forkshm.NotPicklableError, match=r"which cannot be sent: TypeError\('not me'\)"),
        forkshm.team(2) as t,
    ):
        if t.rank:
            raise Unpicklable("secret")


def test_when_fork_is_refused_no_member_has_begun(monkeypatch):
    begun = forkshm.zeros(4, int)
    real, calls = os.fork, []

    def fork():
        calls.append(1)
        if len(calls) == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(forkshm.errors.WorkerStartError, match="cannot start a team of 4"), forkshm.team(4) as t:
        begun[t.rank] = 1
    assert not begun.any()


def test_exit_codes_taken_by_other_code_do_no_harm(run_script):
    script = """
import forkshm, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with forkshm.team(3) as t:
    total = t.reduce(1)
print(total)
"""
    assert run_script(script) == "3\n"


MEMBERS = """
import forkshm, os, signal, sys, time
def wait():
    while True:  # Python may have looked for signals just before one comes: pause() would not see it
        time.sleep(0.05)
with forkshm.team(3) as t:
    pids = t.reduce([os.getpid()])
    if t.rank == 0:
        print(*pids, flush=True)
    {wait}
print("after")
"""


def members(wait, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBERS.format(wait=wait)], stdout=subprocess.PIPE, text=True, **options
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


def is_gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("wait", ["wait()", "t.barrier() if t.rank else wait()"])
def test_members_end_with_the_process_that_began(wait, wait_until):
    process, pids = members(wait)
    with process:
        assert len(pids) == 3
        process.kill()
        assert process.stdout.read() == ""
    wait_until(lambda: all(is_gone(pid) for pid in pids))


@pytest.mark.parametrize("wait", ["wait()", "t.barrier() if t.rank == 0 else wait()"])
def test_ctrl_c_is_one_traceback(wait, wait_until):
    process, pids = members(wait, stderr=subprocess.PIPE, start_new_session=True)
    with process:
        os.killpg(process.pid, signal.SIGINT)
        said, complained = process.communicate(timeout=60)
    assert said == ""
    assert complained.count("Traceback") == 1
    assert complained.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode in (130, -signal.SIGINT)
    wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_a_start_whose_end_is_interrupted_kills_the_members(monkeypatch):
    from forkshm.spmd._monitor import TeamMonitor
    from forkshm.spmd._team_state import TeamState

    class Interrupt(BaseException):
        pass

    interrupts = [Interrupt("in the end")]
    close = TeamMonitor.close

    def interrupt(_):
        raise Interrupt("in the start")

    def interrupted(monitor):
        if interrupts:
            raise interrupts.pop()
        close(monitor)

    monkeypatch.setattr(TeamState, "open_gate", interrupt)
    monkeypatch.setattr(TeamMonitor, "close", interrupted)
    with pytest.raises(Interrupt), forkshm.team(2):
        pass
    assert not interrupts
