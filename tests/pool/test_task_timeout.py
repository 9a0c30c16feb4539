"""``Pool(task_timeout=...)``: workers that take too long or were stopped are ended."""

import multiprocessing
import os
import signal
import time

import functions as f
import pytest

import forkshm
from forkshm import TaskTimeoutError


@pytest.fixture
def strict(_warm_up):
    # Long enough for an ordinary task on a busy machine.
    with forkshm.Pool(2, task_timeout=1.0) as pool:
        yield pool


def test_a_task_that_takes_too_long_fails_and_its_worker_is_replaced(strict, tmp_path):
    others = [strict.apply_async(f.square, (x,)) for x in range(20)]
    before = time.monotonic()
    with pytest.raises(TaskTimeoutError, match=r"hang\(.*\) took longer than task_timeout=1 seconds") as caught:
        strict.apply(f.hang, (tmp_path / "begun",))
    assert time.monotonic() - before >= 1.0
    error = caught.value
    assert (error.seconds, error.index) == (1.0, None)
    assert error.task.startswith("hang(")
    assert f"pid {error.pid}" in str(error)
    assert isinstance(error, multiprocessing.TimeoutError)
    assert [other.get() for other in others] == [x * x for x in range(20)]
    assert strict.apply(f.pid) != error.pid
    assert strict.statistics().workers_replaced == 1


def test_each_item_of_a_chunk_has_its_own_time(strict, tmp_path):
    assert strict.map(time.sleep, [0.3] * 5, chunksize=5) == [None] * 5
    with pytest.raises(TaskTimeoutError, match="item 8 of the input") as caught:
        strict.map(lambda x: f.hang(tmp_path / "begun") if x == 8 else x, range(10), chunksize=5)
    assert caught.value.index == 8


def test_only_the_late_item_of_an_imap_fails(strict, tmp_path, wait_until):
    late = strict.imap(lambda x: f.hang(tmp_path / "begun") if x == 2 else x, range(5))
    got = []
    while True:
        try:
            got.append(next(late))
        except TaskTimeoutError as error:
            got.append(error.index)
        except StopIteration:
            break
    assert got == [0, 1, 2, 3, 4]
    wait_until(lambda: strict.statistics().workers_replaced == 1)


def test_a_timeout_needs_no_waiting_caller(strict, tmp_path, wait_until):
    failed = []
    strict.apply_async(f.hang, (tmp_path / "begun",), error_callback=failed.append)
    wait_until(lambda: failed)
    assert isinstance(failed[0], TaskTimeoutError)
    quiet = strict.apply_async(f.hang, (tmp_path / "again",))
    wait_until(lambda: quiet._answered)  # does not read the channel


def test_a_task_that_timed_out_is_not_repeated(tmp_path):
    with forkshm.Pool(1, task_timeout=0.5, retries=3) as pool:
        with pytest.raises(TaskTimeoutError):
            pool.apply(lambda: (f.touch_file(tmp_path / "marks", 1), f.hang(tmp_path / "begun")))
        assert (tmp_path / "marks").read_text() == "1\n"
        # A worker that dies is noticed, however.
        assert pool.apply(f.die_once, (tmp_path / "mark", 5)) == 5


def test_tasks_batched_behind_a_late_task_are_done(strict, tmp_path):
    def work(x):
        if x == 2500:
            f.hang(tmp_path / "begun")
        return f.touch_file(tmp_path / "marks", x)

    with pytest.raises(TaskTimeoutError, match="work"):
        strict.map_async(work, range(3000), chunksize=1).get()
    done = [int(line) for line in (tmp_path / "marks").read_text().split()]
    assert sorted(done) == [x for x in range(3000) if x != 2500]


def test_workers_that_were_stopped_while_idle_are_replaced(strict, wait_until):
    strict.apply(f.nothing)
    pids = [worker.pid for worker in strict._worker_group.workers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    assert strict.map(f.square, range(50), chunksize=1) == [x * x for x in range(50)]

    def all_are_replaced():
        # The waiting caller checks the workers; the first replacement may have done all of the above.
        strict.apply(f.nothing)
        return set(pids).isdisjoint(worker.pid for worker in strict._worker_group.workers)

    wait_until(all_are_replaced)


@pytest.mark.needs("signals")
def test_a_task_that_stops_its_worker_fails(strict):
    with pytest.raises(TaskTimeoutError, match="die"):
        strict.apply(f.die, ("SIGSTOP",))


def test_an_initializer_may_take_its_time():
    with forkshm.Pool(1, time.sleep, (0.6,), task_timeout=0.2) as pool:
        assert pool.apply(f.square, (3,)) == 9


def test_a_parent_that_was_busy_elsewhere_does_not_find_all_overdue(tmp_path, wait_until):
    """Act like a process that was stopped for a while: only time between its own checks counts."""
    with forkshm.Pool(1, task_timeout=30) as pool:
        deadlines = pool._dispatcher._deaths.deadlines
        result = pool.apply_async(f.hold, (tmp_path / "begun", tmp_path / "go"))
        while not (tmp_path / "begun").exists():
            result.wait(0.001)
        looked = deadlines._looked = deadlines._looked - 1000
        wait_until(lambda: deadlines._looked > looked + 1000)
        result.wait(0.01)
        (tmp_path / "go").touch()
        assert result.get() > 0


@pytest.mark.parametrize(
    ("seconds", "error"), [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("soon", ValueError)]
)
def test_a_bad_limit_is_refused(seconds, error):
    with pytest.raises(error, match=r"task_timeout|could not convert"):
        forkshm.Pool(1, task_timeout=seconds)


def test_contexts_pass_the_options_on():
    with forkshm.get_context("fork").Pool(1, task_timeout=0.3, retries=1) as pool, pytest.raises(TaskTimeoutError):
        pool.apply(time.sleep, (60,))
