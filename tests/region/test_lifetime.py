"""The end of regions: collections at any moment, other threads, forks."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

import forkshm
from forkshm import anonymous_shared_memory
from forkshm.backend import IS_FREE_THREADED
from forkshm.region import _lifetime, _table
from forkshm.region._attach import region_at
from forkshm.region._lifetime import guard, settle, watch

PAGE = os.sysconf("SC_PAGE_SIZE")


class Thing:
    """An object that can be watched."""


def test_an_action_runs_once_when_the_thing_is_collected():
    ran = []
    thing = Thing()
    watch(thing, lambda: ran.append(guard._is_owned()))
    gc.collect()
    assert ran == []
    del thing
    assert ran == [True]
    settle()
    assert ran == [True]
    assert not guard._is_owned()


def test_an_action_that_falls_due_while_the_lock_is_held_waits_for_its_release():
    ran = []
    thing = Thing()
    watch(thing, lambda: ran.append(1))
    with guard:
        del thing
        settle()
        assert ran == []
    settle()
    assert ran == [1]


def test_an_action_that_queues_another_runs_both():
    ran = []
    things = [Thing(), Thing()]
    watch(things[1], lambda: ran.append("second"))
    watch(things[0], lambda: (ran.append("first"), things.pop()))
    del things[0]
    assert ran == ["first", "second"]


def test_a_region_dropped_while_the_lock_is_held_is_unmapped_afterwards():
    region = anonymous_shared_memory(PAGE)
    address = region.address
    with guard:
        del region
    assert region_at(address) is None


def test_regions_made_and_dropped_in_many_threads_leave_the_tables_as_they_were():
    before = len(_table._new) + len(_table._starts), len(_lifetime._watched)
    wrong = []

    def work(number):
        try:
            kept = []
            for turn in range(100):
                region = anonymous_shared_memory(1 + (turn * 977) % (3 * PAGE))
                region.buf[-1] = number
                assert region_at(region.address) is region
                kept.append(region.buf if turn % 3 else region)
                if len(kept) > 5:
                    assert kept[0].nbytes if isinstance(kept[0], memoryview) else kept[0].buf[-1] == number
                    del kept[0]
                del region
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    settle()
    assert (len(_table._new) + len(_table._starts), len(_lifetime._watched)) == before
    assert not {m.address for same in _table._by_identity.values() for m in same.values()} ^ set(_table._starts)


def test_a_region_made_here_may_be_dropped_by_another_thread():
    handed_over = [anonymous_shared_memory(PAGE)]
    address = handed_over[0].address
    thread = threading.Thread(target=handed_over.clear)
    thread.start()
    thread.join()
    assert region_at(address) is None


def test_collections_inside_every_allocation_do_not_deadlock():
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(50):
            cycle = [anonymous_shared_memory(PAGE)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*thresholds)


@pytest.fixture
def busy_thread():
    """Run a thread that creates and drops regions continuously."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            anonymous_shared_memory(PAGE).close()
            view = anonymous_shared_memory(PAGE).buf
            del view

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_a_child_forked_while_a_thread_changes_the_tables_can_use_regions(busy_thread, in_child):
    def use():
        assert not guard._is_owned()
        with anonymous_shared_memory(PAGE) as region:
            assert region_at(region.address) is region
            region.buf[0] = 1
        assert region_at(region._mapping.address) is None

    for _ in range(30):
        assert in_child(use) == 0


def test_a_region_dropped_in_a_child_ends_only_there(in_child):
    holder = [anonymous_shared_memory(PAGE)]
    address, fd = holder[0].address, holder[0].fileno()

    def drop():
        holder.clear()
        assert region_at(address) is None
        try:
            os.fstat(fd)
        except OSError:
            return 0
        return 2

    assert in_child(drop) == 0
    assert region_at(address) is holder[0]
    holder[0].buf[0] = 1
    holder[0].close()


def test_views_that_outlive_everything_do_not_disturb_the_exit(run_script):
    script = """
import sys, forkshm
region = forkshm.anonymous_shared_memory(4096)
sys.view = region.buf
class Late:
    def __init__(self, view): self.view = view
    def __del__(self): print("late", self.view[0])
sys.late = Late(region.buf)
region.buf[0] = 9
"""
    done = run_script(script, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_that_fails_leaves_the_lock_free(in_child):
    import resource

    def fail():
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        try:
            os.fork()
        except BlockingIOError:
            assert not guard._is_owned()
            anonymous_shared_memory(PAGE).close()
            return 0
        return 2

    if os.getuid() != 0:
        pytest.skip("only root can become a user who may not fork")
    assert in_child(fail) == 0


def test_a_reference_that_a_debugger_keeps_does_not_unmap_a_region_that_was_shrunk():
    region = forkshm.anonymous_shared_memory(100_000)
    region.buf[:3] = b"abc"
    kept = region._mapping.exporter
    region.shrink_by(50_000)
    settle()
    assert kept() is None
    assert bytes(region.buf[:3]) == b"abc"
    region.close()


FINALIZERS = """
import gc
import forkshm

class Cyclic:
    def __init__(self, thing, use):
        self.me, self.thing, self.use = self, thing, use

    def __del__(self):
        print(self.use(self.thing))
        kept.append(self.thing)

def received():
    queue.put(bytearray(b"a" * 1_000_000))
    return queue.get()

def use_received(data):
    queue.put(bytearray(b"b" * 1_000_000))
    queue.get()
    return bytes(data[:3])

kept = []
queue = forkshm.SimpleQueue()
for make, use in (
    (lambda: forkshm.anonymous_shared_memory(5_000), lambda region: bytes(region.buf[:3])),
    (lambda: forkshm.anonymous_shared_memory(5_000).buf, lambda view: bytes(view[:3])),
    (received, use_received),
    (forkshm.Event, lambda event: event.set()),
    (forkshm.Lock, lambda lock: lock.acquire(False)),
    (lambda: forkshm.Value("i"), lambda value: value.value),
    (lambda: forkshm.anonymous_shared_memory(5_000), lambda region: region.close()),
):
    Cyclic(make(), use)
    gc.collect()
    print(use(kept[-1]))
"""


def test_a_finalizer_in_a_reference_cycle_can_use_its_memory(run_script):
    zeros, received = "b'\\x00\\x00\\x00'", "b'aaa'"
    expected = [zeros, zeros, zeros, zeros, received, received, "None", "None", "True", "False", "0", "0"]
    expected += ["None", "None"]  # `close` can be repeated
    assert run_script(FINALIZERS).split("\n")[:-1] == expected


@pytest.mark.skipif(not IS_FREE_THREADED, reason="only there do threads run while another one collects")
def test_a_fork_waits_for_a_collection_of_another_thread():
    begun, order = threading.Event(), []

    class Slow:
        def __init__(self):
            self.me = self

        def __del__(self):
            begun.set()
            time.sleep(0.3)
            order.append("collected")

    Slow()
    collector = threading.Thread(target=gc.collect)
    collector.start()
    begun.wait()
    pid = os.fork()
    if not pid:
        gc.collect()
        os._exit(0 if gc.isenabled() else 1)
    order.append("forked")
    collector.join()
    assert os.waitpid(pid, 0) == (pid, 0)
    assert order == ["collected", "forked"]
    assert gc.isenabled()


def test_a_finalizer_may_fork_while_it_is_collected():
    codes = []

    class Forks:
        def __init__(self):
            self.me = self

        def __del__(self):
            pid = os.fork()
            if not pid:
                os._exit(0)
            codes.append(os.waitpid(pid, 0)[1])

    Forks()
    gc.collect()
    assert codes == [0]
