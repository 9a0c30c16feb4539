"""``Pool.report()``: where the time went, and how to reduce it."""

import asyncio
import dataclasses
import time
import types

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm import WorkerDiedError, aio
from forkshm.channel import Kind
from forkshm.pool.observe import describe_task
from forkshm.pool.observe._report import PoolReport, SlowTask, SlowTasks, WorkerReport, hints_of

pytestmark = pytest.mark.usefixtures("_warm_up")


def slept(seconds):
    time.sleep(seconds)
    return seconds


def test_each_worker_reports_its_time(pool):
    began = time.monotonic()
    pool.map(slept, [0.05] * 6, chunksize=1)
    report = pool.report()
    passed = time.monotonic() - began
    assert [worker.pid for worker in report.workers] == [process.pid for process in pool._pool]
    assert sum(worker.tasks for worker in report.workers) == report.statistics.tasks == 6
    for worker in report.workers:
        assert worker.busy >= 0.05 * worker.tasks
        assert worker.transfer > 0
        # The current phase of each worker is counted up to now, so only its start is missing.
        assert worker.busy + worker.transfer + worker.waiting <= report.seconds
    assert sum(worker.busy for worker in report.workers) <= 2 * passed
    assert report.packing > 0
    assert report.unpacking > 0


def test_a_task_that_goes_on_counts_so_far(pool, tmp_path, wait_until):
    begun, go = tmp_path / "begun", tmp_path / "go"
    result = pool.apply_async(f.hold, (begun, go))
    wait_until(begun.exists)
    first = max(worker.busy for worker in pool.report().workers)
    wait_until(lambda: max(worker.busy for worker in pool.report().workers) > first + 0.05)
    waiting = [worker.waiting for worker in pool.report().workers]
    wait_until(lambda: any(now.waiting > then for now, then in zip(pool.report().workers, waiting, strict=True)))
    go.touch()
    result.get()
    wait_until(lambda: sum(worker.tasks for worker in pool.report().workers) == 1)


def test_the_slowest_are_named(pool):
    pool.apply(slept, (0.03,))
    pool.map(slept, [0, 0, 0.06, 0], chunksize=2)
    pool.map(f.square, range(2000), chunksize=1)
    slowest = pool.report().slowest
    # On a busy machine, a tiny one may be slower than one of these.
    assert {"slept, items 2 to 3 of the input", "slept(0.03)"} <= {task.task for task in slowest}
    assert slowest[0].seconds >= 0.06
    assert [task.seconds for task in slowest] == sorted((task.seconds for task in slowest), reverse=True)


def test_an_item_of_a_starmap_is_described_like_a_call():
    task = types.SimpleNamespace(
        kind=Kind.STARMAP,
        function=types.SimpleNamespace(function=pow),
        arguments=[(1, 2), (3, 4)],
        position=5,
        sink=types.SimpleNamespace(chunksize=2),
    )
    assert describe_task(task, 1) == "pow(3, 4), item 11 of the input"
    assert describe_task(task, None) == "pow, items 10 to 11 of the input"
    task.arguments.pop()
    assert describe_task(task, None) == "pow, item 10 of the input"


def test_the_ten_slowest_tasks_are_kept():
    tasks = SlowTasks()
    for milliseconds in [*range(2, 40), 5]:
        if milliseconds * 1_000_000 > tasks.floor:
            tasks.note(milliseconds * 1_000_000, f"task {milliseconds}")
    assert [task.task for task in tasks.slowest()] == [f"task {number}" for number in range(39, 29, -1)]


class Loud:
    def __repr__(self):
        raise AssertionError("of the user's own nothing runs")


def test_arguments_are_named_without_running_the_users_code(pool):
    pool.apply(lambda *args, **kwargs: slept(0.01), (Loud(), np.zeros((2, 3)), [Loud()], "text"), {"key": None})
    name = pool.report().slowest[0].task
    assert name.endswith("(Loud, ndarray float64 (2, 3), list of 1, 'text', key=None)")


def test_a_replacement_worker_continues_the_account():
    with forkshm.Pool(1, maxtasksperchild=2) as pool:
        for _ in range(5):
            pool.apply(slept, (0.01,))
        (worker,) = pool.report().workers
        assert worker.pid == pool._pool[0].pid
        assert worker.tasks >= 4  # the fifth may not be recorded yet
        assert worker.busy >= 0.04
        with pytest.raises(WorkerDiedError):
            pool.apply(f.die, ("SIGKILL",))
        pool.apply(slept, (0.01,))
        assert pool.report().workers[0].busy >= 0.05


