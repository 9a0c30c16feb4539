"""Everything works with fork, spawn and forkserver; each script is a program of its own."""

from __future__ import annotations

import multiprocessing.context
import textwrap

import multiprocess.context  # noqa: TID251 - what contexts are instances of
import pytest

import forkshm

pytestmark = pytest.mark.slow

METHODS = ["fork", "spawn", "forkserver"]

HEAD = """
import os, signal, sys, threading
import numpy as np
import forkshm
from forkshm.testing import check_leaks

METHOD = sys.argv[1]

def square(x):
    return x * x

class Point:
    def __init__(self, x):
        self.x = x

if __name__ == "__main__":
    ctx = forkshm.get_context(METHOD)
    # From here on the fork server, and what else stays, is there.
    warm = ctx.Process()
    warm.start()
    warm.join()
    warm.close()
"""


@pytest.fixture(params=METHODS)
def run(request, run_script):
    """Run a program that begins with HEAD, with each start method."""
    forkshm.get_context(request.param)  # skips unsupported methods

    def run_it(at_top, main=""):
        source = HEAD.replace('if __name__ == "__main__":', textwrap.dedent(at_top) + '\nif __name__ == "__main__":')
        return run_script(source + textwrap.indent(textwrap.dedent(main), "    "), request.param)

    return run_it


@pytest.mark.needs("fork_context")
@pytest.mark.parametrize("method", METHODS)
def test_a_context_is_one_for_both_libraries(method):
    ctx = forkshm.get_context(method)
    assert ctx is forkshm.get_context(method)
    assert ctx.get_start_method() == method
    assert ctx.get_context() is ctx
    assert ctx.get_context("fork") is forkshm.get_context("fork")
    assert isinstance(ctx, multiprocessing.context.BaseContext)
    assert isinstance(ctx, multiprocess.context.BaseContext)
    assert ctx.Process._start_method == method


@pytest.mark.needs("fork_context")
def test_fork_is_the_default_and_comes_first():
    assert forkshm.get_start_method() == "fork"
    assert forkshm.get_all_start_methods() == METHODS


def test_freeze_support_does_not_choose_the_start_method(run_script):
    run_script("""
import sys
import forkshm

for sys.frozen in (False, True):
    forkshm.freeze_support()
    assert forkshm.get_start_method(allow_none=True) is None
forkshm.set_start_method("spawn")
forkshm.freeze_support()
""")


def test_freeze_support_runs_a_spawned_process(run_script):
    said = run_script("""
import sys
import forkshm
import multiprocess.spawn

multiprocess.spawn.spawn_main = lambda **named: print(named)
sys.frozen = True
sys.argv[1:] = ["--multiprocessing-fork", "tracker_fd=3", "pipe_handle=5"]
forkshm.freeze_support()
print("not reached")
""")
    assert said == "{'tracker_fd': 3, 'pipe_handle': 5}\n"


@pytest.mark.needs("fork_context")
def test_the_start_method_is_set_once(run_script):
    said = run_script("""
import forkshm

if __name__ == "__main__":
    assert forkshm.get_start_method(allow_none=True) is None
    try:
        forkshm.set_start_method("knife")
    except ValueError as error:
        print(error)
    forkshm.set_start_method("spawn")
    assert forkshm.get_start_method() == "spawn" == forkshm.get_context().get_start_method()
    try:
        forkshm.set_start_method("fork")
    except RuntimeError as error:
        print(error)
    forkshm.set_start_method("forkserver", force=True)
    with forkshm.Pool(1) as pool:
        print(pool.apply(forkshm.get_start_method))
    forkshm.set_start_method(None, force=True)
    print(forkshm.get_start_method())
""")
    assert said.splitlines() == [
        "cannot find context for 'knife': use one of fork, spawn, forkserver",
        "context has already been set",
        "forkserver",
        "fork",
    ]


def test_a_pool_has_the_same_workers(run):
    run(
        """
        STATE = None

        def remember(x):
            global STATE
            STATE = x

        def recall():
            return STATE
        """,
        """
        offset = 5
        def guarded(x):
            return x + 1000 + offset
        class Local(Point):
            pass
        with check_leaks(), ctx.Pool(2, remember, (42,)) as pool:
            assert pool.map(square, range(100)) == [x * x for x in range(100)]
            assert pool.map(lambda x: x + offset, range(3)) == [5, 6, 7]
            assert pool.map(guarded, range(3)) == [1005, 1006, 1007]
            assert pool.apply(recall) == 42
            assert type(pool.apply(Point, (3,))) is Point
            assert type(pool.apply(Local, (3,))) is Local
            assert pool.apply(os.getpid) != os.getpid()
            try:
                pool.apply(square, ("x",))
            except TypeError as error:
                assert "square" in str(error.__cause__), error.__cause__
            else:
                raise SystemExit("no error")
            gone = pool.apply_async(os._exit, (3,))
            try:
                gone.get()
            except forkshm.WorkerDiedError as error:
                assert error.exitcode == 3
            assert pool.map(square, range(10)) == [x * x for x in range(10)]
        """,
    )


