"""Scenarios to interrupt: their objects, the interrupted operation, and the check of the objects afterwards.

`run` is interrupted at one point; then `check` uses the same objects. Both raise AssertionError for a wrong answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import importlib.util
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time

import numpy as np

import forkshm
from forkshm import aio
from forkshm.backend import IS_FREE_THREADED
from forkshm.managers import SyncManager
from forkshm.testing import check_leaks

__all__ = ("SCENARIOS", "Scenario")

# Number of runs of each task: tasks count themselves, in memory that all processes share.
_counts = forkshm.zeros(2**18, dtype=np.int64)
_deaths = forkshm.zeros(len(_counts), dtype=np.int64)
_ids = iter(())


def fresh(how_many):
    """Return unused numbers for tasks."""
    global _ids
    numbers = []
    while len(numbers) < how_many:
        number = next(_ids, None)
        if number is None:
            _counts[:] = 0
            _deaths[:] = 0
            _ids = iter(range(len(_counts)))
        else:
            numbers.append(number)
    return numbers


def work(number):
    """Run as a task."""
    _counts[number] += 1
    return number * 3


def work_of(array):
    """Run as a task with an array, whose first item is its number, and return an array."""
    _counts[int(array[0])] += 1
    return array * 2


def die_once(number):
    """End the process in the first run of a task."""
    _deaths[number] += 1
    if _deaths[number] == 1:
        os._exit(3)
    return work(number)


def same(given, wanted):
    """Assert that an answer is correct."""
    assert given == wanted, f"{given!r}, and not {wanted!r}"


class Scenario:
    """A scenario. Its objects are created once, and again after they have reported that they are broken."""

    # Time limit for one run and its check.
    seconds = 20
    # Whether to check for resources that are left open after a run.
    is_checked_for_leaks = True
    # Exceptions that these objects may raise instead of continuing.
    broken = ()

    def __init__(self):
        self.numbers = []

    def make(self):
        """Create the objects."""

    def run(self):
        """Run the operation to interrupt."""
        raise NotImplementedError

    def check(self):
        """Use the same objects."""
        self.run()

    def drop(self):
        """Release the objects."""

    def new(self, how_many):
        """Return numbers for tasks."""
        numbers = fresh(how_many)
        self.numbers += numbers
        return numbers

    def check_counts(self):
        """Assert that no task of the last runs was run twice."""
        twice = [number for number in self.numbers if _counts[number] > 1]
        self.numbers = []
        assert not twice, f"tasks {twice} were run twice"


class _OfPool(Scenario):
    def make(self):
        self.pool = forkshm.Pool(2)
        self.pool.map(work, self.new(4))

    def check(self):
        numbers = self.new(3)
        same(self.pool.map(work, numbers, chunksize=1), [3 * number for number in numbers])
        (number,) = self.new(1)
        same(self.pool.apply(work, (number,)), 3 * number)
        self.settled()

    def settled(self):
        # A worker may still run an interrupted task.
        dispatcher = self.pool._dispatcher
        assert dispatcher.drive(dispatcher.is_idle, 5), "something was never answered"

    def drop(self):
        self.pool.terminate()
        self.pool.join()
        del self.pool


class PoolMap(_OfPool):
    def run(self):
        numbers = self.new(8)
        same(self.pool.map(work, numbers, chunksize=2), [3 * number for number in numbers])


class PoolApply(_OfPool):
    def run(self):
        (number,) = self.new(1)
        same(self.pool.apply(work, (number,)), 3 * number)


class PoolApplyAsync(_OfPool):
    def run(self):
        self.called = []
        numbers = self.new(3)
        self.asked = [self.pool.apply_async(work, (number,), callback=self.called.append) for number in numbers]
        self.results = list(zip(numbers, self.asked, strict=True))
        same([result.get(15) for result in self.asked], [3 * number for number in numbers])

    def check(self):
        super().check()
        for number, result in getattr(self, "results", ()):
            same(result.get(15), 3 * number)
        assert len(self.called) == len(set(self.called)), f"a callback was called twice: {self.called}"
        self.results = []


class PoolImap(_OfPool):
    def run(self):
        numbers = self.new(6)
        same(list(self.pool.imap(work, numbers, chunksize=2)), [3 * number for number in numbers])


class PoolImapGenerator(_OfPool):
    def run(self):
        numbers = self.new(6)
        same(list(self.pool.imap(work, (number for number in numbers))), [3 * number for number in numbers])


class PoolImapResumed(_OfPool):
    """Calls `next` again after it was interrupted: no item is lost."""

    def run(self):
        self.wanted = self.new(6)
        self.got = []
        self.iterator = self.pool.imap(work, self.wanted)
        self.take()

    def take(self):
        while True:
            # This file is not traced, so no interrupt comes between the two.
            try:
                value = self.iterator.next(15)
            except StopIteration:
                break
            self.got.append(value)
        same(self.got, [3 * number for number in self.wanted])
        self.iterator = None

    def check(self):
        if getattr(self, "iterator", None) is not None:
            self.take()
        super().check()


class PoolMapBatches(_OfPool):
    """A map of enough tiny tasks that tasks and answers share messages."""

    def run(self):
        numbers = self.new(120)
        same(self.pool.map(work, numbers, chunksize=1), [3 * number for number in numbers])


class PoolImapBatches(PoolImapResumed):
    """The same number of tiny tasks, through an iterator that continues after an interrupt."""

    items = 120

    def run(self):
        self.wanted = self.new(self.items)
        self.got = []
        self.iterator = self.pool.imap(work, self.source())
        self.take()

    def source(self):
        return self.wanted


class PoolImapGeneratorBatches(PoolImapBatches):
    """Iterates with input that a thread reads."""

    items = 40

    def source(self):
        return (number for number in self.wanted)


class PoolMapArrays(_OfPool):
    def run(self):
        arrays = [np.full(20_000, float(number)) for number in self.new(4)]
        answers = self.pool.map(work_of, arrays, chunksize=1)
        for array, answer in zip(arrays, answers, strict=True):
            assert (answer == array * 2).all(), "an array arrived wrong"

    def check(self):
        self.run()
        super().check()


class PoolDeath(_OfPool):
    """A worker dies: only its task fails, and another worker takes its place."""

    seconds = 40

    def run(self):
        numbers = self.new(4)
        dying = self.pool.apply_async(os._exit, (3,))
        answers = self.pool.map_async(work, numbers, chunksize=1)
        same(answers.get(15), [3 * number for number in numbers])
        try:
            dying.get(15)
        except forkshm.WorkerDiedError:
            pass
        else:
            raise AssertionError("the worker did not die")


class PoolRetries(_OfPool):
    """The task of a dead worker is run again."""

    seconds = 40

    def make(self):
        self.pool = forkshm.Pool(2, retries=1)
        self.pool.map(work, self.new(4))

    def run(self):
        (number,) = self.new(1)
        same(self.pool.apply(die_once, (number,)), 3 * number)


class PoolReplaces(_OfPool):
    """Workers end after some tasks, and others take their places."""

    seconds = 40

    def make(self):
        self.pool = forkshm.Pool(2, maxtasksperchild=2)

    def run(self):
        numbers = self.new(3)
        same(self.pool.map(work, numbers, chunksize=1), [3 * number for number in numbers])


class AioPool(Scenario):
    """Calls in an event loop, which only logs what a signal handler raises in a callback, and goes on."""

    def make(self):
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: None)
        self.awaited = aio.Pool(2)
        self.run()

    def run(self):
        self.loop.run_until_complete(self.calls())

    async def calls(self):
        numbers = self.new(6)
        answers = await asyncio.gather(*(self.awaited.call(work, number) for number in numbers[:2]))
        answers += await self.awaited.map(work, numbers[2:4], chunksize=1)
        answers += [answer async for answer in self.awaited.imap(work, numbers[4:])]
        same(answers, [3 * number for number in numbers])

    def check(self):
        # An interrupt that ends the loop leaves its coroutines, which continue with the loop.
        left = asyncio.all_tasks(self.loop)
        if left:
            _, waiting = self.loop.run_until_complete(asyncio.wait(left, timeout=10))
            assert not waiting, f"these wait forever: {waiting}"
        self.run()

    def drop(self):
        self.awaited.terminate()
        self.loop.close()
        del self.awaited


class ParallelMap(Scenario):
    def make(self):
        self.work = forkshm.parallel(work, workers=2)
        same(list(self.work.map(self.new(1))) != [], True)

    def run(self):
        numbers = self.new(6)
        same(list(self.work.map(numbers)), [3 * number for number in numbers])
        numbers = self.new(4)
        same(list(self.work.imap(iter(numbers))), [3 * number for number in numbers])
        (number,) = self.new(1)
        same(self.work.submit(number).result(15), 3 * number)

    def drop(self):
        self.work.close()
        del self.work


class _OfExecutor(Scenario):
    def make(self):
        self.executor = forkshm.Executor(2)
        self.executor.submit(work, *self.new(1)).result()

    def check(self):
        (number,) = self.new(1)
        same(self.executor.submit(work, number).result(15), 3 * number)
        numbers = self.new(3)
        same(list(self.executor.map(work, numbers)), [3 * number for number in numbers])
        dispatcher = self.executor.pool._dispatcher
        assert self.executor._work.drive(dispatcher.is_idle, 5), "something was never answered"

    def drop(self):
        self.executor.shutdown()
        del self.executor


class ExecutorSubmit(_OfExecutor):
    def run(self):
        numbers = self.new(3)
        self.futures = []
        for number in numbers:
            self.futures.append((number, self.executor.submit(work, number)))
        same([future.result(15) for _, future in self.futures], [3 * number for number in numbers])

    def check(self):
        for number, future in getattr(self, "futures", ()):
            same(future.result(15), 3 * number)
        self.futures = []
        super().check()


class ExecutorMap(_OfExecutor):
    def run(self):
        numbers = self.new(6)
        same(list(self.executor.map(work, numbers)), [3 * number for number in numbers])


class ExecutorWait(_OfExecutor):
    def run(self):
        self.futures = []
        numbers = self.new(3)
        for number in numbers:
            self.futures.append((number, self.executor.submit(work, number)))
        done, _ = concurrent.futures.wait([future for _, future in self.futures], 15)
        same(len(done), 3)
        came = [future.result() for future in concurrent.futures.as_completed([f for _, f in self.futures], 15)]
        same(sorted(came), [3 * number for number in sorted(numbers)])

    def check(self):
        for number, future in getattr(self, "futures", ()):
            same(future.result(15), 3 * number)
        self.futures = []
        super().check()


class ExecutorFirstCall(Scenario):
    """Starts, calls and ends an executor."""

    def run(self):
        with forkshm.Executor(1) as executor:
            (number,) = self.new(1)
            same(executor.submit(work, number).result(15), 3 * number)


class _OfChannel(Scenario):
    def things(self):
        return [np.full(20_000, 7.0), "text", [np.full(20_000, 8.0), {"a": np.arange(3)}]]

    def right(self, thing, wanted):
        if isinstance(wanted, np.ndarray):
            assert (thing == wanted).all(), "an array arrived wrong"
        elif isinstance(wanted, list):
            self.right(thing[0], wanted[0])
            self.right(thing[1]["a"], wanted[1]["a"])
        else:
            same(thing, wanted)


class Queue(_OfChannel):
    def make(self):
        self.queue = forkshm.Queue()

    def run(self):
        for thing in self.things():
            self.queue.put(thing)
            self.right(self.queue.get(), thing)

    def check(self):
        while not self.queue.empty():
            self.queue.get()
        self.run()
        same(self.queue.qsize(), 0)

    def drop(self):
        self.queue.close()
        self.queue.join_thread()
        del self.queue


class BoundedQueue(Queue):
    """A place taken by an interrupted call is returned within a moment."""

    def make(self):
        self.queue = forkshm.Queue(2)

    def check(self):
        super().check()
        for _ in range(2):
            self.queue.put(1, timeout=5)
        for _ in range(2):
            self.queue.get(timeout=5)


class JoinableQueue(Queue):
    """Counts items until they are done."""

    def make(self):
        self.queue = forkshm.JoinableQueue()

    def run(self):
        for thing in self.things():
            self.queue.put(thing)
            self.right(self.queue.get(), thing)
            self.queue.task_done()
        self.queue.join()

    def check(self):
        while not self.queue.empty():
            self.queue.get()
        # An interrupted item may never have been counted as done.
        while True:
            try:
                self.queue.task_done()
            except ValueError:
                break
        self.run()
        same(self.queue.qsize(), 0)


class JoinablePut(JoinableQueue):
    """Puts items: an item is counted as unfinished if and only if it can be received."""

    def run(self):
        for thing in self.things():
            self.queue.put(thing)

    def check(self):
        while not self.queue.empty():
            self.queue.get()
            self.queue.task_done()
        self.queue.join()
        same(self.queue.qsize(), 0)
        super().run()


class FullQueue(_OfChannel):
    """Puts more than fits into the kernel's buffer, which is made small so that few items fill it."""

    def make(self):
        self.queue = forkshm.Queue()
        self.queue._writer._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)

    def item(self):
        return np.full(20_000, 1.0)

    def run(self):
        self.put = 0
        item = self.item()
        for _ in range(8):
            self.queue.put(item)
            self.put += 1
        assert self.queue._backlog, "the buffer was not full"
        for _ in range(self.put):
            self.right(self.queue.get(timeout=15), item)

    def check(self):
        deadline = time.monotonic() + 15
        while self.queue._backlog or not self.queue.empty():
            assert time.monotonic() < deadline, "the backlog was not sent"
            with contextlib.suppress(queue.Empty):  # the feeder has sent the item, and still has to remove it
                self.queue.get(timeout=0.1)
        self.queue.put("end")
        same(self.queue.get(timeout=15), "end")

    def drop(self):
        self.queue.close()
        self.queue.join_thread()
        del self.queue


