"""Pool: the interface and the results of the standard library."""

import collections
import concurrent.futures
import gc
import multiprocessing
import multiprocessing.pool
import os
import pickle
import threading
import time
import types

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm import PoolClosedError, TaskTimeoutError
from forkshm.pool import _dispatch, _results


def test_apply_calls_in_another_process(pool):
    assert pool.apply(f.pid) != os.getpid()
    assert pool.apply(f.add, (1,), {"y": 2}) == 3
    assert pool.apply(f.echo, [1, 2], {"a": 3}) == ((1, 2), {"a": 3})


def test_map_keeps_the_order_for_every_chunksize(pool):
    for count in (0, 1, 2, 7, 100):
        for chunksize in (None, 1, 2, 3, 100, 1000):
            assert pool.map(f.square, range(count), chunksize) == [x * x for x in range(count)]


def test_map_takes_any_iterable(pool):
    assert pool.map(f.square, iter([1, 2, 3])) == [1, 4, 9]
    assert pool.map(f.square, {4: "a", 5: "b"}) == [16, 25]
    assert pool.map(str.upper, "abc") == ["A", "B", "C"]
    assert pool.map(f.square, np.arange(3)) == [0, 1, 4]


def test_map_of_many_tiny_tasks_answers_each_once(pool):
    # Enough tasks for the dispatcher to send several in a message.
    assert pool.map(f.square, range(5000), chunksize=1) == [x * x for x in range(5000)]


def test_starmap_spreads_the_arguments(pool):
    assert pool.starmap(f.add, [(1, 2), (3, 4), (5,)]) == [3, 7, 5]
    assert pool.starmap(pow, zip(range(50), [2] * 50, strict=True), chunksize=7) == [x * x for x in range(50)]


def test_asynchronous_calls_return_the_standard_interface(pool):
    result = pool.apply_async(f.square, (7,))
    assert result.get(timeout=20) == 49
    assert result.ready()
    assert result.successful()
    assert result.get() == 49
    assert pool.map_async(f.square, range(10), 3).get() == [x * x for x in range(10)]
    assert pool.map_async(f.square, []).get() == []
    assert pool.starmap_async(f.add, [(1, 2)]).get() == [3]


def test_a_failed_call_is_ready_and_not_successful(pool):
    result = pool.apply_async(f.fail, (1,))
    result.wait()
    assert result.ready()
    assert not result.successful()
    for _ in range(2):
        with pytest.raises(ValueError, match="bad 1"):
            result.get()


def test_an_unanswered_call_is_not_ready(pool, tmp_path, wait_until):
    begun, go = tmp_path / "begun", tmp_path / "go"
    result = pool.apply_async(f.hold, (begun, go))
    wait_until(begun.exists)
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(TaskTimeoutError, match=r"no result within 0\.01 seconds"):
        result.get(timeout=0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0)
    with pytest.raises(forkshm.TimeoutError):
        result.get(timeout=0)
    result.wait(0.01)
    assert not result.ready()
    go.touch()
    assert result.get() > 0


def test_callbacks_are_called_before_get_returns(pool):
    got, failed = [], []
    assert pool.apply_async(f.square, (3,), callback=got.append).get() == 9
    assert got == [9]
    with pytest.raises(ValueError, match="bad 4"):
        pool.apply_async(f.fail, (4,), callback=got.append, error_callback=failed.append).get()
    assert got == [9]
    assert [str(error) for error in failed] == ["bad 4"]
    assert pool.map_async(f.square, range(3), callback=got.append).get() == [0, 1, 4]
    assert pool.map_async(f.square, [], callback=got.append).get() == []
    assert got == [9, [0, 1, 4], []]


def test_callbacks_are_called_without_a_waiting_caller(pool, wait_until):
    got = []
    for x in range(300):
        pool.apply_async(f.square, (x,), callback=got.append)
    wait_until(lambda: len(got) == 300)
    assert sorted(got) == [x * x for x in range(300)]
    # One by one: each comes while the pool's thread is about to leave for lack of work.
    for x in range(300, 500):
        pool.apply_async(f.square, (x,), callback=got.append)
        wait_until(lambda x=x: len(got) == x + 1)