def test_a_pool_that_has_ended_says_the_last_that_was_known():
    with forkshm.Pool(2) as pool:
        pool.map(slept, [0.01] * 4, chunksize=1)
    assert sum(worker.busy for worker in pool.report().workers) >= 0.04
    pool = forkshm.Pool(2)
    pool.map(slept, [0.01] * 4, chunksize=1)
    pool.close()
    pool.join()
    report = pool.report()
    assert len(report.workers) == 2
    assert sum(worker.tasks for worker in report.workers) == 4
    assert pool.report().workers == report.workers


def test_too_little_work_for_a_worker_is_told(pool):
    pool.map(slept, [0.15, 0, 0, 0], chunksize=1)
    # There may also be a hint on the cost of moving data: spawned workers import modules to unpickle.
    (hint,) = [hint for hint in pool.report().hints if hint.startswith("one worker computed for 0.")]
    assert hint.endswith(" s: slept, item 0 of the input. Split that task.")


def test_copies_that_take_the_time_are_told(pool):
    array = np.ones(4_000_000)
    for _ in range(5):
        pool.apply(len, (array[:],))
    (hint,) = [hint for hint in pool.report().hints if "moving" in hint]
    assert "160 MB were copied. Create large arrays in shared memory" in hint


def report_of(busy, transfer=(0.0, 0.0), tasks=10, copied=0, slowest=()):
    workers = [
        WorkerReport(f"worker {slot}", slot, tasks, each, 0.0, moved)
        for slot, (each, moved) in enumerate(zip(busy, transfer, strict=True))
    ]
    statistics = forkshm.pool.PoolStatistics(tasks, tasks, copied, 0, 0)
    return PoolReport(10.0, tuple(workers), tuple(slowest), 0.0, 0.0, statistics, ())


@pytest.mark.parametrize(
    ("report", "hints"),
    [
        (report_of([1.0, 1.0]), []),
        (report_of([1.0, 1.0], [0.9, 0.9]), []),
        (report_of([0.001, 0.001], [0.005, 0.005]), []),  # too little for a hint
        (
            report_of([0.1, 0.1], [1.0, 1.0], tasks=100_000),
            ["each task computes for only 2 us. Give each task more work (chunksize=...)."],
        ),
        (report_of([0.1, 0.1], [1.0, 1.0], copied=10**9), ["1,000 MB were copied. Create large arrays in shared"]),
        (
            report_of([4.0, 0.5]),
            ["one worker computed for 4 s, and the average is 2.25 s. Divide the work into more and smaller"],
        ),
        (
            report_of([4.0, 0.5], slowest=[SlowTask(3.0, "resize(1)")]),
            ["one worker computed for 4 s, and the average is 2.25 s. One task took 3 s: resize(1). Split that task."],
        ),
        (report_of([4.0], [0.0], slowest=[SlowTask(4.0, "all")]), []),
    ],
)
def test_hints_name_the_cause(report, hints):
    found = hints_of(report)
    assert len(found) == len(hints)
    assert all(expected in said for expected, said in zip(hints, found, strict=True))


def test_a_report_prints_as_a_table():
    report = report_of([4.0, 0.5], slowest=[SlowTask(3.0, "resize(1)")], copied=2_500_000)
    lines = str(dataclasses.replace(report, hints=("do less",))).splitlines()
    assert lines[0].split() == ["tasks", "busy", "transfer", "waiting"]
    assert lines[1].split() == ["worker", "0", "10", "4.000", "s", "0.000", "s", "0.000", "s"]
    assert "2.5 MB were copied, 0.0 MB shared" in lines[3]
    assert [line.strip() for line in lines[4:]] == ["3.000 s: resize(1)", "hint: do less"]


def test_every_interface_has_a_report():
    @forkshm.parallel(workers=2)
    def work(x):
        return slept(0.002) + x

    with pytest.raises(RuntimeError, match="has no workers to report on"):
        work.report()
    work.map(range(4), chunksize=1)
    assert len(work.report().slowest) == 4
    work.close()

    async def main():
        async with aio.Pool(1) as pool:
            await pool.map(slept, [0.002] * 3, 1)
            return pool.report()

    report = asyncio.run(main())
    assert len(report.slowest) == 3
    assert report.unpacking > 0
    with forkshm.Executor(1) as executor:
        executor.submit(slept, 0.002).result()
        assert executor.pool.report().slowest[0].task == "slept(0.002)"