class FullQueueOfBlocks(FullQueue):
    """The same with items of several blocks, which share an fd."""

    def item(self):
        return [np.full(200_000, 1.0), {"a": np.full(200_000, 2.0)}]


class SimpleQueue(_OfChannel):
    def make(self):
        self.queue = forkshm.SimpleQueue()

    def run(self):
        for thing in self.things():
            self.queue.put(thing)
            self.right(self.queue.get(), thing)

    def check(self):
        while not self.queue.empty():
            self.queue.get()
        self.run()

    def drop(self):
        self.queue.close()
        del self.queue


class Pipe(_OfChannel):
    def make(self):
        self.here, self.there = forkshm.Pipe()

    def run(self):
        for thing in self.things():
            self.here.send(thing)
            self.right(self.there.recv(), thing)
        self.here.send_bytes(bytes(100_000))
        same(len(self.there.recv_bytes()), 100_000)

    def check(self):
        while self.there.poll():
            try:
                self.there.recv_bytes()
            except OSError:
                pass  # an object with buffers
        self.run()

    def drop(self):
        self.here.close()
        self.there.close()
        del self.here, self.there


class PipeLoses(_OfChannel):
    """Sent messages are received, however often receiving was interrupted."""

    def make(self):
        self.here, self.there = forkshm.Pipe()
        self.left = []

    def run(self):
        self.left = self.things()
        self.is_sent = False
        for thing in self.left:
            self.here.send(thing)
        self.is_sent = True
        self.take()

    def take(self):
        while self.left:
            thing = self.there.recv()
            self.right(thing, self.left.pop(0))

    def check(self):
        if not self.is_sent:
            while self.there.poll():
                self.there.recv()
            self.run()
        # A message that was received and whose return was interrupted is lost, so there may be one less.
        while self.left and self.there.poll(0):
            thing = self.there.recv()
            try:
                self.right(thing, self.left[0])
            except (AssertionError, TypeError, KeyError, IndexError):
                self.left.pop(0)
                self.right(thing, self.left[0])
            self.left.pop(0)
        self.left = []
        self.run()

    def drop(self):
        self.here.close()
        self.there.close()
        del self.here, self.there


