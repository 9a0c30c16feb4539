"""forkshm.Executor: futures over a pool. The standard library's own tests are in test_standard_executor_tests.py."""

from __future__ import annotations

import concurrent.futures
import errno
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool

import functions as f
import numpy as np
import pytest
from capability_skips import has

import forkshm
from forkshm.backend import kernel
from forkshm.executor import _futures
from forkshm.pool._tasks import Pace
from forkshm.pool._worker_group import WorkerGroup

pytestmark = pytest.mark.usefixtures("_warm_up")


@pytest.fixture
def executor():
    with forkshm.Executor(2) as made:
        yield made


def die(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(gate, value):
    gate.acquire()
    return value


def test_executor_is_a_process_pool_executor(executor):
    assert isinstance(executor, concurrent.futures.Executor)
    assert executor.submit(pow, 2, exp=5).result() == 32
    assert list(executor.map(pow, [2, 3], [3, 2])) == [8, 9]


def test_one_dead_worker_fails_one_future(executor):
    futures = [executor.submit(die if x == 7 else abs, -x) for x in range(20)]
    assert isinstance(futures[7].exception(), forkshm.WorkerDiedError)
    assert isinstance(futures[7].exception(), BrokenProcessPool)
    assert [future.result() for x, future in enumerate(futures) if x != 7] == [x for x in range(20) if x != 7]
    assert executor.submit(abs, -1).result() == 1


def test_shared_arrays_are_shared_and_others_copied_once(executor):
    shared, plain = forkshm.zeros(10), np.ones(100_000)

    def fill(array, value):
        array[:] = value
        return array.sum()

    assert executor.submit(fill, shared, 2).result() == 20
    assert shared[0] == 2
    assert executor.submit(fill, plain, 2).result() == 200_000
    assert plain[0] == 1


def test_calls_not_begun_can_be_cancelled(gate, wait_until):
    with forkshm.Executor(1) as executor:
        futures = [executor.submit(wait_for, gate, x) for x in range(40)]
        wait_until(futures[0].running)
        assert not futures[0].cancel()
        assert futures[-1].cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            futures[-1].result()
        executor.shutdown(wait=False, cancel_futures=True)
        cancelled = [future.cancelled() for future in futures]
        assert cancelled == sorted(cancelled)
        gate.release(40)
        assert [future.result() for future in futures if not future.cancelled()] == list(range(cancelled.count(False)))
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(abs, 1)


def test_an_unpicklable_call_fails_only_its_future(executor):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle"):
        executor.submit(id, lock).result()
    assert executor.submit(abs, -1).result() == 1


class TestTinyCalls:
    """Once calls are known to take microseconds, waiting calls share messages."""

    @pytest.fixture(autouse=True)
    def _known(self, executor, monkeypatch):
        for _ in range(2):
            assert [f.result() for f in [executor.submit(abs, -x) for x in range(300)]] == list(range(300))
        # Overrides what this machine's clock measured.
        monkeypatch.setattr(Pace, "note", lambda *_: None)
        executor._work.pace.batch = 8

    def test_they_share_messages(self, executor):
        before = executor.pool.statistics().messages
        workers = [worker.pid for worker in executor.pool._pool]
        for pid in workers:  # so that calls have to wait
            os.kill(pid, signal.SIGSTOP)
        futures = [executor.submit(abs, -x) for x in range(2000)]
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert [f.result() for f in futures] == list(range(2000))
        # A call alone takes two messages.
        assert executor.pool.statistics().messages - before < 3000

    def test_calls_beyond_the_queue_run_without_a_waiting_caller(self, executor, monkeypatch, tmp_path, wait_until):
        dispatcher = executor.pool._dispatcher
        monkeypatch.setattr(dispatcher, "_has_room", lambda: len(dispatcher._tasks.sent) < 2)
        futures = [executor.submit(touch, tmp_path / str(x)) for x in range(20)]
        wait_until(lambda: len(list(tmp_path.iterdir())) == 20)
        assert [f.result() for f in futures] == [None] * 20

    def test_an_unpicklable_item_of_a_map_fails_alone(self, executor):
        lock = threading.Lock()
        futures = [executor.submit(abs, lock if x == 150 else -x) for x in range(300)]
        with pytest.raises(TypeError, match=r"args\[0\].*lock"):
            futures[150].result()
        assert [f.result() for x, f in enumerate(futures) if x != 150] == [x for x in range(300) if x != 150]

    def test_a_call_whose_worker_dies_fails_alone(self, executor):
        futures = [executor.submit(exit_at_150, x) for x in range(300)]
        with pytest.raises(forkshm.WorkerDiedError, match="exit_at_150"):
            futures[150].result()
        assert [f.result() for x, f in enumerate(futures) if x != 150] == [x for x in range(300) if x != 150]

    def test_calls_without_a_worker_can_be_cancelled(self, executor, tmp_path):
        futures = [executor.submit(wait_for_file, tmp_path / "gate", x) for x in range(500)]
        cancelled = [f for f in futures if f.cancel()]
        (tmp_path / "gate").touch()
        assert futures[-1] in cancelled
        left = [x for x, f in enumerate(futures) if f not in cancelled]
        assert [futures[x].result() for x in left] == left

    def test_a_function_keeps_the_state_it_had_at_submit(self, executor):
        held = [0]

        def look(x):
            return held[0] + x

        futures = []
        for x in range(300):
            held[0] = x
            futures.append(executor.submit(look, 0))
            assert futures[-1].result() == x


def wait_for_file(path, value):
    while not path.exists():
        time.sleep(0.001)
    return value


def touch(path):
    path.touch()


def exit_at_150(x):
    if x == 150:
        os._exit(3)
    return x


def test_an_initializer_that_raises_breaks_the_executor():
    def initialise():
        raise LookupError("no model")

    with forkshm.Executor(2, initializer=initialise) as executor:
        with pytest.raises(BrokenProcessPool, match="no model") as raised:
            executor.submit(abs, 1).result()
        assert isinstance(raised.value.__cause__, LookupError)
        with pytest.raises(BrokenProcessPool, match="Create a new executor"):
            executor.submit(abs, 1)


def test_the_first_call_runs_while_the_other_workers_are_started(monkeypatch, tmp_path, wait_until):
    original = WorkerGroup._begin

    def begin(self, slot, process, start):
        if slot:
            wait_until(lambda: list(tmp_path.iterdir()))
        original(self, slot, process, start)

    monkeypatch.setattr(WorkerGroup, "_begin", begin)
    with forkshm.Executor(3) as executor:
        executor.submit(f.leave, tmp_path, None).result()
        assert executor.submit(f.square, 3).result() == 9
        assert len(executor.pool._worker_group.workers) == 3


class Asking:
    """A worker that pickles to the given outcome."""

    def __init__(self, executor):
        self.executor = executor

    def __reduce__(self):
        return int, (self.executor.submit(f.square, 3).result(60),)


def test_pickling_the_first_call_may_wait_for_another():
    with forkshm.Executor(2) as executor:
        assert executor.submit(f.square, Asking(executor)).result(60) == 81
        assert len(executor.pool._worker_group.workers) == 2


def test_when_one_of_the_other_workers_cannot_be_started_none_is_left(monkeypatch):
    begun = []

    def begin(self, slot, process, start):
        if slot == 2:
            raise self._cannot_start(OSError(errno.EAGAIN, "Resource temporarily unavailable"), slot)
        begun.append(process)
        process.start()

    with monkeypatch.context() as patch, forkshm.Executor(3) as executor:
        patch.setattr(WorkerGroup, "_begin", begin)
        with pytest.raises(forkshm.errors.WorkerStartError, match="cannot start worker 3 of 3"):
            executor.submit(f.square, 2)
        assert len(begun) == 2
        for process in begun:  # ended, reaped and closed
            with pytest.raises(ValueError, match="closed"):
                process.is_alive()
        patch.undo()
        assert executor.submit(f.square, 3).result() == 9


def test_a_start_that_fails_ends_the_pool_when_no_other_thread_drives_it(monkeypatch, wait_until):
    failed = []

    def begin(self, slot, process, start):
        # As after a signal handler dropped the future of a call, or when other threads wait for futures.
        executor._work.help()
        wait_until(lambda: not executor._work._pool._dispatcher._is_lead_free())
        raise self._cannot_start(OSError(errno.EAGAIN, "Resource temporarily unavailable"), slot)

    monkeypatch.setattr(threading, "excepthook", failed.append)
    with forkshm.Executor(2) as executor:
        for _ in range(5):
            with monkeypatch.context() as patch, pytest.raises(forkshm.errors.WorkerStartError):
                patch.setattr(WorkerGroup, "_begin", begin)
                executor.submit(f.square, 2)
        assert executor.submit(f.square, 3).result() == 9
    assert not failed


def test_an_incomplete_future_is_collected_silently(monkeypatch):
    """A signal handler raised while the future was made."""
    failed = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    _futures.Future.__new__(_futures.Future)
    assert not failed


class Interrupting:
    def __reduce__(self):
        raise KeyboardInterrupt


def test_ctrl_c_at_the_first_call_leaves_no_worker():
    with forkshm.Executor(3) as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.submit(f.square, Interrupting())
        assert forkshm.active_children() == []
        assert executor.submit(f.square, 3).result() == 9


def test_each_worker_takes_so_many_tasks():
    with forkshm.Executor(1, max_tasks_per_child=2) as executor:
        assert len(set(executor.map(lambda _: os.getpid(), range(6)))) == 3


def test_a_context_of_multiprocessing_says_how_workers_start(run_script):
    said = run_script("""
import forkshm, multiprocessing
if __name__ == "__main__":
    with forkshm.Executor(1, multiprocessing.get_context("spawn")) as executor:
        print(executor.submit(lambda: forkshm.current_process().name).result())
""")
    assert said.startswith("SpawnPoolWorker")


def test_buffersize_reads_input_as_needed(executor):
    taken = []
    items = (taken.append(x) or x for x in range(100))
    results = executor.map(abs, items, buffersize=4)
    assert len(taken) == 4
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) == 5  # of which two were consumed, and the third is read when the next result is asked for
    assert list(results) == list(range(2, 100))
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="buffersize must be"):
            executor.map(abs, [1], buffersize=wrong)