@pytest.mark.parametrize("joins", [1, 2])
def test_join_returns_after_all_callbacks(joins):
    got = []

    def take(value):
        time.sleep(0.01)  # the workers end before the last callback has run
        got.append(value)

    with forkshm.Pool(2) as pool:
        for number in range(10):
            pool.apply_async(abs, (-number,), callback=take)
        pool.map_async(abs, [], callback=take)
        pool.map_async(abs, [-1, -2], callback=take)
        pool.apply_async(abs, ("x",), error_callback=lambda error: take(type(error)))
        pool.close()
        others = [threading.Thread(target=pool.join) for _ in range(joins - 1)]
        for other in others:
            other.start()
        pool.join()
        assert len(got) == 13
        for other in others:
            other.join()


def test_a_callback_may_join_the_pool():
    got = []
    with forkshm.Pool(1) as pool:
        pool.apply_async(abs, (-2,), callback=got.append)
        pool.apply_async(abs, (-1,), callback=lambda _: (pool.close(), pool.join(), got.append("joined")))
        pool.close()
        pool.join()
    assert sorted(map(str, got)) == ["2", "joined"]


def test_a_callback_may_use_the_pool(pool):
    # Many times: the waiting thread and the thread that calls back hand the lead to each other.
    for _ in range(200):
        inner = []

        def call_back(value, inner=inner):
            inner.append(pool.apply(f.square, (value,)))

        pool.apply_async(f.square, (3,), callback=call_back).get()
        assert inner == [81]


@pytest.mark.filterwarnings("default::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_does_not_stop_the_pool(pool, capsys):
    result = pool.apply_async(f.square, (3,), callback=lambda _: 1 / 0)
    assert result.get() == 9
    assert pool.apply_async(f.square, (4,), callback=lambda _: None).get() == 16


def test_more_asynchronous_calls_than_the_kernel_can_queue(pool):
    results = [pool.apply_async(f.square, (x,)) for x in range(2000)]
    assert [result.get() for result in results] == [x * x for x in range(2000)]


def test_imap_yields_in_order_and_unordered_yields_all(pool):
    for chunksize in (1, 2, 7, 100):
        assert list(pool.imap(f.square, range(50), chunksize)) == [x * x for x in range(50)]
        assert sorted(pool.imap_unordered(f.square, range(50), chunksize)) == [x * x for x in range(50)]
    assert list(pool.imap(f.square, [])) == []
    assert list(pool.imap_unordered(f.square, [])) == []


def test_imap_reads_only_the_needed_input(pool):
    taken = []

    def source():
        for x in range(10_000):
            taken.append(x)
            yield x

    results = pool.imap(f.square, source())
    assert next(results) == 0
    assert len(taken) <= 2 + 4 * 2
    pool.terminate()


def test_imap_next_takes_a_timeout(pool, tmp_path):
    go = tmp_path / "go"
    results = pool.imap(lambda _: f.hold(tmp_path / "begun", go), [1])
    with pytest.raises(TaskTimeoutError):
        results.next(timeout=0.01)
    go.touch()
    assert results.next() > 0
    with pytest.raises(StopIteration):
        results.next()


def test_imap_raises_the_exception_of_its_input_at_that_position(pool):
    def source():
        yield 1
        yield 2
        raise KeyError("input")

    results = pool.imap(f.square, source())
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(KeyError, match="input"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, KeyboardInterrupt, f.OwnEnd])
def test_imap_raises_an_exception_that_ends_of_its_input(pool, name, kind):
    def source():
        yield 2
        raise kind(17)

    results = getattr(pool, name)(f.square, source())
    assert next(results) == 4
    with pytest.raises(kind) as caught:
        next(results)
    assert caught.value.args == (17,)
    assert list(results) == []
    assert pool.apply(f.square, (3,)) == 9


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
@pytest.mark.parametrize("is_kept", [True, False])
def test_join_runs_the_whole_input_of_imap_also_if_no_results_are_taken(name, is_kept):
    with forkshm.Pool(2) as pool:
        done = forkshm.zeros(50)

        def run(item):
            time.sleep(0.001)  # so that a message has one item
            done[item] = 1
            return item

        results = getattr(pool, name)(run, (item for item in range(50)))
        first = next(results)
        if not is_kept:
            results = set(range(50)) - {first}
        pool.close()
        pool.join()
        assert done.all()
        assert {first, *results} == set(range(50))


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_imap_of_input_that_blocks_ends_with_the_pool(name):
    go = threading.Event()

    def source():
        yield 2
        go.wait(60)

    with forkshm.Pool(1) as pool:
        results = getattr(pool, name)(f.square, source())
        assert next(results) == 4
    with pytest.raises(forkshm.PoolClosedError):
        next(results)
    assert list(results) == []
    go.set()