class BornShared(Scenario):
    """An exception in NumPy's hook is ignored, and the array is created as usual: correct, and not shared."""

    def check(self):
        assert self.run() == 4.0, "the array was not shared"

    def run(self):
        with forkshm.shared_allocations(100_000):
            array = np.ones(50_000)
        array[:] = 3.0
        other = np.ones(50_000)
        assert array.sum() == 150_000
        assert other.sum() == 50_000
        here, there = forkshm.Pipe()
        with here, there:
            here.send(array)
            got = there.recv()
            got[0] = 4.0
        return array[0]


class Regions(Scenario):
    def run(self):
        region = forkshm.anonymous_shared_memory(100_000)
        region.buf[:3] = b"abc"
        part = region.buf[1:3]
        assert bytes(part) == b"bc"
        same_memory = forkshm.MappedRegion(region, "read_only", offset=1, size=5)
        assert bytes(same_memory.buf[:2]) == b"bc"
        del part
        same_memory.close()
        region.shrink_by(50_000)
        same(region.size, 50_000)
        here, there = forkshm.Pipe()
        with here, there:
            here.send(region)
            got = there.recv()
            assert bytes(got.buf[:3]) == b"abc"
            here.send(np.frombuffer(region.buf, np.uint8)[1:10])
            assert bytes(there.recv()[:2]) == b"bc"
        del got
        region.close()