def test_an_executor_is_not_pickled_and_the_error_says_what_to_do(executor):
    with pytest.raises(TypeError, match=r"cannot pickle an executor: .* Create one where it is used"):
        executor.submit(len, executor).result()


def test_buffersize_raises_in_the_place_of_the_item_that_cannot_be_pickled(executor):
    results = executor.map(f.itself, [1, 2, threading.Lock(), 4], buffersize=2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock'"):
        next(results)
    assert executor.submit(abs, -1).result() == 1


def test_running_calls_are_cancelled_where_asked(wait_until):
    with forkshm.Executor(1) as executor:
        futures = [executor.submit(time.sleep, 600) for _ in range(3)]
        wait_until(futures[0].running)
        executor.cancel_running(futures)
        assert all(future.cancelled() and future.done() for future in futures)
        for future in futures:
            with pytest.raises(concurrent.futures.CancelledError):
                future.result(60)
        assert executor.submit(f.square, 3).result(60) == 9


def test_a_running_call_is_cancelled_although_its_worker_stops_late(monkeypatch, wait_until):
    """As on a machine without a free core, where a signal takes long to arrive."""
    is_stopped, first = type(kernel).is_stopped, []

    def late(self, pid):
        first.append(time.monotonic())
        return is_stopped(self, pid) if time.monotonic() - first[0] > 0.2 else False

    with forkshm.Executor(1) as executor:
        future = executor.submit(time.sleep, 600)
        wait_until(future.running)
        monkeypatch.setattr(type(kernel), "is_stopped", late)
        executor.cancel_running([future])
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(60)
        assert executor.submit(f.square, 3).result(60) == 9


def test_the_input_of_a_buffered_map_may_depend_on_its_results(executor):
    results, found = [1], []
    for result in executor.map(f.square, (x for x in results if x < 300), buffersize=1):
        found.append(result)
        results.append(result + 1)
    assert found == [1, 4, 25, 676]


@pytest.mark.filterwarnings("ignore:unclosed running:ResourceWarning")
def test_a_buffered_map_of_a_dropped_executor_is_complete():
    results = forkshm.Executor(2).map(f.square, range(20), buffersize=2)
    gc.collect()
    assert list(results) == [x * x for x in range(20)]


def test_chunks(executor):
    assert list(executor.map(pow, range(10), range(10), chunksize=3)) == [x**x for x in range(10)]
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        executor.map(abs, [1], chunksize=0)


def test_map_with_a_timeout(executor, gate):
    results = executor.map(wait_for, [gate] * 2, [1, 2], timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    gate.release(2)


def test_an_executor_that_has_ended_is_shut_down_without_the_names_of_its_module(monkeypatch):
    """On the free-threaded CPython 3.13, a program's objects may be freed after the names of modules are gone."""
    with forkshm.Executor(1) as executor:
        assert executor.submit(f.square, 3).result(timeout=60) == 9
    for name in [name for name in vars(_futures) if not name.startswith("__")]:
        monkeypatch.setattr(_futures, name, None)
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    executor.kill_workers()


def test_a_callback_may_submit_and_shut_down(executor):
    done = threading.Event()
    results = []

    def next_one(future):
        results.append(future.result())
        if len(results) < 5:
            executor.submit(abs, len(results)).add_done_callback(next_one)
        else:
            executor.shutdown()  # would wait for itself
            done.set()

    executor.submit(abs, 0).add_done_callback(next_one)
    assert done.wait(20)
    assert results == [0, 1, 2, 3, 4]


def test_a_collected_executor_finishes_submitted_calls(gate):
    executor = forkshm.Executor(2)
    futures = [executor.submit(wait_for, gate, x) for x in range(30)]
    del executor
    gc.collect()
    gate.release(30)
    assert [future.result() for future in futures] == list(range(30))
    del futures


@pytest.mark.needs("inheritance")
def test_a_forked_child_is_told(executor, in_child):
    executor.submit(abs, 1).result()

    def child():
        with pytest.raises(forkshm.PoolClosedError, match="belongs to the parent process"):
            executor.submit(abs, 1)
        executor.shutdown()

    assert in_child(child) == 0
    assert executor.submit(abs, -1).result() == 1


def test_the_program_waits_for_submitted_calls(run_script):
    said = run_script("""
import forkshm, time
def late():
    time.sleep(0.2)
    print("late", flush=True)
forkshm.Executor(2).submit(late)
print("main", flush=True)
""")
    assert said == "main\nlate\n"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
        ({"max_tasks_per_child": "1"}, TypeError, "max_tasks_per_child must be an integer"),
        ({"born_shred": True}, TypeError, "there is no option 'born_shred'"),
        ({"workers": 2}, TypeError, "The options are max_workers, .*, born_shared"),
        ({"retries": -1}, ValueError, "retries must be at least 0"),
        ({"task_timeout": 0}, ValueError, "task_timeout must be a positive number"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        forkshm.Executor(**options)


def test_progress(executor, capfd, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # otherwise tqdm keeps a thread
    assert list(executor.map(abs, range(30), progress=True)) == list(range(30))
    assert "30/30" in capfd.readouterr().err


# -- which thread drives the pool -----------------------------------------------------------------


def test_waiting_for_a_result_needs_no_thread(executor, monkeypatch):
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))
    for x in range(50):
        assert executor.submit(abs, -x).result() == x
    assert list(executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    assert isinstance(executor.submit(int, "x").exception(), ValueError)
    assert started == []


def test_done_looks(executor, wait_until):
    future = executor.submit(abs, -1)
    wait_until(future.done)
    assert future.result() == 1


def test_several_threads_wait_for_their_own(executor, gate):
    futures = [executor.submit(wait_for, gate, x) for x in range(8)]
    results = {}
    threads = [threading.Thread(target=lambda x=x: results.update({x: futures[x].result()})) for x in range(8)]
    for thread in threads:
        thread.start()
    gate.release(8)
    for thread in threads:
        thread.join(20)
    assert results == {x: x for x in range(8)}


@pytest.mark.parametrize("way", ["one by one", "together"])
def test_wait_counts_a_cancelled_future_once(way, gate, wait_until):
    """The answers of cancelled calls arrive while `wait` waits for the others."""
    with forkshm.Executor(1) as executor:
        futures = [executor.submit(wait_for, gate, x) for x in range(4)]
        wait_until(futures[0].running)
        if way == "one by one":
            assert [future.cancel() for future in futures[2:]] == [True, True]
        else:
            executor.cancel_running(futures[2:])
        timer = threading.Timer(0.2, lambda: [gate.release() for _ in range(2)])
        timer.start()
        done, left = concurrent.futures.wait(futures, timeout=20)
        assert (len(done), len(left)) == (4, 0)
        timer.join()
        assert {future.cancelled() for future in concurrent.futures.as_completed(futures, 20)} == {True, False}


@pytest.mark.parametrize("kind", [forkshm.Executor, concurrent.futures.ProcessPoolExecutor])
def test_shutdown_waits_for_callbacks(kind):
    got = []

    def take(future):
        time.sleep(0.01)  # the workers end before the last callback has run
        got.append("cancelled" if future.cancelled() else future.exception() or future.result())

    # The default start method of Python 3.14 would start a fork server, which stays.
    is_standard = kind is not forkshm.Executor and has("fork")
    context = {"mp_context": multiprocessing.get_context("fork")} if is_standard else {}
    with kind(1, **context) as executor:
        for number in range(10):
            executor.submit(abs, -number if number != 5 else "x").add_done_callback(take)
        late = executor.submit(abs, -10)
        late.add_done_callback(take)
        late.cancel()
    assert [each for each in got if isinstance(each, int)] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert len(got) == 11


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_shutdown_returns_after_a_callback_that_exits():
    with forkshm.Executor(1) as executor:
        executor.submit(abs, -1).add_done_callback(lambda future: sys.exit(3))
        future = executor.submit(abs, -2)
    assert future.result() == 2


def test_wait_as_completed_and_callbacks_work_without_a_waiting_caller(executor, gate):
    futures = [executor.submit(wait_for, gate, x) for x in range(30)]
    seen = []
    called = threading.Event()
    futures[-1].add_done_callback(lambda future: (seen.append(threading.current_thread().name), called.set()))
    gate.release(30)
    assert called.wait(20)
    assert seen == ["forkshm-pool-helper"]
    assert {future.result() for future in concurrent.futures.as_completed(futures)} == set(range(30))
    futures = [executor.submit(abs, x) for x in range(5)]
    done, left = concurrent.futures.wait(futures, timeout=20)
    assert (len(done), len(left)) == (5, 0)
    failing = [executor.submit(wait_for, gate, 1), executor.submit(int, "x")]
    done, _ = concurrent.futures.wait(failing, timeout=20, return_when=concurrent.futures.FIRST_EXCEPTION)
    assert failing[1] in done
    gate.release()


def test_a_call_without_a_future_runs_and_is_dropped(executor, tmp_path, wait_until):
    executor.submit((tmp_path / "done").touch)
    wait_until((tmp_path / "done").exists)
    array = np.ones(1000)
    gone = weakref.ref(array)
    executor.submit(len, array)
    del array
    wait_until(lambda: gone() is None)


def test_a_callback_of_a_collected_future_is_called(executor):
    called = threading.Event()
    executor.submit(abs, 1).add_done_callback(lambda _: called.set())
    gc.collect()
    assert called.wait(20)
    assert not executor._work.kept


def test_waiting_for_a_cancelled_one_ends(gate):
    with forkshm.Executor(1) as executor:
        futures = [executor.submit(wait_for, gate, x) for x in range(20)]
        ended = []

        def wait_for_it():
            with pytest.raises(concurrent.futures.CancelledError):
                futures[-1].result(20)
            ended.append(True)

        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        assert futures[-1].cancel()
        waiting.join(20)
        assert ended == [True]
        gate.release(19)


def test_a_result_with_a_timeout(executor, gate):
    future = executor.submit(wait_for, gate, 1)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.01)
    assert not future.done()
    gate.release()
    assert future.result(20) == 1


@pytest.mark.needs("inheritance")
def test_results_in_a_forked_child_are_refused(executor, in_child, gate):
    future = executor.submit(wait_for, gate, 1)

    def child():
        with pytest.raises(forkshm.PoolClosedError, match="belongs to the parent process"):
            future.result()

    assert in_child(child) == 0
    gate.release()
    assert future.result() == 1


def test_a_map_that_is_dropped_is_not_finished(gate):
    with forkshm.Executor(1) as executor:
        results = executor.map(wait_for, [gate] * 1000, range(1000))
        gate.release(300)
        assert next(results) == 0
        results.close()
        gate.release(300)  # for the running call
        executor.shutdown()
        assert executor._work._pool._dispatcher.is_idle()


def test_a_map_runs_without_a_consumer(tmp_path):
    with forkshm.Executor(2) as executor:
        executor.map(lambda x: (tmp_path / str(x)).touch(), range(600))
    assert len(list(tmp_path.iterdir())) == 600


def test_a_map_is_cancelled_with_the_rest(gate):
    with forkshm.Executor(1) as executor:
        results = executor.map(wait_for, [gate] * 1000, range(1000))
        executor.shutdown(wait=False, cancel_futures=True)
        gate.release(600)
        taken = []
        with pytest.raises(concurrent.futures.CancelledError):
            taken.extend(results)
        assert taken == list(range(len(taken)))


def test_a_map_ends_where_its_iterable_raises(executor):
    results = executor.map(lambda x: 1 // x, [2, 1, 0, 1])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []
    assert list(executor.map(abs, [], [])) == list(executor.map(abs)) == []
    with pytest.raises(TypeError, match="cannot pickle"):
        list(executor.map(id, [threading.Lock()]))


def test_a_large_argument_of_all_chunks_is_copied_once(executor):
    array = np.ones(500_000)
    before = executor.pool.statistics().bytes_copied
    assert list(executor.map(lambda a, x: a[0] + x, [array] * 20, range(20))) == [1.0 + x for x in range(20)]
    assert executor.pool.statistics().bytes_copied - before < 2 * array.nbytes
    with forkshm.Executor(2) as other:
        gc.collect()
        assert list(other.map(lambda a: a[0], (array for _ in range(600)), chunksize=1)) == [1.0] * 600
        assert other.pool.statistics().bytes_copied < 2 * array.nbytes


def test_the_thread_of_the_pool_stands_by_while_a_caller_waits(gate, executor):
    """The thread of the pool takes over when no caller waits."""
    futures = [executor.submit(wait_for, gate, x) for x in range(200)]
    gate.release(200)
    assert futures[0].result() == 0
    deadline = time.monotonic() + 20
    while not all(future.is_finished() for future in futures):  # does not drive the pool
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert [future.result() for future in futures] == list(range(200))


def test_the_thread_that_has_ended_is_started_again(executor):
    """The thread ends when the pool has nothing to do, even if another thread still processes answers."""
    executor.submit(abs, 1).result()
    done, _ = concurrent.futures.wait([executor.submit(abs, 1)], timeout=20)
    assert len(done) == 1