class Changing(dict):
    """A dict to which another thread adds a key between the two steps of a look at the first key."""

    looks = 0

    def __iter__(self):
        self.looks += 1
        found = super().__iter__()
        if self.looks == 1:
            self[2] = None
        return found


def test_the_first_result_is_found_while_another_arrives():
    assert _results.first_of(Changing({1: None})) == 1
    assert _results.first_of({}) == -1


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_a_generator_is_closed_when_the_pool_is_terminated(name, is_kept, wait_until):
    closed = threading.Event()

    def source():
        try:
            yield from range(10_000)
        finally:
            closed.set()

    pool = forkshm.Pool(1)
    results = getattr(pool, name)(f.square, source())
    assert next(results) == 0
    if not is_kept:
        del results
    pool.terminate()
    if is_kept:
        with pytest.raises(forkshm.PoolClosedError):
            list(results)
    # Free-threaded builds leave the last step to the thread that made the object, which must not sleep until then.
    wait_until(closed.is_set)


def test_imap_goes_on_after_an_item_that_cannot_be_pickled(pool):
    for name in ("imap", "imap_unordered"):
        results = getattr(pool, name)(f.square, [1, threading.Lock(), 3])
        got = []
        while True:
            try:
                got.append(next(results))
            except TypeError as error:
                got.append(str(error).partition(" (")[2])
            except StopIteration:
                break
        assert sorted(map(str, got)) == ["1", "9", "iterable[1]: _thread.lock)"]


def test_imap_goes_on_after_a_failed_item(pool):
    results = pool.imap(f.fail_on_three, range(6))
    got = []
    while True:
        try:
            got.append(next(results))
        except ValueError as error:
            got.append(str(error))
        except StopIteration:
            break
    assert got == [0, 1, 2, "three", 4, 5]


def test_an_exception_of_a_task_arrives_with_its_type_and_traceback(pool):
    with pytest.raises(f.Custom) as caught:
        pool.apply(f.raise_custom)
    assert caught.value.code == 42
    assert caught.value.args == ("no", 42)
    assert "in raise_custom" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="three"):
        pool.map(f.fail_on_three, range(10))


def test_an_exception_that_cannot_be_rebuilt_is_told(pool):
    with pytest.raises(forkshm.errors.NotUnpicklableError, match="Unbuildable") as caught:
        pool.apply(f.raise_unbuildable)
    assert "in raise_unbuildable" in str(caught.value.__cause__)


