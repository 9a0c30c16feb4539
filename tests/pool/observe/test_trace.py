"""Pool.trace(): the content of the file."""

from __future__ import annotations

import collections
import itertools
import json
import os
import re
import signal
import threading
import time

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm.pool._status import FIRST_TASK, IDLE, TraceRing
from forkshm.pool.observe import _trace

# The fields that the format requires for each kind of event, with their types.
FIELDS = {
    "X": {"name": str, "cat": str, "pid": int, "tid": int, "ts": int, "dur": int, "args": dict},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}


def spin(seconds):
    """Spin for a time measured by the clock."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return os.getpid()


class Read:
    """A trace file."""

    def __init__(self, path):
        whole = json.loads(path.read_text())
        self.dropped = whole["otherData"]["dropped"]
        assert whole["displayTimeUnit"] in ("ms", "ns")
        self.events = []
        self.rows = collections.defaultdict(list)
        self.names = {}
        for event in whole["traceEvents"]:
            fields = FIELDS[event["ph"]]
            assert event.keys() == fields.keys() | {"ph"}
            assert all(type(event[name]) is kind for name, kind in fields.items())
            if event["ph"] == "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                self.events.append(event)
                self.rows[event["pid"], event["tid"]].append(event)
            elif event["name"] == "process_name":
                self.names[event["pid"]] = event["args"]["name"]
        assert {event["pid"] for event in self.events} <= self.names.keys()
        self.workers = self.names.keys() - {os.getpid()}

    def of(self, category, pid=None):
        return [e for e in self.events if e["cat"] == category and pid in (None, e["pid"])]

    def check_rows(self):
        """Check that the events of one row follow one another."""
        for (pid, _), row in self.rows.items():
            if pid in self.workers:
                for before, after in itertools.pairwise(row):
                    assert before["ts"] + before["dur"] <= after["ts"]

    def tasks(self):
        return collections.Counter(e["args"]["task"] for e in self.of("computing"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def test_every_task_is_recorded_once_with_all_its_steps(pool, path, wait_until):
    wait_until(lambda: pool._worker_group.status.states() == [IDLE] * 2)  # spawned workers take a while
    with pool.trace(path):
        for x in range(20):
            pool.apply(f.square, (x,))
    read = Read(path)
    read.check_rows()
    assert set(read.tasks().values()) == {1}
    assert len(read.tasks()) == 20
    assert {e["name"] for e in read.of("computing")} == {"square"}
    for category in ("receiving", "sending"):
        theirs = [e["args"]["task"] for e in read.of(category) if e["pid"] in read.workers]
        assert sorted(theirs) == sorted(read.tasks())
    assert read.dropped == 0
    assert len(read.workers) == 2
    assert all("Worker" in read.names[pid] for pid in read.workers)
    # Every worker waits, for tasks or for the end.
    assert {e["pid"] for e in read.of("waiting")} == read.workers
    parent = {e["cat"] for e in read.events if e["pid"] == os.getpid()}
    assert parent == {"pickling", "sending", "receiving", "unpickling"}


def test_the_computing_time_is_measured(pool, path):
    with pool.trace(path):
        pids = pool.map(spin, [0.02] * 4, chunksize=1)
    read = Read(path)
    read.check_rows()
    computing = read.of("computing")
    assert len(computing) == 4
    assert all(20_000 <= e["dur"] < 10_000_000 for e in computing)
    assert sorted(pids) == sorted(e["pid"] for e in computing)


def test_the_times_of_all_processes_are_of_one_clock(pool, path):
    with pool.trace(path):
        pool.apply(spin, (0.005,))
    read = Read(path)
    (task,) = read.of("computing")
    sent = next(e for e in read.of("sending") if e["pid"] == os.getpid())
    received = next(e for e in read.of("receiving") if e["pid"] == os.getpid())
    assert sent["ts"] <= task["ts"]
    assert task["ts"] + task["dur"] <= received["ts"]


def test_tasks_that_shared_messages_are_tasks_of_their_own(pool, path):
    with pool.trace(path):
        pool.map(f.square, range(3000), chunksize=1)
    read = Read(path)
    read.check_rows()
    assert len(read.tasks()) == 3000
    assert set(read.tasks().values()) == {1}
    assert len([e for e in read.of("receiving") if e["pid"] in read.workers]) < 3000


def test_bytes_of_arguments_and_results_are_told(pool, path):
    with pool.trace(path):
        pool.apply(np.multiply, (np.ones(100_000), 2))
        pool.apply(f.nothing, (forkshm.ones(50_000),))
    first, second = sorted(Read(path).of("computing"), key=lambda e: e["ts"])
    assert 800_000 <= first["args"]["argument_bytes"] < 801_000
    assert 400_000 <= second["args"]["argument_bytes"] < 401_000
    (large,) = [e for e in Read(path).of("sending") if e["args"].get("result_bytes", 0) > 1000]
    assert 800_000 <= large["args"]["result_bytes"] < 801_000


def test_a_task_that_raises_is_marked(pool, path):
    with pool.trace(path):
        for call, args in ((f.fail, (1,)), (f.echo, (f.RaiseAtUnpickle(),)), (f.make, (f.RaiseAtPickle,))):
            with pytest.raises(Exception):
                pool.apply(call, args)
        pool.apply(f.nothing)
    read = Read(path)
    read.check_rows()
    assert [e["args"]["failed"] for e in sorted(read.of("computing"), key=lambda e: e["ts"])] == [True] * 3 + [False]


def test_the_tasks_of_a_killed_worker_are_recorded(path, wait_until, tmp_path):
    with forkshm.Pool(1) as pool, pool.trace(path):
        first = pool.apply(f.pid)
        result = pool.apply_async(f.hang, (str(tmp_path / "begun"),))
        wait_until((tmp_path / "begun").exists)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(forkshm.WorkerDiedError):
            result.get()
        second = pool.apply(f.pid)
    read = Read(path)
    read.check_rows()
    assert read.workers == {first, second}
    assert all("Worker" in read.names[pid] for pid in read.workers)
    # The second worker waits from its start, which was after the first had died.
    assert min(e["ts"] for e in read.of("waiting", second)) > max(e["ts"] for e in read.of("computing", first))
    assert [e["name"] for e in read.of("computing", first)] == ["pid", "hang"]
    assert [e["args"].get("unfinished") for e in read.of("computing", first)] == [None, True]
    assert [e["name"] for e in read.of("computing", second)] == ["pid"]
    end = max(e["ts"] + e["dur"] for e in read.events if e["pid"] == first)
    assert end <= min(e["ts"] for e in read.of("computing", second))


def test_a_task_that_goes_on_is_unfinished_and_earlier_ones_are_not_there(pool, path, tmp_path, wait_until):
    pool.apply(f.square, (2,))
    with pool.trace(path):
        result = pool.apply_async(f.hold, (str(tmp_path / "begun"), str(tmp_path / "go")))
        wait_until((tmp_path / "begun").exists)
    (tmp_path / "go").touch()
    result.get()
    (only,) = Read(path).of("computing")
    assert (only["name"], only["args"]["unfinished"]) == ("hold", True)
    with pool.trace(path):
        pool.apply(f.square, (2,))
    (only,) = Read(path).of("computing")
    assert only["name"] == "square"


def test_idle_workers_wait_to_the_end(pool, path, wait_until):
    wait_until(lambda: pool._worker_group.status.states() == [IDLE] * 2)
    with pool.trace(path):
        time.sleep(0.01)
    read = Read(path)
    waiting = read.of("waiting")
    assert {e["pid"] for e in waiting} == read.workers
    assert all(e["dur"] >= 10_000 for e in waiting)


@pytest.mark.parametrize("end", ["terminate", "close"])
def test_a_pool_may_end_in_the_block(path, end):
    pool = forkshm.Pool(2)
    with pool.trace(path):
        pool.map(f.square, range(10), chunksize=1)
        getattr(pool, end)()
        pool.join()
    read = Read(path)
    read.check_rows()
    assert len(read.tasks()) == 10


def test_retired_workers_have_rows_of_their_own(path):
    with forkshm.Pool(1, maxtasksperchild=1) as pool, pool.trace(path):
        pids = [pool.apply(f.pid) for _ in range(3)]
    read = Read(path)
    read.check_rows()
    assert [e["pid"] for e in sorted(read.of("computing"), key=lambda e: e["ts"])] == pids
    assert len(set(pids)) == 3
    assert set(pids) <= read.workers


def test_the_oldest_make_room_and_are_counted(path, monkeypatch):
    from forkshm.pool import _status

    monkeypatch.setattr(_status, "_TRACE_RING", 64 * 128)
    with forkshm.Pool(1) as pool, pool.trace(path) as trace:
        for _ in range(100):
            pool.apply(f.nothing)
        last = pool._dispatcher._tasks._next - 1
    read = Read(path)
    read.check_rows()
    assert sorted(read.tasks()) == list(range(last - 62, last + 1))
    assert read.dropped == trace.dropped == 100 - 63


def test_events_of_the_parent_make_room_too(pool, path, monkeypatch):
    monkeypatch.setattr(_trace, "_PARENT_EVENTS", 10)
    with pool.trace(path) as trace:
        for _ in range(20):
            pool.apply(f.nothing)
    mine = [e for e in Read(path).events if e["pid"] == os.getpid()]
    assert len(mine) == 10
    assert trace.dropped >= 50


def test_threads_of_the_parent_have_rows_of_their_own(pool, path):
    def work():
        for x in range(20):
            assert pool.apply(f.square, (x,)) == x * x

    with pool.trace(path):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    read = Read(path)
    read.check_rows()
    assert len(read.tasks()) == 60
    assert len([row for row in read.rows if row[0] == os.getpid()]) >= 3


def test_tasks_after_the_end_of_a_trace_are_not_shown(pool, path):
    with pool.trace(path) as trace:
        pool.apply(f.nothing)
    began, stopped = trace._started, trace._stopped
    late = stopped + 10**9
    for times in ((began, began, began, stopped, late), (began, began, late, late, late), (late,) * 5):
        record = (*times, FIRST_TASK, 0, 0, pool._worker_group.workers[0].pid, b"late")
        events = list(trace._of_task(0, record, {}))
        assert all(e["dur"] >= 0 for e in events)
        assert all(e["ts"] + e["dur"] <= stopped // 1000 for e in events)


def test_a_long_name_keeps_its_end():
    def _a_function_with_a_name_that_is_quite_a_bit_longer_than_what_a_record_holds():
        pass

    trace_ring = TraceRing(memoryview(bytearray(16 + 128 * 4)))
    recorder = _trace.Recorder(trace_ring)
    recorder.begin(FIRST_TASK, 1)
    recorder.opened(_a_function_with_a_name_that_is_quite_a_bit_longer_than_what_a_record_holds)
    recorder.begin(FIRST_TASK + 1, 1)
    recorder.opened(len)
    first, second = (_trace._RECORD.unpack_from(trace_ring.records, 128 * i)[-1].rstrip(b"\0") for i in range(2))
    assert first.endswith(b"than_what_a_record_holds")
    assert len(first) == 56
    assert second == b"len"


def test_impossible_traces_raise_at_the_start(pool, tmp_path, path):
    with pytest.raises(FileNotFoundError), pool.trace(tmp_path / "no" / "trace.json"):
        pass
    with pool.trace(path):
        with pytest.raises(RuntimeError, match=re.escape(str(path))), pool.trace(tmp_path / "other.json"):
            pass
        pool.apply(f.nothing)
        used = pool._dispatcher.record.trace
    with pytest.raises(RuntimeError, match="was used before"), used:
        pass
    assert not (tmp_path / "other.json").exists()
    assert len(Read(path).tasks()) == 1
    pool.terminate()
    with pytest.raises(forkshm.PoolClosedError), pool.trace(path):
        pass


def test_a_block_that_raises_writes_its_trace(pool, path):
    with pytest.raises(LookupError), pool.trace(path):
        pool.apply(f.nothing)
        raise LookupError
    assert len(Read(path).tasks()) == 1


def test_a_forked_child_writes_nothing(pool, path):
    with pool.trace(path):
        pool.apply(f.nothing)
        if (pid := os.fork()) == 0:
            try:
                pool._dispatcher.record.trace.__exit__()
            finally:
                os._exit(path.stat().st_size)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pool.apply(f.nothing)
    assert len(Read(path).tasks()) == 2


def test_workers_record_nothing_without_a_trace(pool, path):
    with pool.trace(path):
        pool.apply(f.nothing)
    heads = [trace_ring.head[1] for trace_ring in pool._worker_group.status.trace_rings]
    pool.map(f.square, range(50), chunksize=1)
    assert [trace_ring.head[1] for trace_ring in pool._worker_group.status.trace_rings] == heads
    assert [trace_ring.head[0] for trace_ring in pool._worker_group.status.trace_rings] == [0, 0]
