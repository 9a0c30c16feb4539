"""patch() makes code that imports ``multiprocessing`` use forkshm, and unpatch() undoes it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import sys
import threading
import time

import pytest
import started

import forkshm

pytestmark = pytest.mark.slow

METHODS = ["fork", "spawn", "forkserver"]
# The standard library's default start method.
(DEFAULT,) = started.methods("fork")


def state():
    """Return everything that patch() may change."""
    import multiprocessing.managers
    import multiprocessing.sharedctypes

    names = {(multiprocessing, name): getattr(multiprocessing, name) for name in [*multiprocessing.__all__, "pool"]}
    for module in (multiprocessing.managers, multiprocessing.sharedctypes, sys.modules["multiprocessing.pool"]):
        names |= {(module, name): value for name, value in vars(module).items() if not name.startswith("__")}
    base = multiprocessing.context.BaseContext
    names |= {(base, name): value for name, value in vars(base).items() if not name.startswith("__")}
    return names


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = state()
    yield
    assert state() == before


def test_multiprocess_is_ours_too():
    import multiprocess  # noqa: TID251
    import multiprocess.pool  # noqa: TID251

    before = multiprocess.Pool, multiprocess.Process, multiprocess.pool, multiprocess.get_context
    with forkshm.patched():
        assert multiprocess.Process is forkshm.Process
        assert multiprocess.pool.Pool is forkshm.Pool
        assert multiprocess.get_context() is forkshm.get_context()
        with multiprocess.Pool(1) as pool, multiprocess.get_context(DEFAULT).Pool(1) as other:
            assert {type(pool), type(other)} == {forkshm.Pool}
            assert pool.apply(lambda: 5) == 5
        with multiprocess.Manager() as manager:
            assert list(manager.list([1, 2])) == [1, 2]
    assert (multiprocess.Pool, multiprocess.Process, multiprocess.pool, multiprocess.get_context) == before


def test_patch_returns_names_it_cannot_replace(monkeypatch):
    import types

    import multiprocess  # noqa: TID251

    early = types.ModuleType("an_early_library")
    early.Pool, early.Worker, early.harmless = multiprocess.Pool, multiprocessing.Process, len
    monkeypatch.setitem(sys.modules, early.__name__, early)
    unreached = forkshm.patch()
    try:
        assert {"an_early_library.Pool", "an_early_library.Worker"} <= set(unreached)
        assert not [
            name
            for name in unreached
            if name.startswith(("forkshm", "multiprocess", "concurrent", "an_early_library.h"))
        ]
    finally:
        forkshm.unpatch()


def test_names_looked_up_while_patched_are_ours():
    with forkshm.patched():
        assert multiprocessing.get_context() is forkshm.get_context()
        assert multiprocessing.get_context("spawn") is forkshm.get_context("spawn")
        assert multiprocessing.Process is forkshm.Process
        assert multiprocessing.pool.Pool is forkshm.Pool
        assert isinstance(multiprocessing.Queue(), forkshm.Queue)
        assert isinstance(multiprocessing.SimpleQueue(), forkshm.SimpleQueue)
        assert isinstance(multiprocessing.Pipe()[0], forkshm.connection.Connection)
        from multiprocessing import Pool
        from multiprocessing.pool import Pool as SamePool

        assert SamePool is forkshm.Pool
        with Pool(1) as pool:
            assert isinstance(pool, forkshm.Pool)
            assert pool.apply(lambda: multiprocessing.get_context() is forkshm.get_context())
    assert multiprocessing.get_context() is not forkshm.get_context()


def test_calls_nest():
    with forkshm.patched():
        with forkshm.patched():
            forkshm.patch()
            forkshm.unpatch()
            assert multiprocessing.Process is forkshm.Process
        assert multiprocessing.Process is forkshm.Process
    assert multiprocessing.Process is not forkshm.Process


def test_unpatch_without_patch_raises():
    with pytest.raises(RuntimeError, match="cannot unpatch multiprocessing: it is not patched"):
        forkshm.unpatch()


def test_an_error_in_the_block_undoes_the_patch():
    with pytest.raises(ZeroDivisionError), forkshm.patched():
        1 / 0  # noqa: B018
    assert multiprocessing.Process is not forkshm.Process


def test_names_replaced_by_other_code_are_left_alone(monkeypatch):
    with monkeypatch.context() as change:
        with forkshm.patched():
            change.setattr(multiprocessing, "cpu_count", lambda: 3)
        assert multiprocessing.cpu_count() == 3
        change.undo()
        # The names that existed before.
        assert multiprocessing.cpu_count.__self__ is not None
    multiprocessing.cpu_count = multiprocessing.context._default_context.cpu_count


def test_blocks_of_several_threads_overlap():
    inside, leave = threading.Barrier(3), threading.Event()

    def block():
        with forkshm.patched():
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=block) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert multiprocessing.Process is forkshm.Process
    leave.set()
    for thread in threads:
        thread.join()
    assert multiprocessing.Process is not forkshm.Process


def test_exceptions_of_the_standard_library_catch_ours():
    with forkshm.patched(), multiprocessing.Pool(1) as pool:
        with pytest.raises(multiprocessing.TimeoutError):
            pool.apply_async(time.sleep, (0.2,)).get(timeout=0.001)
        here, there = multiprocessing.Pipe()
        with here, there:
            here.send_bytes(b"12345")
            with pytest.raises(multiprocessing.BufferTooShort):
                there.recv_bytes_into(bytearray(1))


def test_objects_created_before_patch_continue_to_work():
    threads = multiprocessing.pool.ThreadPool(1)
    ctx = multiprocessing.get_context(DEFAULT)
    kind = multiprocessing.pool.ThreadPool
    theirs = multiprocessing.pool.Pool
    with ctx.Pool(1) as pool, threads, forkshm.patched():
        assert pool.map(abs, [-1]) == [1]
        with pytest.raises(TypeError):
            pool.apply(abs, ("x",))  # exceptions find the names of their module
        assert threads.map(abs, [-1]) == [1]
        assert multiprocessing.pool.ThreadPool is kind
        with kind(1) as more:
            assert more.map(abs, [-1]) == [1]
        with ctx.Pool(1) as other:
            assert type(other) is theirs
            assert other.map(abs, [-1]) == [1]
    threads.join()
    pool.join()
    other.join()
    more.join()


SCRIPT = """
import multiprocessing, sys
import forkshm