class SharedArrays(Scenario):
    def run(self):
        array = forkshm.zeros(30_000)
        array[:] = 2.0
        small = forkshm.zeros(3)
        small[:] = 1.0
        here, there = forkshm.Pipe()
        with here, there:
            here.send((array[10:], small))
            got, few = there.recv()
            assert (got == 2.0).all()
            few[0] = 5.0
            assert small[0] == 5.0


class Containers(Scenario):
    def run(self):
        items = forkshm.SharedList([np.full(20_000, 5.0), "text", {"a": 1}])
        by_name = forkshm.SharedDict({"array": np.full(20_000, 6.0), "number": 7})
        here, there = forkshm.Pipe()
        with here, there:
            here.send((items, by_name))
            got, named = there.recv()
            assert (got[0] == 5.0).all()
            same(got[2], {"a": 1})
            assert (named["array"] == 6.0).all()
            same(named["number"], 7)


class Names(Scenario):
    """Memory with a name, as in the standard library."""

    def run(self):
        memory = forkshm.shared_memory.SharedMemory(create=True, size=10_000)
        try:
            memory.buf[:3] = b"abc"
            other = forkshm.shared_memory.SharedMemory(memory.name)
            try:
                same(bytes(other.buf[:3]), b"abc")
            finally:
                other.close()
            here, there = forkshm.Pipe()
            with here, there:
                here.send(memory)
                got = there.recv()
                same(bytes(got.buf[:3]), b"abc")
                got.close()
        finally:
            memory.close()
            memory.unlink()


