"""Executors on a Dask cluster: two nodes, each a process of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import pytest

import forkshm

np = pytest.importorskip("numpy")
distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed by a signal"),
    pytest.mark.filterwarnings("ignore"),  # warnings of Dask and its libraries
]

# The nodes cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 2**20


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50, memory_limit=None
    ) as made:
        yield made


@pytest.fixture(scope="module")
def executor(cluster):
    with forkshm.Executor(cluster=cluster) as made:
        yield made


def where(_):
    # The parent of a worker process is the fork server, whose parent is the node.
    time.sleep(0.05)
    return os.getpid(), os.getppid()


def all_workers(executor):
    """Return the pids of the workers and of their servers; a worker may start late."""
    found = set()
    while len(found) < 4:
        found |= set(executor.map(where, range(8), chunksize=1))
    return found


class Unusual(Exception):
    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def fail(item):
    if item == 3:
        raise Unusual(7, "three")
    return item


def die(item):
    if item == 2:
        os._exit(3)
    return item


def die_of(item, array, last):
    if item == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


class DiesOnArrival:
    def __reduce__(self):
        return os._exit, (3,)


def sleep_for(seconds):
    time.sleep(seconds)
    return seconds


def fail_with_a_lock():
    error = Unusual(5, "locked")
    error.lock = threading.Lock()
    raise error


def hold(begun):
    begun.touch()
    time.sleep(60)


def kill_node(_):
    with open(f"/proc/{os.getppid()}/stat") as file:  # of the fork server
        os.kill(int(file.read().rpartition(")")[2].split()[1]), signal.SIGKILL)
    time.sleep(60)


def received_bytes():
    with open("/proc/net/dev") as file:
        (line,) = (line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def test_an_executor_on_a_cluster_is_a_standard_executor(executor):
    assert isinstance(executor, concurrent.futures.Executor)
    assert executor.submit(pow, 2, 10).result(30) == 1024
    assert list(executor.map(pow, range(10), [2] * 10)) == [n * n for n in range(10)]


@pytest.mark.nightly
def test_both_nodes_and_their_workers_take_part(executor):
    found = all_workers(executor)
    assert len({server for _, server in found}) == 2
    assert len(found) == 4
    assert os.getpid() not in {pid for pid, _ in found}


def look(array, index=0):
    return array[index], array.flags.writeable, type(array).__name__


def moves_fewer(copies, array, call):
    """Return whether fewer copies of an array cross in one of three attempts; other programs use the interface, too."""
    moved = []
    for attempt in range(3):
        before = received_bytes()
        call(array + attempt)
        moved.append((received_bytes() - before) / array.nbytes)
        if moved[-1] < copies:
            return True
    print("copies that crossed:", moved)
    return False


def test_a_large_array_is_moved_to_each_node_once_and_is_read_only(executor):
    def call(array):
        futures = [executor.submit(look, array, index) for index in range(32)]
        expected = [(array[index], False, "SharedArray") for index in range(32)]
        assert [future.result(60) for future in futures] == expected
        assert list(executor.map(look, [array] * 32, range(32))) == expected

    assert moves_fewer(2.2, np.arange(4 * MIB, dtype="f8"), call)


def release_copies(client):
    """Make the memory manager of Dask drop what it would drop after two seconds."""
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.extensions["amm"].run_once())


def test_an_array_stays_on_the_nodes_between_calls_as_long_as_the_client_has_it(executor):
    arrays = [np.arange(MIB, dtype="f8") + number for number in range(12)]

    def call_all(_):
        for array in arrays:
            assert {first for first, *_ in executor.map(look, [array] * 16, chunksize=1)} == {array[0]}

    call_all(None)
    release_copies(executor.client)
    assert moves_fewer(1, np.zeros(MIB), call_all)


def count_arrays():
    import gc

    from forkshm.cluster._values import known

    gc.collect()
    return len(known)


def test_the_nodes_release_an_array_that_the_client_releases(executor, wait_until):
    futures = []
    for number in range(6):
        array = np.full(MIB, number)
        futures += [executor.submit(np.sum, array) for _ in range(4)]
        assert futures[-1].result(60) == number * MIB
    concurrent.futures.wait(futures)
    del array
    wait_until(lambda: set(executor.client.run(count_arrays).values()) == {0})
    assert not executor._arrays


@pytest.mark.nightly
def test_an_array_is_moved_from_node_to_node_when_nodes_come_and_go(wait_until):
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, dashboard_address=None, silence_logs=50, memory_limit=None
        ) as cluster,
        forkshm.Executor(cluster=cluster) as executor,
    ):
        client = executor.client
        data = np.arange(MIB)
        remote = executor.submit_remote(np.add, data, 5)
        assert executor.submit(np.sum, data).result(60) == data.sum()
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)

        def slow(array, index):
            time.sleep(0.05)
            return int(array[index])

        assert list(executor.map(slow, [data] * 40, range(40), chunksize=1)) == list(range(40))
        assert set(client.run(count_arrays).values()) == {1}
        (leaves,) = (node for node in client.nthreads() if node in client.who_has([remote._call.future]).popitem()[1])
        client.retire_workers([leaves])
        wait_until(lambda: len(client.nthreads()) == 1)
        assert list(executor.map(slow, [data] * 40, range(40), chunksize=1)) == list(range(40))
        assert executor.submit(lambda a: a[7], remote).result(60) == 12
        client.restart()
        assert list(executor.map(slow, [data] * 40, range(40), chunksize=1)) == list(range(40))


@pytest.mark.nightly
def test_a_remote_result_is_computed_again_when_its_node_dies(wait_until):
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50, memory_limit=None
        ) as cluster,
        forkshm.Executor(cluster=cluster) as executor,
    ):
        data = np.arange(MIB)
        results = [executor.submit_remote(np.add, data, number) for number in range(4)]
        assert [executor.submit(look, each).result(60)[0] for each in results] == [0, 1, 2, 3]
        del data
        for pid in executor.client.run(os.getpid).values():
            os.kill(pid, signal.SIGKILL)
        assert [executor.submit(look, each).result(90)[0] for each in results] == [0, 1, 2, 3]


@pytest.mark.nightly
def test_calls_see_an_array_as_it_was_at_the_call(executor):
    data = forkshm.zeros(MIB)
    first = executor.submit(np.sum, data)
    assert first.result(60) == 0
    data += 1
    assert executor.submit(np.sum, data).result(60) == MIB


@pytest.mark.nightly
def test_a_strided_array_is_compared_by_its_bytes(executor):
    whole = np.zeros((1024, 1024))
    whole[0, 1] = np.nan
    part = whole[:, :600]
    assert not executor.submit(lambda a: np.signbit(a[0, 0]), part).result(60)
    assert executor.submit(lambda a: np.isnan(a[0, 1]), part).result(60)
    whole[0, 0] = -0.0
    assert executor.submit(lambda a: np.signbit(a[0, 0]), part).result(60)


def test_an_array_of_records_is_recognized_by_all_its_bytes(executor):
    records = np.zeros(MIB // 8, np.dtype([("a", "i1"), ("b", "f8")], align=True))
    records.view("u1")[1] = 7  # between the fields
    assert executor._on_nodes(records) is executor._on_nodes(records)
    assert executor.submit(lambda a: a[0].item(), records).result(60) == (0, 0.0)


@pytest.mark.nightly
def test_strided_and_fortran_arrays_and_closures_arrive_with_their_elements(executor):
    whole = np.arange(2 * MIB, dtype="i8").reshape(1024, 2048)
    fortran = np.asfortranarray(whole)
    for array in (whole[::2], whole.T, fortran, whole[:, 100:1500]):
        assert executor.submit(lambda a=array: (a.shape, int(a.sum()))).result(60) == (array.shape, int(array.sum()))
        assert executor.submit(np.array_equal, array, array).result(60)


@pytest.mark.nightly
def test_an_exception_of_any_class_is_raised_here_with_its_traceback(executor):
    outcomes = executor.map(fail, range(6), chunksize=1)
    assert [next(outcomes) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Unusual) as caught:
        next(outcomes)
    assert caught.value.code == 7
    assert "in fail" in str(caught.value.__cause__)


@pytest.mark.nightly
def test_a_worker_that_dies_fails_its_call_alone(executor):
    futures = [executor.submit(die, item) for item in range(5)]
    assert [future.exception(60) is None for future in futures] == [True, True, False, True, True]
    assert isinstance(futures[2].exception(), forkshm.WorkerDiedError)
    assert "while running die(2)" in str(futures[2].exception())
    assert futures[2].exception().task == "die(2)"
    assert futures[2].exception().index is None


@pytest.mark.parametrize(("chunksize", "length"), [(1, 6), (3, 40)])
def test_the_error_of_a_dead_worker_names_the_item(executor, chunksize, length):
    with pytest.raises(forkshm.WorkerDiedError) as caught:
        list(executor.map(die_of, range(length), [np.arange(MIB)] * length, [4] * length, chunksize=chunksize))
    assert caught.value.task == f"die_of(4, ndarray int64 ({MIB},), 4), item 4 of the input"
    assert caught.value.index == 4
    assert caught.value.task in str(caught.value)


@pytest.mark.nightly
def test_the_error_of_a_worker_that_dies_before_the_first_item_names_the_chunk(executor):
    with pytest.raises(forkshm.WorkerDiedError, match="running abs, items 2 to 3 of the input") as caught:
        list(executor.map(abs, [1, 2, DiesOnArrival(), 4], chunksize=2))
    assert caught.value.index == 2


@pytest.mark.nightly
def test_the_error_of_a_dead_worker_whose_result_is_an_argument_names_its_call(executor):
    lost = executor.submit_remote(die, 2)
    kept = executor.submit_remote(abs, 5)
    with pytest.raises(forkshm.WorkerDiedError) as caught:
        lost.result(60)
    assert (caught.value.task, caught.value.index) == ("die(2)", None)
    assert executor.submit(abs, lost).exception(60).task == "die(2)"
    assert executor.submit(os._exit, kept).exception(60).task == "_exit(<RemoteResult of abs>)"


def test_task_timeout_is_for_each_item(cluster):
    with forkshm.Executor(cluster=cluster, task_timeout=2) as executor:
        assert sum(executor.map(sleep_for, [0.5] * 12, chunksize=6)) == 6
        with pytest.raises(
            forkshm.TaskTimeoutError, match=r"sleep_for\(60\), item 1 of the input took longer"
        ) as caught:
            list(executor.map(sleep_for, [0, 60, 0], chunksize=3))
    assert caught.value.index == 1


def test_an_exception_arrives_without_an_attribute_that_cannot_be_pickled(executor):
    error = executor.submit(fail_with_a_lock).exception(60)
    assert type(error) is Unusual
    assert error.code == 5
    assert not hasattr(error, "lock")
    assert "'lock'" in error.__notes__[0]
    assert "in fail_with_a_lock" in str(error.__cause__)


@pytest.mark.nightly
def test_an_exception_brings_its_cause_and_context(executor):
    def chained():
        try:
            raise KeyError("first")
        except KeyError as first:
            raise ValueError("second") from first

    error = executor.submit(chained).exception(60)
    assert isinstance(error.__cause__, forkshm.pool.RemoteTraceback)
    assert repr(error.__cause__.__cause__) == repr(error.__context__) == "KeyError('first')"


def test_sys_exit_ends_the_call_and_not_its_node(executor):
    nodes = set(executor.client.run(os.getpid).values())
    with pytest.raises(SystemExit) as caught:
        executor.submit(sys.exit, 3).result(60)
    assert caught.value.code == 3
    failed = executor.submit_remote(sys.exit, 4)
    with pytest.raises(SystemExit):
        executor.submit(abs, failed).result(60)
    with pytest.raises(SystemExit):
        list(executor.map(sys.exit, [5]))
    assert set(executor.client.run(os.getpid).values()) == nodes


def test_workers_do_not_import_dask(executor):
    assert executor.submit(lambda: "distributed" in __import__("sys").modules).result(60) is False


def remember(value):
    global remembered
    remembered = value


def recall(number):
    return remembered + number + added


added = 0


@pytest.mark.nightly
def test_globals_that_an_initializer_sets_are_seen_by_calls(cluster, monkeypatch):
    with forkshm.Executor(1, None, remember, (10,), cluster=cluster) as executor:
        assert list(executor.map(recall, range(4))) == [10, 11, 12, 13]
        monkeypatch.setitem(globals(), "added", 100)  # what the client rebinds is sent
        assert list(executor.map(recall, range(4))) == [110, 111, 112, 113]


@pytest.mark.nightly
def test_cancelling_ends_a_call_that_runs(executor, tmp_path):
    def begin(path):
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)

    path = tmp_path / "pid"
    future = executor.submit(begin, path)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert future.cancel()
    assert future.cancelled()
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(int(path.read_text()), 0)
            time.sleep(0.01)
        pytest.fail("the worker is still there")
    assert executor.submit(abs, -1).result(60) == 1


def test_cancelling_a_call_at_once_keeps_no_worker(executor):
    assert executor.submit(abs, -1).result(60) == 1
    for _ in range(6):  # more than there are workers
        future = executor.submit(time.sleep, 600)
        assert future.cancel()
        assert executor.submit(abs, -1).result(60) == 1
    assert list(executor.map(abs, range(20), timeout=60)) == list(range(20))


def test_a_callback_may_wait_for_other_calls(executor):
    got, done = [], threading.Event()

    def call_again(future):
        got.extend([executor.submit(abs, -future.result()).result(60), *executor.map(abs, [-3])])
        done.set()

    executor.submit(abs, -2).add_done_callback(call_again)
    assert done.wait(120)
    assert got == [2, 3]
    # The thread in which Dask runs callbacks of all clients is free.
    reached = threading.Event()
    executor.client.submit(abs, -1).add_done_callback(lambda _: reached.set())
    assert reached.wait(60)


@pytest.mark.nightly
def test_shutdown_waits_for_callbacks(cluster):
    got = []

    def take(future):
        time.sleep(0.05)
        got.append(future.result())

    with forkshm.Executor(1, cluster=cluster) as executor:
        for number in range(6):
            executor.submit(abs, -number).add_done_callback(take)
    assert sorted(got) == list(range(6))
    ended = []
    executor = forkshm.Executor(1, cluster=cluster)
    executor.submit(abs, -1).add_done_callback(lambda _: ended.append(executor.shutdown()))
    executor.shutdown()
    assert ended == [None]


def test_an_asynchronous_client_is_refused():
    import asyncio

    async def main():
        options = {"n_workers": 1, "processes": False, "dashboard_address": None, "silence_logs": 50}
        async with (
            distributed.LocalCluster(**options, asynchronous=True) as cluster,
            distributed.Client(cluster, asynchronous=True) as client,
        ):
            for which in (cluster, client):
                with pytest.raises(forkshm.UnsupportedError, match="it is asynchronous"):
                    forkshm.Executor(cluster=which)

    asyncio.run(main())


def test_waiting_for_a_cancelled_call_ends(executor):
    futures = [executor.submit(time.sleep, 600) for _ in range(2)]
    timer = threading.Timer(0.2, futures[0].cancel)
    timer.start()
    assert concurrent.futures.wait(futures[:1], timeout=60).done == {futures[0]}
    timer.join()
    assert futures[1].cancel()
    assert futures[1].cancel()
    assert concurrent.futures.wait(futures, timeout=60).done == set(futures)
    assert set(concurrent.futures.as_completed(futures, timeout=60)) == set(futures)


@pytest.mark.nightly
def test_leaving_a_map_cancels_the_rest(executor, tmp_path):
    def mark(item):
        (tmp_path / str(item)).touch()
        time.sleep(0.2)
        return item

    with pytest.raises(KeyboardInterrupt):
        for item in executor.map(mark, range(200), chunksize=1):
            if item == 1:
                raise KeyboardInterrupt
    assert executor.submit(abs, -1).result(60) == 1
    begun = len(list(tmp_path.iterdir()))
    assert begun < 150
    assert executor.submit(time.sleep, 0.3).result(60) is None
    assert len(list(tmp_path.iterdir())) <= begun + 4


@pytest.mark.parametrize(
    "make",
    [
        forkshm.Lock,
        forkshm.Queue,
        lambda: forkshm.anonymous_shared_memory(10),
        lambda: forkshm.RawValue("i"),
        lambda: forkshm.RawArray("d", 3),
    ],
)
def test_objects_of_one_machine_are_refused(executor, make):
    with pytest.raises(forkshm.UnsupportedError, match="one machine"):
        executor.submit(print, make())


def test_a_class_of_a_module_that_is_not_imported_yet_arrives_by_name(monkeypatch):
    from forkshm.cluster._values import Writer, read

    monkeypatch.delitem(sys.modules, "numpy.rec", raising=False)
    assert read(Writer().write(np.recarray), {}) is np.recarray


def test_errors_name_the_part_that_cannot_be_pickled(executor):
    with open(os.devnull) as file, pytest.raises(TypeError, match=r"an open file .* \(args\[0\]\['x'\]: "):
        executor.submit(print, {"x": file})
    with pytest.raises(TypeError, match=r"a memoryview of 5 bytes.*\(kwds\['end'\]: memoryview\)"):
        executor.submit(print, end=memoryview(b"12345"))
    with pytest.raises(TypeError, match=r"lock.*\(iterable\[0\]\[0\]: _thread.lock\)"):
        list(executor.map(print, [threading.Lock()]))


class Measured(np.ndarray):
    unit = None


def _set_first(array):
    array[0] = 5
    return array.tolist()


@pytest.mark.parametrize("size", [3, 200_000])
def test_a_call_that_writes_to_a_remote_result_changes_its_own_copy(executor, size):
    remote = executor.submit_remote(np.zeros, size)
    for _ in range(2):
        assert executor.submit(_set_first, remote).result()[:2] == [5, 0]
    assert not remote.result().any()


def lock_in_the_third(item):
    return {"a": [item, threading.Lock()]} if item == 2 else item


def of_one_machine(item):
    return forkshm.Lock() if item == 2 else item


class Refuser:
    """Is pickled, but cannot be unpickled on the client."""

    def __init__(self, pid):
        self.pid = pid

    def __reduce__(self):
        return refuse, (os.getpid(),)


def refuse(pid):
    if os.getpid() == pid:
        return Refuser(pid)
    raise LookupError("not here")


def refuser_in_the_third(item):
    return Refuser(0) if item == 2 else item


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (lock_in_the_third, forkshm.ResultNotPicklableError, r"a dict, .*\(result\['a'\]\[1\]: _thread.lock\)"),
        (of_one_machine, forkshm.UnsupportedError, "cannot send a Lock to a cluster"),
        (refuser_in_the_third, forkshm.errors.NotUnpicklableError, r"unpickling it raised LookupError\('not here'\)"),
    ],
)
def test_a_result_that_cannot_be_sent_fails_its_call_alone(executor, function, kind, text):
    got, outcomes = [], executor.map(function, range(4), chunksize=4)
    with pytest.raises(kind, match=text):
        got.extend(outcomes)
    assert got == [0, 1]
    with pytest.raises(kind, match=text):
        executor.submit(function, 2).result()
    remote = executor.submit_remote(function, 2)
    with pytest.raises(kind, match=text):
        remote.result()
    with pytest.raises(kind, match=text):
        executor.submit(type, remote).result()


def test_an_array_in_several_results_is_sent_once():
    from forkshm.cluster._values import Results

    table = np.ones(100_000)
    results = Results([((number, table, table[:10]),) for number in range(8)])
    assert sys.getsizeof(results) < 1.1 * table.nbytes
    assert [(number, rows.sum(), first.size) for ((number, rows, first),) in results.open()] == [
        (number, 100_000, 10) for number in range(8)
    ]


def test_a_cancelled_result_is_no_argument(executor):
    remote = executor.submit_remote(time.sleep, 30)
    assert remote.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        executor.submit(type, remote)


def test_a_result_is_of_the_clients_class(executor):
    found = executor.submit(Unusual, 7, "seven").result()
    assert (type(found), found.code) == (Unusual, 7)
    remote = executor.submit_remote(Unusual, 8, "eight")
    assert executor.submit(lambda it: it.code, remote).result() == 8


def test_a_small_read_only_array_arrives_writable(executor):
    small = np.frombuffer(bytes(8))
    assert executor.submit(lambda a, b: ((a + b).tolist(), a.flags.writeable), small, b=small).result(60) == ([0], True)


def test_results_are_writable_and_keep_the_class_of_arrays(executor):
    shared = np.arange(MIB)
    part = executor.submit(lambda a: a[:5], shared).result(60)
    part += 1
    assert (type(part), part.tolist()) == (np.ndarray, [1, 2, 3, 4, 5])
    for kind in (np.recarray, np.matrix, Measured):
        made = executor.submit(lambda kind=kind: np.zeros(MIB, [("a", "f8")]).view(kind))
        assert type(made.result(60)) is kind
    remote = executor.submit_remote(lambda: np.ones((500, 300)).view(Measured))
    assert {kind.__name__ for kind in executor.map(type, [remote] * 8, chunksize=1)} == {"Measured"}


@pytest.mark.nightly
def test_a_remote_result_stays_there_and_can_be_an_argument(executor):
    made = executor.submit_remote(np.ones, 100)
    assert executor.submit(np.sum, made).result(60) == 100
    assert executor.submit(lambda pair: pair["x"].sum(), {"x": made}).result(60) == 100
    assert made.result(60).shape == (100,)
    failed = executor.submit_remote(fail, 3)
    with pytest.raises(Unusual):
        failed.result(60)


@pytest.mark.nightly
def test_a_decorated_function_maps_over_the_nodes(cluster):
    @forkshm.parallel(cluster=cluster, on_error="return")
    def root(number):
        if number < 0:
            raise ValueError(number)
        return number**0.5

    try:
        assert root(9) == 3
        assert root.map([4, 9, 16]) == [2, 3, 4]
        assert list(root.imap([4, 9])) == [2, 3]
        assert root.submit(25).result(60) == 5
        first, second = root.map([-1, 1])
        assert isinstance(first, ValueError)
        assert second == 1
        with pytest.raises(forkshm.UnsupportedError, match="out"):
            root.map([1], out=np.zeros(1))
    finally:
        root.close()


@pytest.mark.nightly
def test_starmap_takes_calls_of_different_lengths_and_shows_progress(cluster, capfd):
    @forkshm.parallel(cluster=cluster, workers=1, progress=True)
    def add(first, second=10):
        return first + second

    try:
        assert add.starmap([(1, 2), (3,)]) == [3, 13]
        assert "2/2" in capfd.readouterr().err
        assert add.starmap([]) == []
    finally:
        add.close()


@pytest.mark.nightly
def test_map_shows_progress(executor, capfd):
    assert list(executor.map(abs, [-1, 2], progress=True)) == [1, 2]
    assert "2/2" in capfd.readouterr().err
    with pytest.raises(TypeError, match="buffersize"):
        executor.map(abs, [1], buffersize="2")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mp_context": forkshm.get_context("fork")}, forkshm.UnsupportedError, "a node has threads"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
        ({"born_shred": True}, TypeError, "there is no option 'born_shred'"),
        ({"retries": -1}, ValueError, "retries must be at least 0"),
    ],
)
def test_wrong_options_are_refused_on_the_client(cluster, options, error, message):
    with pytest.raises(error, match=message):
        forkshm.Executor(1, cluster=cluster, **options)


@pytest.mark.nightly
def test_calls_and_workers_can_be_ended(cluster):
    executor = forkshm.Executor(1, cluster=cluster)
    assert executor._max_workers == 2
    assert isinstance(executor, concurrent.futures.ProcessPoolExecutor)
    futures = [executor.submit(time.sleep, 600) for _ in range(4)]
    executor.cancel_running(futures[:3])
    assert [future.cancelled() for future in futures] == [True, True, True, False]
    executor.kill_workers()
    with pytest.raises(forkshm.PoolClosedError):
        futures[3].result(60)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)


@pytest.mark.nightly
def test_the_pools_of_the_nodes_end_with_the_executor(cluster, wait_until):
    with forkshm.Executor(cluster=cluster) as executor:
        pids = {pid for found in all_workers(executor) for pid in found}

    def is_gone(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"

    assert len(pids) == 6
    wait_until(lambda: sum(not is_gone(pid) for pid in pids) <= 2)  # the fork servers stay with their nodes


@pytest.mark.nightly
def test_the_pools_of_the_nodes_end_when_the_executor_is_collected(cluster, wait_until):
    with distributed.Client(cluster, set_as_default=False) as client:
        before = count_agents(cluster)
        executor = forkshm.Executor(cluster=client)
        assert executor.submit(abs, -1).result(60) == 1
        assert count_agents(cluster) == before + 1
        del executor
        gc.collect()
        wait_until(lambda: count_agents(cluster) == before)


def count_agents(cluster):
    return len([name for name in cluster.scheduler.worker_plugins if name.startswith("forkshm-")])


def test_a_remote_result_is_released_with_its_last_reference(executor, cluster, wait_until):
    wait_until(lambda: not cluster.scheduler.tasks)
    results = [executor.submit_remote(abs, -2), executor.submit_remote(abs, -3)]
    assert [result.result(60) for result in results] == [2, 3]
    assert len(cluster.scheduler.tasks) == 2
    gc.disable()
    try:
        del results
        wait_until(lambda: not cluster.scheduler.tasks)
    finally:
        gc.enable()


def test_a_client_that_is_closed_first_fails_its_calls(cluster, tmp_path, wait_until):
    with distributed.Client(cluster, set_as_default=False) as client:
        executor = forkshm.Executor(cluster=client)
        future = executor.submit(hold, tmp_path / "begun")
        wait_until((tmp_path / "begun").exists)
    with pytest.raises(forkshm.PoolClosedError, match="is lost: Dask has cancelled the call"):
        future.result(60)
    for call in (executor.submit, executor.map):
        with pytest.raises(forkshm.PoolClosedError, match="client of this executor was closed"):
            call(abs, [1])
    executor.shutdown()


@pytest.mark.nightly
def test_a_call_that_ends_its_nodes_fails_by_name():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50, memory_limit=None
        ) as cluster,
        forkshm.Executor(cluster=cluster) as executor,
    ):
        error = executor.submit(kill_node, "now").exception(120)
        assert (type(error), error.task, error.attempts) == (forkshm.WorkerDiedError, "kill_node('now')", 4)
        assert "4 nodes died while running kill_node('now'), the last one at tcp://" in str(error)


@pytest.mark.nightly
def test_an_executor_that_was_shut_down_refuses_calls(cluster):
    executor = forkshm.Executor(1, cluster=cluster)
    assert executor.submit(abs, -1).result(60) == 1
    executor.shutdown()
    for call in (executor.submit, executor.map):
        with pytest.raises(RuntimeError, match="after shutdown"):
            call(abs, [-1])
    with pytest.raises(ValueError, match="max_workers"):
        forkshm.Executor(0, cluster=cluster)


@pytest.mark.nightly
def test_calls_of_a_node_that_is_killed_are_done_by_the_other():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50, memory_limit=None
        ) as cluster,
        forkshm.Executor(cluster=cluster) as executor,
    ):
        data = np.ones(MIB)

        def slow(item, array):
            time.sleep(0.05)
            return item + int(array[0])

        results = executor.map(slow, range(120), [data] * 120, chunksize=1)
        assert next(results) == 1
        pids = executor.client.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        assert list(results) == [item + 1 for item in range(1, 120)]


@pytest.mark.nightly
def test_nodes_that_are_threads_have_a_pool_each():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs=50
        ) as cluster,
        forkshm.Executor(cluster=cluster) as executor,
    ):
        data = np.arange(MIB)

        def look(array, index):
            time.sleep(0.1)
            return int(array[index]), type(array).__name__, os.getpid()

        found = list(executor.map(look, [data] * 20, range(20), chunksize=1))
        assert [value for value, *_ in found] == list(range(20))
        assert {name for _, name, _ in found} == {"SharedArray"}
        assert len({pid for *_, pid in found}) == 2
        assert count_arrays() == 1
        executor.client.retire_workers([next(iter(executor.client.nthreads()))])
        assert len(list(executor.map(look, [data] * 4, range(4), chunksize=1))) == 4


KILLED_CLIENT = """
import sys, time
import forkshm
if __name__ == "__main__":
    executor = forkshm.Executor(cluster=sys.argv[1])
    executor.submit(abs, 1).result()
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.nightly
def test_the_pools_of_a_killed_client_end(tmp_path, wait_until):
    def shorten():
        from forkshm.cluster import _agent

        _agent._RECONNECT = 0.5

    def agents(dask_worker):
        return [name for name in dask_worker.plugins if name.startswith("forkshm")]

    program = tmp_path / "killed_client.py"
    program.write_text(KILLED_CLIENT)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50, memory_limit=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run_on_scheduler(shorten)
        command = [sys.executable, str(program), cluster.scheduler_address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
            assert killed.stdout.readline() == "ready\n"
            assert len(next(iter(client.run(agents).values()))) == 1
            killed.kill()
        wait_until(lambda: list(client.run(agents).values()) == [[]])
        with forkshm.Executor(cluster=client) as executor:
            assert executor.submit(abs, -1).result(60) == 1