@pytest.mark.parametrize("others", [0, 200])
@pytest.mark.parametrize("name", ["apply_async", "map_async", "starmap_async"])
def test_an_unpicklable_argument_is_reported_by_the_result(pool, name, others):
    """As in the standard library, and whether or not other tasks wait before it."""
    wrong, errors = f.RaiseAtPickle(), []
    arguments = {
        "apply_async": (wrong,),
        "map_async": [1, wrong, 3],
        "starmap_async": [(1,), (wrong,), (3,)],
    }[name]
    before = [pool.apply_async(f.square, (number,)) for number in range(others)]
    result = getattr(pool, name)(f.nothing, arguments, error_callback=errors.append)
    with pytest.raises(RuntimeError, match="will not be pickled") as caught:
        result.get()
    assert "in __reduce__" in str(caught.value.__cause__)
    assert len(errors) == 1
    assert not result.successful()
    assert [one.get() for one in before] == [number * number for number in range(others)]
    assert pool.apply(f.square, (3,)) == 9


def test_an_unpicklable_argument_raises_at_once(pool):
    with pytest.raises(TypeError, match="pickle"):
        pool.apply(f.nothing, (threading.Lock(),))
    with pytest.raises(RuntimeError, match="will not be pickled"):
        pool.map(f.nothing, [1, 2, f.RaiseAtPickle(), 4] * 100, chunksize=1)
    with pytest.raises(RuntimeError, match="will not be unpickled"):
        pool.apply(f.nothing, (f.RaiseAtUnpickle(),))
    with pytest.raises(forkshm.NotPicklableError, match=r"result of a task, a lock, .*\(result: _thread.lock\)"):
        pool.apply(threading.Lock)
    with pytest.raises(multiprocessing.pool.MaybeEncodingError, match=r"\(result 1: _thread.lock\)") as caught:
        pool.map(lambda x: threading.Lock() if x == 1 else x, range(4), chunksize=2)
    assert "cannot pickle '_thread.lock' object" in caught.value.exc
    assert "Traceback" in str(caught.value.__cause__)
    with pytest.raises(forkshm.errors.NotUnpicklableError, match="will not be unpickled"):
        pool.apply(f.make, (f.RaiseAtUnpickle,))
    assert pool.apply(f.square, (5,)) == 25


def test_functions_made_on_the_spot(pool):
    factor = 3
    assert pool.map(lambda x: x * factor, range(4)) == [0, 3, 6, 9]

    class Local:
        def __init__(self, value):
            self.value = value

        def doubled(self):
            return self.value * 2

    assert pool.apply(Local(4).doubled) == 8
    assert pool.apply(Local, (5,)).value == 5


def test_a_function_by_value_is_new_when_its_closure_is(pool):
    for factor in range(5):
        assert pool.map(lambda x, factor=factor: x * factor, [10]) == [10 * factor]


def test_a_method_uses_the_current_state_of_its_object(pool):
    counter = f.Counter()
    read = counter.read  # the same method each time
    for number in range(5):
        counter.number = number
        assert pool.apply(read) == number


def test_changes_of_a_function_sent_by_value_are_not_seen_by_the_next_call():
    numbers = []

    def count(_):
        numbers.append(0)
        return len(numbers)

    with forkshm.Pool(1) as pool:
        for function in (f.Counter().count, count):
            assert [pool.apply(function, (0,)) for _ in range(3)] == [1, 1, 1]
            # Each map has its own.
            assert [pool.map(function, range(4), chunksize=2) for _ in range(2)] == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_initializer_runs_once_in_each_worker():
    with forkshm.Pool(2, f.set_state, ("ready",)) as pool:
        assert pool.map(f.get_state, range(20), chunksize=1) == ["ready"] * 20
    assert f.get_state() is None


def test_an_initializer_that_raises_fails_the_pool_with_that():
    with forkshm.Pool(2, f.initializer_fails) as pool:
        with pytest.raises(LookupError, match="initializer says no") as caught:
            pool.map(f.square, range(10))
        assert "in initializer_fails" in str(caught.value.__cause__)
        with pytest.raises(LookupError):
            pool.apply(f.square, (1,))