def which(depth):
    used = [type(multiprocessing.get_context()).__module__, multiprocessing.get_start_method()]
    if depth:
        with multiprocessing.Pool(1) as pool:
            used += pool.apply(which, (depth - 1,))
    return used

if __name__ == "__main__":
    with forkshm.patched():
        multiprocessing.set_start_method(sys.argv[1])
        with multiprocessing.Pool(1) as pool:
            print(*pool.apply(which, (1,)))
        queue = multiprocessing.Queue()
        process = multiprocessing.Process(target=lambda: queue.put(which(0)))
        process.start()
        print(*queue.get())
        process.join()
    with forkshm.get_context(sys.argv[1]).Pool(1) as pool:
        print(*pool.apply(which, (0,)))
"""


@pytest.mark.parametrize("method", METHODS)
def test_children_are_patched_as_their_parent_is(run_script, method):
    said = run_script(SCRIPT, method).splitlines()
    ours, theirs = f"forkshm.context {method}", f"multiprocessing.context {multiprocessing.get_all_start_methods()[0]}"
    assert said == [f"{ours} {ours}", ours, theirs]


@pytest.mark.parametrize("method", METHODS)
def test_the_standard_library_knows_the_current_process(run_script, method):
    """In a forkshm process, ``multiprocessing`` knows the process and its parent, and can start processes."""
    said = run_script(
        """
import multiprocessing, os, sys
import forkshm

def work(queue, key):
    me, parent = multiprocessing.current_process(), multiprocessing.parent_process()
    queue.put((me.name, me.pid == os.getpid(), parent.name, parent.pid == os.getppid() or sys.argv[1] == "forkserver"))
    queue.put((bytes(me.authkey) == key, multiprocessing.active_children()))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        queue.put(pool.apply(abs, (-3,)))

if __name__ == "__main__":
    ctx = forkshm.get_context(sys.argv[1])
    queue = ctx.SimpleQueue()
    process = ctx.Process(target=work, args=(queue, bytes(multiprocessing.current_process().authkey)), name="Bee")
    process.start()
    print(*queue.get())
    print(*queue.get())
    print(queue.get())
    process.join()
    with ctx.Pool(1) as pool:
        print(*pool.apply(lambda: [multiprocessing.current_process().name == forkshm.current_process().name]))
    print(multiprocessing.current_process().name)
""",
        method,
    )
    assert said.splitlines() == ["Bee True MainProcess True", "True []", "3", "True", "MainProcess"]