class Files(Scenario):
    """Memory that is mapped from a file."""

    def make(self):
        self.file = tempfile.NamedTemporaryFile()
        self.file.write(bytes(range(200)) * 1000)
        self.file.flush()

    def run(self):
        mapped = np.memmap(self.file.name, np.uint8, "r+")
        here, there = forkshm.Pipe()
        with here, there:
            here.send([mapped, mapped[100:50_000]])
            whole, part = there.recv()
            same(int(whole[5]), 5)
            same(int(part[5]), 105)
            region = forkshm.MappedRegion(forkshm.FileMapping(self.file.name, "read_only"), "read_only")
            here.send(region)
            got = there.recv()
            same(bytes(got.buf[1:3]), b"\x01\x02")

    def drop(self):
        self.file.close()


class RegionLocks(Scenario):
    seconds = 30

    def make(self):
        self.region = forkshm.anonymous_shared_memory(65_536)
        offset = 0
        self.locks = []
        for kind, arguments in (
            (forkshm.region.Mutex, ()),
            (forkshm.region.RecursiveMutex, ()),
            (forkshm.region.Semaphore if hasattr(forkshm.region, "Semaphore") else None, (1,)),
        ):
            if kind is None:
                continue
            self.locks.append(kind(self.region, offset, *arguments))
            offset += -(-kind.SIZE // 64) * 64
        self.locks.append(forkshm.region.Condition(self.region, offset, self.locks[0]))
        offset += -(-forkshm.region.Condition.SIZE // 64) * 64
        self.rwlock = forkshm.region.RWLock(self.region, offset, readers=2)

    def run(self):
        for lock in self.locks:
            with lock:
                pass
            # A C function completes a release, whatever exception follows.
            if lock.acquire(timeout=5):
                lock.release()
        with self.rwlock.read():
            with self.rwlock.read():
                pass
        with self.rwlock.write():
            pass

    def check(self):
        for lock in self.locks:
            assert lock.acquire(timeout=1), f"{lock!r} was left locked"
            lock.release()
        assert self.rwlock.acquire_write(timeout=1), "the lock was left locked"
        self.rwlock.release()
        # Another thread can acquire it, too.
        failed = []

        def use():
            for lock in self.locks:
                if not lock.acquire(timeout=1):
                    failed.append(lock)
                else:
                    lock.release()
            if self.rwlock.acquire_write(timeout=1):
                self.rwlock.release()
            else:
                failed.append(self.rwlock)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert not failed, f"{failed} were left locked"

    def drop(self):
        del self.locks, self.rwlock
        self.region = None


class ClassicLocks(Scenario):
    def make(self):
        self.locks = [forkshm.Lock(), forkshm.RLock(), forkshm.Semaphore(1), forkshm.BoundedSemaphore(1)]
        self.condition = forkshm.Condition()
        self.event = forkshm.Event()
        self.value = forkshm.Value("i", 0)

    def run(self):
        for lock in self.locks:
            with lock:
                pass
            assert lock.acquire(timeout=5)
            lock.release()
        with self.condition:
            self.condition.notify_all()
            self.condition.wait(0.001)
        self.event.set()
        self.event.wait(1)
        self.event.clear()
        with self.value.get_lock():
            self.value.value += 1

    def check(self):
        failed = []

        def use():
            for lock in [*self.locks, self.condition, self.value.get_lock()]:
                if not lock.acquire(timeout=1):
                    failed.append(lock)
                else:
                    lock.release()

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert not failed, f"{failed} were left locked"
        self.run()

    def drop(self):
        del self.locks, self.condition, self.event, self.value


class Barriers(Scenario):
    """An interrupted wait no longer counts, and does not break the barrier."""

    def make(self):
        self.barriers = [forkshm.Barrier(2), forkshm.Barrier(2, action=bool)]

    def run(self):
        for barrier in self.barriers:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(0.001)
            barrier.reset()

    def check(self):
        for barrier in self.barriers:
            same(barrier.n_waiting, 0)
            barrier.reset()
            places = []
            thread = threading.Thread(target=lambda barrier=barrier, places=places: places.append(barrier.wait(5)))
            thread.start()
            places.append(barrier.wait(5))
            thread.join()
            same(sorted(places), [0, 1])

    def drop(self):
        del self.barriers


class MakeLocks(Scenario):
    def run(self):
        lock = forkshm.Lock()
        with lock:
            pass
        queue = forkshm.Queue()
        queue.put(1)
        same(queue.get(), 1)
        queue.close()
        here, there = forkshm.Pipe()
        here.close()
        there.close()


class Team(Scenario):
    def make(self):
        self.array = forkshm.zeros(100)

    def run(self):
        self.array[:] = 0
        with forkshm.team(2) as team:
            for index in team.range(100):
                self.array[index] += 1
        assert (self.array == 1).all(), "the team left something out"

    def drop(self):
        del self.array


def fill(rank, array):
    """Run as a ranked worker."""
    array[rank] += 1


class Launch(Scenario):
    def make(self):
        self.array = forkshm.zeros(2)

    def run(self):
        self.array[:] = 0
        forkshm.launch(fill, (self.array,), workers=2)
        same(list(self.array), [1, 1])

    def drop(self):
        del self.array


class Supervise(Scenario):
    """Runs workers until one of them sends SIGTERM."""

    seconds = 40

    def make(self):
        self.started = forkshm.zeros(2)
        # For a signal that comes when an interrupted call has restored the handler.
        self.before = signal.signal(signal.SIGTERM, lambda *_: None)
        self.handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def run(self):
        started = self.started
        started[:] = 0

        def serve(me):
            started[me.rank] += 1
            if started.all():
                os.kill(os.getppid(), signal.SIGTERM)
            me.wait()

        forkshm.supervise(serve, workers=2)
        same(started.tolist(), [1, 1])

    def check(self):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        same((handlers, wakeup), (self.handlers, -1))
        self.run()

    def drop(self):
        signal.signal(signal.SIGTERM, self.before)
        del self.started


class SuperviseReplaces(Supervise):
    """Replaces a worker that has ended, and then all of them because of a SIGHUP."""

    def run(self):
        started = self.started
        started[:] = 0

        def serve(me):
            started[0] += 1
            if me.generation == 1:
                os.kill(os.getppid(), signal.SIGHUP)
            elif me.generation == 2:
                os.kill(os.getppid(), signal.SIGTERM)
            if me.generation:
                me.wait()

        forkshm.supervise(serve, workers=1)
        same(started[0], 3)


def triple(number):
    """Run on a node."""
    return number * 3


class Cluster(Scenario):
    """Calls on the nodes of a cluster."""

    seconds = 60
    is_checked_for_leaks = False  # the client of Dask has threads and sockets of its own

    def make(self):
        import cloudpickle
        import distributed

        # The nodes cannot import this module.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.cluster = distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, dashboard_address=None, silence_logs=50, memory_limit=None
        )
        self.open()

    def open(self):
        self.executor = forkshm.Executor(cluster=self.cluster)
        same(self.executor.submit(triple, 1).result(40), 3)

    def run(self):
        executor = self.executor
        same(executor.submit(triple, 5).result(30), 15)
        same(list(executor.map(triple, range(6), timeout=30)), [0, 3, 6, 9, 12, 15])
        self.array = np.full(200_000, 2.0)
        same(executor.submit(np.sum, self.array).result(30), 400_000.0)
        kept = executor.submit_remote(triple, 2)
        same(executor.submit(triple, kept).result(30), 18)
        waits = executor.submit(time.sleep, 60)
        assert waits.cancel()
        assert waits.cancelled()

    def check(self):
        self.run()
        deadline = time.monotonic() + 10
        while pending := [future for future in list(self.executor._pending) if not future.done()]:
            assert time.monotonic() < deadline, f"{pending} are pending forever"
            time.sleep(0.01)

    def drop(self):
        self.executor.shutdown()
        self.cluster.close()


class ClusterShutdown(Cluster):
    """An interrupted call of `shutdown` is repeated."""

    def run(self):
        self.future = self.executor.submit(triple, 4)
        self.executor.shutdown()
        same(self.future.result(30), 12)

    def check(self):
        with contextlib.suppress(RuntimeError):  # it was closed
            self.future = self.executor.submit(triple, 4)
        self.executor.shutdown()
        same(self.future.result(30), 12)
        self.open()


class _Manager(SyncManager):
    pass


# An interrupted call may leave garbage in the manager's process.
_Manager.register("collect", gc.collect)


class Proxies(Scenario):
    """Calls of a manager's objects, over one connection."""

    def make(self):
        self.manager = _Manager()
        self.manager.start()
        self.given = self.manager.dict()

    def run(self):
        self.given["a"] = np.full(5000, 3.0)
        same(float(self.given["a"].sum()), 15_000.0)
        there = self.manager.list([1, 2])
        there.append(3)
        same(list(there), [1, 2, 3])

    def check(self):
        super().check()
        self.manager.collect()

    def drop(self):
        del self.given
        self.manager.shutdown()
        del self.manager


class StartTerminate(Scenario):
    def run(self):
        with forkshm.Pool(2) as pool:
            numbers = self.new(2)
            same(pool.map(work, numbers), [3 * number for number in numbers])


class StartClose(Scenario):
    def run(self):
        pool = forkshm.Pool(2)
        numbers = self.new(2)
        result = pool.map_async(work, numbers)
        pool.close()
        pool.join()
        same(result.get(), [3 * number for number in numbers])


class Close(Scenario):
    """Interrupted calls of `close` and `join` are repeated."""

    def make(self):
        self.pool = forkshm.Pool(2)
        self.result = self.pool.map_async(work, self.new(2))

    def run(self):
        self.pool.close()
        self.pool.join()

    def check(self):
        self.pool.close()
        self.pool.join()
        same(len(self.result.get(5)), 2)
        self.drop()
        self.make()

    def drop(self):
        self.pool.terminate()
        self.pool.join()
        del self.pool, self.result


class Terminate(Scenario):
    """An interrupted call of `terminate` is repeated."""

    def make(self):
        self.pool = forkshm.Pool(2)
        self.result = self.pool.map_async(work, self.new(2))

    def run(self):
        self.pool.terminate()
        self.pool.join()

    def check(self):
        self.pool.terminate()
        self.pool.join()
        try:
            self.result.get(5)
        except forkshm.PoolClosedError:
            pass
        self.make()

    def drop(self):
        self.pool.terminate()
        self.pool.join()
        del self.pool, self.result


class Shutdown(Scenario):
    def make(self):
        self.executor = forkshm.Executor(2)
        self.future = self.executor.submit(work, *self.new(1))

    def run(self):
        self.executor.shutdown()

    def check(self):
        self.executor.shutdown()
        same(self.future.result(5) % 3, 0)
        self.make()

    def drop(self):
        self.executor.shutdown()
        del self.executor, self.future


class Fork(Scenario):
    """A process that has received arrays forks: neither process sees the other's writes."""

    def make(self):
        self.here, self.there = forkshm.Pipe()

    def run(self):
        self.here.send(np.full(20_000, 7.0))
        array = self.there.recv()
        self.fork(array)

    def fork(self, array):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                array[0] += 1
                code = 0 if array[0] == 8 else 2
                here, there = forkshm.Pipe()
                here.send(np.full(20_000, 9.0))
                if there.recv()[0] != 9.0:
                    code = 3
            finally:
                os._exit(code)
        try:
            array[1] += 1
        finally:
            status = os.waitpid(pid, 0)[1]
        same(os.waitstatus_to_exitcode(status), 0)
        assert array[0] == 7.0, "a child's write was seen"

    def check(self):
        while self.there.poll():
            self.there.recv()
        self.run()

    def drop(self):
        self.here.close()
        self.there.close()
        del self.here, self.there


class Processes(Scenario):
    """A process with a queue and an array."""

    process = None

    def make(self):
        self.queue = forkshm.SimpleQueue()

    def run(self):
        self.process = process = forkshm.Process(target=_put, args=(self.queue, np.full(20_000, 3.0)))
        process.start()
        try:
            got = self.queue.get()
        finally:
            process.join()
        assert (got == 6.0).all()
        same(process.exitcode, 0)
        process.close()
        self.process = None

    def check(self):
        process, self.process = self.process, None
        # Its `join` or its `close` was interrupted.
        if process is not None and process._popen is not None:
            process.join()
            same(process.exitcode, 0)
            process.close()
        del process
        while not self.queue.empty():
            self.queue.get()
        self.run()

    def drop(self):
        self.queue.close()
        del self.queue


def _put(queue, array):
    queue.put(array * 2)


# All scenarios, by name.
SCENARIOS = {
    kind.__name__: kind
    for kind in list(globals().values())
    if isinstance(kind, type)
    and issubclass(kind, Scenario)
    and kind is not Scenario
    and not kind.__name__.startswith("_")
}
if importlib.util.find_spec("distributed") is None:
    del SCENARIOS["Cluster"], SCENARIOS["ClusterShutdown"]
if IS_FREE_THREADED:
    del SCENARIOS["BornShared"]  # the hook into the allocations of NumPy needs the GIL

assert check_leaks  # used by those who run these