def test_maxtasksperchild_makes_room_for_fresh_workers():
    with forkshm.Pool(1, maxtasksperchild=2) as pool:
        pids = [pool.apply(f.pid) for _ in range(6)]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
    with forkshm.Pool(2, maxtasksperchild=1) as pool:
        assert len(set(pool.map(f.pid, range(20), chunksize=1))) == 20
        assert pool.statistics().workers_replaced >= 18


def test_close_and_join_finish_submitted_calls():
    pool = forkshm.Pool(2)
    results = [pool.apply_async(f.square, (x,)) for x in range(500)]
    lazy = pool.imap(f.square, range(100))
    pool.close()
    with pytest.raises(PoolClosedError, match="closed"):
        pool.apply(f.square, (1,))
    with pytest.raises(ValueError):
        pool.map(f.square, [1])
    pool.join()
    assert [result.get() for result in results] == [x * x for x in range(500)]
    assert list(lazy) == [x * x for x in range(100)]


def test_join_before_close_is_refused(pool):
    with pytest.raises(ValueError, match="still running"):
        pool.join()


def test_closing_and_terminating_twice_is_allowed():
    pool = forkshm.Pool(1)
    pool.close()
    pool.close()
    pool.join()
    pool.join()
    pool.terminate()
    pool.terminate()
    pool.join()
    with forkshm.Pool(1) as pool:
        pool.close()
        pool.join()


def test_terminate_answers_open_calls(tmp_path, wait_until):
    pool = forkshm.Pool(1)
    result = pool.apply_async(f.hang, (tmp_path / "begun",))
    queued = [pool.apply_async(f.square, (x,)) for x in range(200)]
    wait_until((tmp_path / "begun").exists)
    pool.terminate()
    for each in [result, *queued]:
        with pytest.raises(PoolClosedError, match="terminated"):
            each.get()


def test_terminate_wakes_a_thread_that_waits(tmp_path, wait_until):
    pool = forkshm.Pool(1)
    caught = []

    def wait():
        try:
            pool.apply(f.hang, (tmp_path / "begun",))
        except PoolClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until((tmp_path / "begun").exists)
    pool.terminate()
    thread.join()
    assert len(caught) == 1


def test_a_pool_that_is_terminated_while_an_argument_is_pickled_says_so():
    pool = forkshm.Pool(1)

    class Terminates:
        def __reduce__(self):
            pool.terminate()
            return int, ()

    for items in ([Terminates()], [*range(500), Terminates()]):
        with pytest.raises(PoolClosedError, match="terminated"):
            pool.map(f.nothing, items, chunksize=1)
        pool = forkshm.Pool(1)
    pool.terminate()


@pytest.mark.filterwarnings("ignore:unclosed running:ResourceWarning")
def test_an_unreferenced_pool_ends():
    pool = forkshm.Pool(2)
    assert pool.apply(f.square, (2,)) == 4
    del pool
    gc.collect()


def test_attributes_of_the_standard_librarys_pool_exist(wait_until):
    with forkshm.Pool(2) as pool:
        before = {process.pid for process in pool._pool}
        victim = pool._pool[0]
        victim.kill()
        wait_until(lambda: pool._repopulate_pool() or victim not in pool._pool)
        after = {process.pid for process in pool._pool}
        assert len(after) == 2
        assert len(before & after) == 1


def test_processes_that_are_imitations_are_refused_and_ended():
    class Imitation:
        name, made = "Imitation", []

        def __init__(self, **_):
            self.did = []
            self.made.append(self)

        def start(self):
            self.did.append("start")

        def terminate(self):
            self.did.append("terminate")

        def join(self):
            self.did.append("join")

    with pytest.raises(forkshm.errors.WorkerStartError, match=r"no pid once they are started \(Imitation\)"):
        forkshm.Pool(2, context=types.SimpleNamespace(Process=Imitation))
    assert [imitation.did for imitation in Imitation.made] == [["start", "terminate", "join"]] * 2