def test_memory_crosses_to_a_pool_as_descriptors(run):
    run(
        """
        def fill(a, v):
            a[:] = v
            return a

        def write(region, offset):
            region.buf[offset] = 7
        """,
        """
        with check_leaks():
            with ctx.Pool(1) as pool:
                later = forkshm.zeros(1_000_000)
                back = pool.apply(fill, (later[10:20], 3))
                assert later.sum() == 30 and np.shares_memory(back, later)
                plain = np.arange(1e6)
                assert (pool.apply(fill, (plain, 2)) == 2).all() and plain[-1] == 999_999
                region = forkshm.anonymous_shared_memory(8192)
                pool.apply(write, (region, 8191))
                assert region.buf[8191] == 7
                del back, later
                region.close()
        """,
    )


@pytest.mark.needs("fork_context")
def test_a_process_receives_its_arguments(run):
    run(
        """
        def work(region, array, queue, conn, mutex, offset, function):
            with mutex:
                region.buf[0] += 1
            array[:] = offset
            queue.put((function(2), array))
            conn.send(forkshm.current_process().name)
            conn.close()
            sys.exit(7)
        """,
        """
        from forkshm.region import Mutex
        offset = 5
        region = forkshm.anonymous_shared_memory(4096)
        mutex = Mutex(region, 64)
        array = forkshm.zeros(1000)
        queue = ctx.Queue()
        mine, theirs = ctx.Pipe()
        process = ctx.Process(target=work, name="Worker Bee",
            args=(region, array, queue, theirs, mutex, offset, lambda x: x + offset))
        process.start()
        theirs.close()
        number, same = queue.get()
        assert number == 7 and np.shares_memory(same, array) and array.sum() == 5000
        assert mine.recv() == "Worker Bee"
        process.join()
        assert process.exitcode == 7, process.exitcode
        assert region.buf[0] == 1
        assert not forkshm.get_context("fork").active_children()
        """,
    )


def test_a_lock_of_a_killed_holder_is_found(run):
    run(
        """
        def die_holding(mutex, ready):
            mutex.acquire()
            ready.put(1)
            signal.pause()
        """,
        """
        from forkshm.region import Mutex
        region = forkshm.anonymous_shared_memory(4096)
        mutex = Mutex(region)
        ready = ctx.SimpleQueue()
        process = ctx.Process(target=die_holding, args=(mutex, ready))
        process.start()
        ready.get()
        assert not mutex.acquire(timeout=0)
        process.kill()
        process.join()
        assert mutex.acquire(timeout=20)
        assert mutex.owner_died
        """,
    )


def test_objects_of_multiprocess_can_be_sent(run):
    run(
        """
        def add(value, lock, event):
            with lock:
                value.value += 1
            event.wait()
        """,
        """
        value, lock, event = ctx.Value("i", 0), ctx.Lock(), ctx.Event()
        processes = [ctx.Process(target=add, args=(value, lock, event)) for _ in range(2)]
        for process in processes:
            process.start()
        event.set()
        for process in processes:
            process.join()
        assert value.value == 2
        """,
    )


def test_a_manager_and_its_proxies(run):
    run(
        """
        def put(shared, k):
            shared[k] = np.full(10, k)
        """,
        """
        with ctx.Manager() as manager:
            shared = manager.dict()
            with ctx.Pool(2) as pool:
                pool.starmap(put, [(shared, k) for k in range(5)])
            process = ctx.Process(target=put, args=(shared, 9))
            process.start()
            process.join()
            assert sorted(shared.keys()) == [0, 1, 2, 3, 4, 9]
            assert shared[9].sum() == 90
        """,
    )


def test_a_manager_that_is_told_no_context_is_started_as_was_set(run):
    run(
        "",
        """
        from forkshm.channel.manager import SyncManager
        forkshm.set_start_method(METHOD)
        manager = SyncManager()
        manager.start()
        with manager:
            assert manager._process._start_method == METHOD
            assert list(manager.list([1])) == [1]
        """,
    )


