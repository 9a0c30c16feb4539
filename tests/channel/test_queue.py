"""Queues: the contract of the standard library, and forkshm's additions."""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import pickle
import queue
import resource
import sys
import threading
import time

import numpy as np
import pytest
import started
from capability_skips import has

import forkshm
from forkshm.backend import kernel
from forkshm.region.blocks import _segment
from forkshm.region.blocks._arena import arena

KINDS = ["Queue", "JoinableQueue", "SimpleQueue"]
ITEMS = [
    None,
    7,
    -(2**70),
    1.5,
    "text",
    b"bytes",
    "x" * 2000,
    (1, "a", None),
    [1, [2, [3]]],
    {"a": 1, "b": [2]},
    {1, 2},
]


@contextlib.contextmanager
def made(thing):
    """Close a queue at the end."""
    try:
        yield thing
    finally:
        thing.close()
        if hasattr(thing, "join_thread"):
            thing.join_thread()
            thing._writer.close()  # the standard library's stays open if nothing was put


@pytest.fixture(params=KINDS)
def any_queue(request, mp):
    with made(getattr(mp, request.param)()) as it:
        yield it


@pytest.fixture
def a_queue(mp):
    with made(mp.Queue()) as it:
        yield it


@pytest.fixture
def ours():
    with made(forkshm.Queue()) as it:
        yield it