@pytest.mark.filterwarnings("ignore:unclosed running:ResourceWarning")
def test_a_result_keeps_its_pool():
    assert forkshm.Pool(1).apply_async(f.square, (5,)).get() == 25
    assert list(forkshm.Pool(1).imap(f.square, range(30))) == [x * x for x in range(30)]


def test_a_running_pool_that_is_dropped_says_so_and_an_ended_one_does_not():
    pools = [forkshm.Pool(1)]
    assert len(pools[0]._pool) == 1
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool .*pool_size=1"):
        pools.clear()
    with forkshm.Pool(1) as pool:
        pass
    del pool
    gc.collect()


def test_many_threads_may_use_one_pool(pool):
    errors = []

    def work(base):
        try:
            for x in range(base, base + 30):
                assert pool.apply(f.square, (x,)) == x * x
            assert pool.map(f.square, range(base, base + 50), chunksize=3) == [x * x for x in range(base, base + 50)]
            assert pool.apply_async(f.square, (base,)).get() == base * base
            assert list(pool.imap(f.square, range(20))) == [x * x for x in range(20)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_pickling_an_argument_may_use_the_pool(pool):
    class Nested:
        def __reduce__(self):
            return int, (pool.apply(f.square, (6,)),)

    assert pool.apply(f.add, (Nested(), 1)) == 37
    assert pool.map(f.add, [Nested() for _ in range(10)]) == [36] * 10


def test_workers_may_have_pools_of_their_own(pool):
    def nested(x):
        with forkshm.Pool(2) as inner:
            return inner.map(f.square, range(x))

    assert pool.map(nested, [2, 3]) == [[0, 1], [0, 1, 4]]


def test_synchronous_calls_start_no_thread(pool):
    before = threading.active_count()
    pool.map(f.square, range(1000), chunksize=1)
    pool.apply(f.square, (1,))
    list(pool.imap(f.square, range(50)))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"processes": 0}, ValueError, "at least 1, got 0"),
        ({"processes": -1}, ValueError, "at least 1, got -1"),
        ({"processes": "2"}, TypeError, "must be an int or None, got '2'"),
        ({"processes": 2.0}, TypeError, "must be an int or None, got 2.0"),
        ({"maxtasksperchild": 0}, ValueError, "positive int or None, got 0"),
        ({"maxtasksperchild": 1.5}, ValueError, "positive int or None, got 1.5"),
        ({"initializer": 3}, TypeError, "callable, got 3"),
    ],
)
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        forkshm.Pool(**{"processes": 1, **options})


def test_arguments_that_are_no_tuple_are_refused_with_the_tuple_to_write():
    with forkshm.Pool(1) as pool, pytest.raises(TypeError, match=r"iterable of arguments, got -1\. .*write \(x,\)"):
        pool.apply(abs, -1)


def test_a_coroutine_function_is_refused_with_the_way_to_run_it():
    async def coroutine():
        pass

    with forkshm.Pool(1) as pool, pytest.raises(forkshm.NotPicklableError, match=r"call asyncio\.run\(\.\.\.\)"):
        pool.apply(coroutine)


def test_a_bad_chunksize_is_refused(pool):
    for chunksize in (0, -1):
        with pytest.raises(ValueError, match="chunksize must be at least 1"):
            pool.map(f.square, [1, 2], chunksize)
        with pytest.raises(ValueError, match="chunksize must be at least 1"):
            pool.imap(f.square, [1, 2], chunksize)


def test_a_pool_cannot_be_pickled(pool):
    with pytest.raises(NotImplementedError, match="cannot be passed"):
        pool.apply(f.nothing, (pool,))


def test_the_results_of_a_pool_cannot_be_pickled(pool):
    for result in (pool.apply_async(f.nothing), pool.map_async(abs, [1]), pool.imap(abs, [1])):
        with pytest.raises(NotImplementedError, match="Send its value instead"):
            pickle.dumps(result)


def test_repr_says_state_and_size(pool):
    assert repr(pool) == "<forkshm.Pool state=RUN pool_size=2>"