def test_pools_in_workers(run):
    run(
        """
        def inner(x):
            with forkshm.get_context(METHOD).Pool(1) as pool:
                return pool.apply(square, (x,))
        """,
        """
        with ctx.Pool(2) as pool:
            assert pool.map(inner, [1, 2, 3]) == [1, 4, 9]
        """,
    )


def test_classes_of_processes(run):
    run(
        """
        class Doubling(forkshm.get_context(METHOD).Process):
            def __init__(self, queue, x):
                super().__init__()
                self.queue, self.x = queue, x
            def run(self):
                self.queue.put(self.x * 2)
        """,
        """
        queue = ctx.Queue()
        process = Doubling(queue, forkshm.full(3, 7.0))
        process.start()
        assert queue.get().tolist() == [14.0] * 3
        process.join()
        assert process.exitcode == 0
        """,
    )


def test_the_default_process_is_started_as_was_set(run):
    run(
        """
        def tell(queue, array):
            array[:] = 2
            queue.put((forkshm.get_start_method(), os.getpid()))

        class Telling(forkshm.Process):
            def __init__(self, *args):
                super().__init__()
                self.args = args
            def run(self):
                tell(*self.args)
        """,
        """
        forkshm.set_start_method(METHOD)
        queue, array = forkshm.SimpleQueue(), forkshm.zeros(3)
        with check_leaks():
            for process in (forkshm.Process(target=tell, args=(queue, array)), Telling(queue, array)):
                process.start()
                assert queue.get() == (METHOD, process.pid)
                process.join()
                assert process.exitcode == 0 and array.sum() == 6
                process.close()
        """,
    )


def test_the_start_method_in_a_child_is_the_one_that_started_it(run):
    said = run(
        """
        def tell():
            print(forkshm.get_start_method(), flush=True)

        def hand_down():
            process = forkshm.Process(target=tell)
            process.start()
            process.join()
            tell()
        """,
        """
        process = ctx.Process(target=hand_down)
        process.start()
        process.join()
        print(METHOD, process.exitcode)
        """,
    )
    child, parent, (method, code) = (line.split() for line in said.splitlines())
    assert child == parent == [method]
    assert code == "0"


def test_a_process_object_crosses_to_its_process_only():
    process = forkshm.get_context("spawn").Process(target=print)
    with (
        pytest.raises(forkshm.NotPicklableError, match="can be sent only to the process that it starts"),
        forkshm.Pool(1) as pool,
    ):
        pool.apply(repr, (process,))


def test_an_argument_that_cannot_cross_fails_the_start_and_leaves_nothing(run):
    run(
        "",
        """
        if METHOD != "fork":
            process = ctx.Process(target=print, args=(threading.Lock(),))
            with check_leaks():
                try:
                    process.start()
                except TypeError as error:
                    assert "lock" in str(error), error
                else:
                    raise SystemExit("no error")
                del process
            assert not ctx.active_children()
        """,
    )


def test_a_program_may_read_its_arguments_and_fail_without_them(run):
    # HEAD does, but reports it only where a process is started.
    at_top = """
    if len(sys.argv) != 2:
        raise SystemExit("imported without its arguments")
    """
    main = """
    with ctx.Pool(1) as pool:
        print(pool.apply(square, (3,)))
    """
    assert run(at_top, main) == "9\n"


def test_an_unpicklable_part_is_named_by_its_path(run):
    at_top = """
    class Model:
        lock = None

    def fails(start):
        model = Model()
        model.lock = threading.Lock()
        with check_leaks():
            try:
                start([model])
            except TypeError as error:
                print(error)
    """
    main = """
    fails(lambda models: ctx.Queue(on_error="raise").put(models))
    fails(lambda models: ctx.SimpleQueue().put(models))
    fails(lambda models: ctx.Pipe()[0].send(models))
    if METHOD != "fork":
        fails(lambda models: ctx.Process(target=square, args=(models,)).start())
        fails(lambda models: ctx.Process(target=square, kwargs={"x": models}).start())
        fails(lambda models: ctx.Process(target=lambda: models).start())
        fails(lambda models: ctx.Pool(2, initializer=square, initargs=(1, models)))
        fails(lambda models: ctx.Pool(2, initializer=lambda: models))
    print(METHOD)
    """
    *said, method = run(at_top, main).splitlines()
    ways = ["obj[0].lock"] * 3
    if method != "fork":
        ways += ["args[0][0].lock", "kwargs['x'][0].lock", "target.__closure__['models'][0].lock"]
        ways += ["initargs[1][0].lock", "initializer.__closure__['models'][0].lock"]
    assert said == [f"cannot pickle '_thread.lock' object ({way}: _thread.lock)" for way in ways]