def _mapped_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * mmap.PAGESIZE


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class TestContract:
    """Return a queue of multiprocessing and one of forkshm; both keep its promises."""

    def test_items_arrive_in_order(self, any_queue):
        for item in ITEMS:
            any_queue.put(item)
        assert [any_queue.get() for _ in ITEMS] == ITEMS

    def test_a_child_gets_and_answers(self, mp, run):
        with made(mp.Queue()) as there, made(mp.SimpleQueue()) as back:

            def work():
                while (item := there.get()) is not None:
                    back.put(item * 2)

            run(work)
            for number in range(200):
                there.put(number)
            there.put(None)
            assert [back.get() for _ in range(200)] == [2 * number for number in range(200)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_item_goes_to_one_of_many_and_each_sender_is_in_order(self, mp, run, kind):
        with made(getattr(mp, kind)()) as there, made(mp.Queue()) as back:

            def produce(who):
                for number in range(300):
                    there.put((who, number))

            def consume():
                while (item := there.get()) is not None:
                    back.put((os.getpid(), *item))

            consumers = [run(consume) for _ in range(3)]
            producers = [run(produce, who) for who in range(3)]
            got = [back.get(timeout=30) for _ in range(900)]
            for process in producers:
                process.join()
            for _ in consumers:
                there.put(None)
            assert sorted((who, number) for _, who, number in got) == [(w, n) for w in range(3) for n in range(300)]
            for consumer in {pid for pid, _, _ in got}:
                for who in range(3):
                    seen = [n for pid, w, n in got if (pid, w) == (consumer, who)]
                    assert seen == sorted(seen)

    def test_an_empty_queue_says_so(self, a_queue):
        assert a_queue.empty()
        assert a_queue.qsize() == 0
        for call in (a_queue.get_nowait, lambda: a_queue.get(False), lambda: a_queue.get(timeout=0)):
            with pytest.raises(queue.Empty):
                call()
        began = time.monotonic()
        with pytest.raises(queue.Empty):
            a_queue.get(timeout=0.05)
        assert time.monotonic() - began >= 0.05

    def test_a_full_queue_says_so(self, mp):
        with made(mp.Queue(2)) as it:
            assert not it.full()
            it.put(1)
            it.put(2)
            assert it.full()
            assert it.qsize() == 2
            for call in (lambda: it.put_nowait(3), lambda: it.put(3, False), lambda: it.put(3, timeout=0)):
                with pytest.raises(queue.Full):
                    call()
            began = time.monotonic()
            with pytest.raises(queue.Full):
                it.put(3, timeout=0.05)
            assert time.monotonic() - began >= 0.05
            assert it.get() == 1
            it.put(3)
            assert [it.get(), it.get()] == [2, 3]
            assert it.qsize() == 0
            assert not it.full()

    def test_put_waits_for_room(self, mp, run):
        with made(mp.Queue(3)) as it:
            run(lambda: [it.put(number) for number in range(500)])
            assert [it.get(timeout=30) for _ in range(500)] == list(range(500))

    def test_the_bound_holds_with_many_senders(self, mp, run):
        with made(mp.Queue(2)) as it:
            for _ in range(3):
                run(lambda: [it.put(number) for number in range(100)])
            for _ in range(300):
                it.get(timeout=30)
                assert it.qsize() <= 2

    def test_get_waits_for_an_item(self, a_queue, run):
        ready = threading.Event()
        got = []

        def wait():
            ready.set()
            got.append(a_queue.get())

        thread = threading.Thread(target=wait)
        thread.start()
        ready.wait()
        a_queue.put("late")
        thread.join()
        assert got == ["late"]

    def test_a_closed_queue_is_refused(self, mp):
        it = mp.Queue()
        if has("fork") or isinstance(it, forkshm.queues.Queue):  # otherwise there are no assertions
            with pytest.raises((AssertionError, ValueError)):
                it.join_thread()
        it.close()
        it.close()
        it.join_thread()
        for call in (lambda: it.put(1), it.get, it.get_nowait):
            with pytest.raises(ValueError, match="is closed"):
                call()

    def test_a_closed_simple_queue_is_refused(self, mp):
        it = mp.SimpleQueue()
        it.close()
        it.close()
        for call in (lambda: it.put(1), it.get, it.empty):
            with pytest.raises(OSError, match="closed"):
                call()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_plain_pickle_is_refused(self, mp, kind):
        with made(getattr(mp, kind)()) as it, pytest.raises(RuntimeError):
            pickle.dumps(it)

    def test_items_put_before_a_process_ends_arrive(self, a_queue, run):
        run(lambda: [a_queue.put(number) for number in range(5000)])
        assert [a_queue.get(timeout=30) for _ in range(5000)] == list(range(5000))

    def test_five_thousand_items_wait_for_the_first_get(self, a_queue):
        for number in range(5000):
            a_queue.put(number)
        eventually(lambda: a_queue.qsize() == 5000)
        assert [a_queue.get() for _ in range(5000)] == list(range(5000))
        eventually(a_queue.empty)

    def test_join_waits_for_unfinished_items(self, mp, run):
        with made(mp.JoinableQueue()) as it:

            def work():
                while it.get() is not None:
                    it.task_done()

            it.join()
            for number in range(50):
                it.put(number)
            run(work)
            it.join()
            assert it.empty()
            it.put(None)
            with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
                for _ in range(3):
                    it.task_done()


class TestOurs:
    def test_an_unpicklable_item_is_dropped_and_printed_with_its_path_and_line(self, capfd):
        with made(forkshm.JoinableQueue(1)) as it:
            for _ in range(3):
                it.put({"model": [threading.Lock()]})
                line = sys._getframe().f_lineno - 1
                said = capfd.readouterr().err
                assert said.startswith(f"A queue drops the dict that was put in {__file__}, line {line}: ")
                assert "Traceback" in said
                # Python 3.14 and newer add notes of their own.
                assert "(obj['model'][0]: _thread.lock)\n" in said
            assert it.empty()
            it.put(1)
            assert it.qsize() == it.get() == 1
            it.task_done()
            it.join()
            assert capfd.readouterr().err == ""

    def test_an_unpicklable_item_raises_from_put_with_on_error_raise(self, in_child):
        def fails(queue):
            for _ in range(3):
                with pytest.raises(TypeError, match=r"cannot pickle .* \(obj: _thread\.lock\)"):
                    queue.put(threading.Lock())

        with made(forkshm.JoinableQueue(1, on_error="raise")) as it:
            fails(it)
            assert in_child(lambda: fails(it)) == 0
            with forkshm.Pool(1) as pool:
                pool.apply(fails, [it])
            it.put(1)
            assert it.get() == 1
            it.task_done()
            it.join()

    def test_a_refused_send_raises_from_put(self, ours, in_child):
        addresses = resource.RLIMIT_AS  # here, where a backend that has none skips

        def without_memory():
            large = mmap.mmap(-1, 2**30)
            # A region for its copy cannot be mapped.
            limit = _mapped_bytes() + 2**29
            resource.setrlimit(addresses, (limit, limit))
            for _ in range(3):
                with pytest.raises(OSError, match="Cannot allocate memory"):
                    ours.put(pickle.PickleBuffer(large))
            assert ours.qsize() == 0
            ours.put("more")
            assert ours.get() == "more"

        assert in_child(without_memory) == 0

    def test_another_on_error_is_refused(self):
        for kind in forkshm.queues.Queue, forkshm.queues.JoinableQueue, forkshm.get_context("spawn").Queue:
            with pytest.raises(ValueError, match="on_error must be one of 'print', 'raise', got 'skip'"):
                kind(on_error="skip")

    def test_later_changes_do_not_show(self, ours):
        item = [1]
        ours.put(item)
        item.append(2)
        assert ours.get() == [1]

    def test_an_item_is_there_as_soon_as_put_returns(self, ours):
        for number in range(100):
            ours.put(number)
            assert not ours.empty()
            assert ours.qsize() == 1
            assert ours.get_nowait() == number

    def test_no_thread_while_the_kernel_has_room(self, ours):
        before = threading.active_count()
        for number in range(50):
            ours.put(number)
        assert threading.active_count() == before

    def test_the_thread_ends_when_the_backlog_is_sent(self, ours):
        for number in range(5000):
            ours.put((number, "x" * 500))
        assert ours._feeder is not None
        assert [ours.get()[0] for _ in range(5000)] == list(range(5000))
        eventually(lambda: ours._feeder is None)
        ours.put("again")
        assert ours.get() == "again"

    def test_an_item_is_in_the_backlog_only_when_a_thread_sends_it(self, ours, monkeypatch):
        def interrupt():
            assert not ours._backlog
            raise KeyboardInterrupt

        numbers = []
        monkeypatch.setattr(ours, "_start_feeder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            for number in range(5000):
                ours.put((number, "x" * 500))
                numbers.append(number)
        monkeypatch.undo()
        ours.put("next")
        assert [ours.get()[0] for _ in numbers] == numbers
        assert ours.get() == "next"
        assert ours.empty()

    def test_order_holds_when_a_backlog_begins_and_ends(self, ours, in_child):
        def consume():
            for number in range(20_000):
                assert ours.get(timeout=30)[0] == number
                if number % 4000 == 0:
                    time.sleep(0.02)  # let the kernel's buffer fill

        thread = threading.Thread(target=lambda it=ours: [it.put((n, "x" * 300)) for n in range(20_000)])
        thread.start()
        assert in_child(consume) == 0
        thread.join()

    @pytest.mark.needs("inheritance")
    def test_a_child_does_not_send_its_parents_backlog_again(self, ours, in_child):
        for number in range(5000):
            ours.put((number, "x" * 500))
        assert ours._backlog

        def look():
            assert not ours._backlog
            with pytest.raises(queue.Empty):
                while True:
                    assert ours.get(timeout=0.5)[0] == next(numbers)

        numbers = iter(range(5000))
        assert in_child(look) == 0
        assert ours.empty()

    def test_a_closed_queue_raises_from_every_method(self):
        it = forkshm.Queue()
        it.put(1)
        it.close()
        for call in (it.empty, it.qsize, it.get, functools.partial(it.put, 2)):
            with pytest.raises(OSError, match="closed"):
                call()

    @pytest.mark.needs("handles_in_messages")
    def test_items_survive_the_end_of_the_sender_whatever_they_are(self, ours, in_child):
        shared = forkshm.zeros(1000)

        def send():
            ours.put((1, "small"))
            ours.put(np.arange(200_000))
            ours.put(b"x" * 100_000)
            made_here = forkshm.full(1000, 3.0)
            ours.put(made_here)
            ours.put(shared)

        assert in_child(send) == 0
        assert ours.get() == (1, "small")
        assert ours.get().sum() == np.arange(200_000).sum()
        assert ours.get() == b"x" * 100_000
        assert ours.get().sum() == 3000
        there = ours.get()
        there[0] = 42
        assert shared[0] == 42

    @pytest.mark.parametrize("kind", KINDS)
    def test_shared_arrays_and_regions_are_the_same_memory(self, kind, in_child):
        with made(getattr(forkshm, kind)()) as there, made(forkshm.SimpleQueue()) as back:
            # Created after the fork, so that it must be sent.
            region = forkshm.anonymous_shared_memory(4096)

            def work():
                array, window = there.get()
                array[1:3] = 5
                window.buf[:3] = b"abc"
                back.put(array[1:])

            process = forkshm.Process(target=work)
            process.start()
            array = forkshm.zeros(4)
            there.put((array, region))
            tail = back.get()
            process.join()
            process.close()
            assert array.tolist() == [0, 5, 5, 0]
            assert bytes(region.buf[:3]) == b"abc"
            tail[2] = 9
            assert array[3] == 9

    def test_a_large_array_arrives_equal_and_writable(self, ours):
        sent = np.random.default_rng(1).integers(0, 255, 100_000_000, np.uint8)
        ours.put(sent)
        got = ours.get()
        assert np.array_equal(got, sent)
        got[0] += 1
        assert got[0] != sent[0]

    @pytest.mark.needs("fd_limit")
    @pytest.mark.needs("locks_as_leases")
    def test_thousands_of_arrays_wait_whatever_the_limit_on_files(self, in_child):
        def wait_and_get():
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
            it = forkshm.Queue()
            for number in range(3000):
                it.put(np.full(2500, number))
            for number in range(3000):
                assert it.get(timeout=30).sum() == 2500 * number
            assert it.qsize() == 0

        assert in_child(wait_and_get) == 0

    @pytest.mark.needs("inheritance")
    def test_a_forked_child_drops_its_parents_unsent_items(self, ours, in_child):
        for _ in range(1000):
            ours.put((np.ones(2500), "x" * 4000))
        assert ours._backlog
        held = arena.statistics().blocks

        def look():
            for segment in _segment.segments_held.values():
                assert segment.held == {}

        assert in_child(look) == 0
        for _ in range(1000):
            assert ours.get()[0].sum() == 2500
        assert held == 1000

    def test_lambdas_and_classes_made_later_cross(self, ours):
        ours.put(lambda x: x + 1)
        assert ours.get()(1) == 2

    def test_an_item_that_fails_to_unpickle_raises_and_the_next_works(self, ours):
        ours.put(Bad())
        ours.put("good")
        with pytest.raises(ZeroDivisionError):
            ours.get()
        assert ours.get() == "good"
        assert ours.qsize() == 0

    def test_a_get_that_is_interrupted_loses_nothing(self, ours):
        class Interrupted(Exception):
            pass

        def interrupt(*_):
            raise Interrupted

        for timeout in (None, 30):
            with started.interrupting(interrupt), pytest.raises(Interrupted):
                ours.get(timeout=timeout)
        ours.put("still")
        assert ours.get() == "still"

    def test_a_bounded_put_that_is_interrupted_takes_no_room(self):
        def interrupt(*_):
            raise InterruptedError

        with made(forkshm.Queue(1)) as it:
            it.put(1)
            with started.interrupting(interrupt), pytest.raises(InterruptedError):
                it.put(2)
            assert it.get() == 1
            it.put_nowait(3)
            assert it.get() == 3

    def test_a_default_timeout_of_sockets_is_not_ours(self, monkeypatch):
        import socket

        socket.setdefaulttimeout(0.01)
        try:
            with made(forkshm.SimpleQueue()) as it:
                timer = threading.Timer(0.1, it.put, ("late",))
                timer.start()
                assert it.get() == "late"
                timer.join()
        finally:
            socket.setdefaulttimeout(None)

    def test_queues_give_their_fds_back_without_close(self):
        for kind in KINDS:
            getattr(forkshm, kind)().put(1)  # the leak check finds what stays

    def test_a_program_ends_only_when_its_items_are_sent(self, run_script):
        out = run_script("""
import forkshm, os
queue = forkshm.Queue()
go = forkshm.SimpleQueue()
def consume():
    go.get()
    print(sum(queue.get()[0] for _ in range(5000)), flush=True)
process = forkshm.Process(target=consume)
process.start()
for number in range(5000):
    queue.put((number, "x" * 500))
go.put(1)
""")
        assert out == f"{sum(range(5000))}\n"

    @pytest.mark.parametrize("cancel", ["", "queue.cancel_join_thread()"])
    def test_a_program_with_unsent_items_ends_without_receivers(self, run_script, cancel):
        assert (
            run_script(f"""
import forkshm
queue = forkshm.Queue()
for number in range(5000):
    queue.put((number, "x" * 500))
{cancel}
print("end")
""")
            == "end\n"
        )

    def test_a_cancelled_child_does_not_wait(self, run_script):
        assert (
            run_script("""
import forkshm
queue = forkshm.Queue()
def produce():
    for number in range(5000):
        queue.put((number, "x" * 500))
    queue.cancel_join_thread()
process = forkshm.Process(target=produce)
process.start()
process.join()
print(process.exitcode)
""")
            == "0\n"
        )

    def test_the_first_thread_may_end_while_another_gets(self, run_script):
        assert (
            run_script("""
import forkshm, threading
queue = forkshm.Queue()
def consume():
    print(sum(queue.get()[0] for _ in range(5000)))
for number in range(5000):
    queue.put((number, "x" * 500))
threading.Thread(target=consume).start()
""")
            == f"{sum(range(5000))}\n"
        )

    def test_the_standard_librarys_processes_inherit_them_as_arguments(self, ours):
        process = multiprocessing.get_context("fork").Process(target=lambda it: it.put("hello"), args=(ours,))
        process.start()
        assert ours.get(timeout=30) == "hello"
        process.join()
        process.close()

    def test_many_threads(self, ours):
        got = []
        consumers = [
            threading.Thread(target=lambda: [got.append(item) for item in iter(ours.get, None)]) for _ in range(3)
        ]
        producers = [
            threading.Thread(target=lambda who=who: [ours.put((who, n)) for n in range(300)]) for who in range(3)
        ]
        for thread in consumers + producers:
            thread.start()
        for thread in producers:
            thread.join()
        for _ in consumers:
            ours.put(None)
        for thread in consumers:
            thread.join()
        assert sorted(got) == [(who, n) for who in range(3) for n in range(300)]


def test_a_counter_is_shared_and_never_negative():
    shared = forkshm.Queue()
    counter = shared._counters.items
    memory = kernel.create_memory(1, "test")
    other = kernel.create_counter(memory)

    def count(it):
        from forkshm.backend import kernel

        for _ in range(5000):
            kernel.count(it._counters.items, 1)

    try:
        processes = [forkshm.Process(target=count, args=(shared,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            process.close()
        assert kernel.count(counter) == 15_000
        assert kernel.count(other) == 0
        with pytest.raises(OSError, match=r"Invalid argument|less than 0"):
            kernel.count(other, -1)
        kernel.clear_counter(counter)
        assert kernel.count(counter) == 0
    finally:
        kernel.close(memory)
        kernel.close(other)
        shared.close()


class Bad:
    def __reduce__(self):
        return divide, (1, 0)


def divide(one, two):
    return one / two


def test_a_closed_queue_that_was_never_put_into_is_empty():
    unused, used = forkshm.Queue(), forkshm.Queue()
    used.put(1)
    for each in unused, used:
        each.close()
        each.join_thread()
    assert unused.empty()
    with pytest.raises(OSError, match="is closed"):
        used.empty()


def test_a_subclass_hook_receives_unpicklable_items():
    class Told(forkshm.queues.Queue):
        told = None

        def _on_queue_feeder_error(self, e, obj):
            self.told = e, obj

    lock = threading.Lock()
    queue = Told(maxsize=1)
    queue.put(lock)
    error, obj = queue.told
    assert isinstance(error, TypeError)
    assert obj is lock
    queue.put("there is room", timeout=0)
    assert queue.get() == "there is room"
    queue.close()