def test_contexts():
    context = forkshm.get_context("fork")
    assert context is forkshm.get_context()
    assert isinstance(context, multiprocessing.context.BaseContext)
    with context.Pool(1) as pool:
        assert isinstance(pool, forkshm.Pool)
        assert pool.apply(f.square, (3,)) == 9
    with pytest.raises(ValueError, match="cannot find context for 'knife'"):
        forkshm.get_context("knife")


def test_a_process_shares_regions_made_before_its_start():
    region = forkshm.anonymous_shared_memory(4)

    def write():
        region.buf[:] = b"done"

    process = forkshm.Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    process.close()
    assert bytes(region.buf) == b"done"


def test_statistics_count_moved_bytes(pool):
    before = pool.statistics()
    plain, shared = np.ones(1_000_000), forkshm.ones(1_000_000)
    assert pool.apply(np.sum, (plain,)) == 1e6
    assert pool.apply(np.sum, (shared,)) == 1e6
    after = pool.statistics()
    assert after.tasks - before.tasks == 2
    assert after.messages - before.messages == 4
    assert after.bytes_copied - before.bytes_copied == plain.nbytes
    assert after.bytes_shared - before.bytes_shared == shared.nbytes


def test_a_result_is_ready_once_its_callback_was_called(pool, tmp_path, wait_until, monkeypatch):
    begun, go = tmp_path / "begun", tmp_path / "go"
    long = pool.apply_async(f.hold, (begun, go))
    wait_until(begun.exists)
    # A waiting thread must be woken: it no longer looks by itself.
    monkeypatch.setattr(_dispatch, "_LONGEST_SLEEP_SECONDS", 10_000.0)
    for _ in range(20):
        seen = []
        assert pool.apply_async(f.square, (3,), callback=seen.append).get() == 9
        assert seen == [9]
    go.touch()
    long.get()


def test_workers_leave_when_another_thread_sent_the_last_task(monkeypatch):
    """The answer is taken, and the pool closed, before the sending thread has noted that the task was sent."""
    with forkshm.Pool(1) as pool:
        pool.apply(int)
        outstanding = pool._dispatcher._tasks
        forget, is_sent, may_forget = outstanding.sent_off, threading.Event(), threading.Event()

        def forget_late(batch):
            is_sent.set()
            may_forget.wait()
            forget(batch)

        monkeypatch.setattr(outstanding, "sent_off", forget_late)
        results = []
        sender = threading.Thread(target=lambda: results.append(pool.apply_async(int)))
        sender.start()
        is_sent.wait()
        pool._dispatcher.drive(lambda: not outstanding.sent and not outstanding.answered)
        pool.close()
        may_forget.set()
        sender.join()
        process = pool._pool[0]
        process.join(60)
        assert process.exitcode == 0
        assert results[0].get() == 0
        pool.join()


def test_calls_can_be_cancelled_after_the_workers_have_ended():
    # A handler that raises again and again leaves such a pool behind.
    with forkshm.Pool(1) as pool:
        result = pool.apply_async(time.sleep, (100,))
        dispatcher, worker_group = pool._dispatcher, pool._worker_group
        (task,) = dispatcher._tasks.sent.values()
        worker_group.stop()
        dispatcher.cancel([task])
        with pytest.raises((PoolClosedError, concurrent.futures.CancelledError)):
            pool.terminate()
            result.get(10)


def test_another_thread_takes_the_first_waiting_task(monkeypatch):
    class Emptied(collections.deque):
        """A deque whose last task another thread takes just after this one has looked, a few times."""

        looks = 3

        def __bool__(self):
            self.looks -= 1
            return self.looks >= 0 or len(self) > 0

    with forkshm.Pool(1) as pool:
        monkeypatch.setattr(pool._dispatcher._tasks, "waiting", Emptied())
        pool._dispatcher.feed()
        assert pool.map(abs, [-1, -2]) == [1, 2]
