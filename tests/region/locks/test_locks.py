"""Locks in a region: between threads, forked children and unrelated processes, and after each kind of death."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from forkshm import MappedRegion, NotPicklableError, SharedMemoryObject, anonymous_shared_memory
from forkshm.backend import locks
from forkshm.errors import (
    DeadlockError,
    LockTimeoutError,
    NotConstructedError,
    NotOwnerError,
    NotRecoverableError,
    RegionAccessError,
    RegionBusyError,
    RegionClosedError,
    SyncError,
)
from forkshm.region.locks import Barrier, Condition, Mutex, RecursiveMutex, RWLock, Semaphore, _placed, _rwlock
from forkshm.region.locks._placed import HEADER

pytestmark = pytest.mark.skipif(bool(locks.locks_missing), reason=f"this system has no {locks.locks_missing}")

MUTEXES = [Mutex, RecursiveMutex]
# How to create one of each kind at an offset.
KINDS = {
    Mutex: Mutex,
    RecursiveMutex: RecursiveMutex,
    Semaphore: Semaphore,
    RWLock: RWLock,
    Barrier: Barrier,
    Condition: lambda region, offset=0: Condition(region, offset, Mutex(region, 2048)),
}
ATTACH = {kind: kind.attach for kind in KINDS}
ATTACH[Condition] = lambda region, offset=0: Condition.attach(region, offset, Mutex(region, 2048))


@pytest.fixture
def region():
    """Provide a page for the lock, and one for the data it guards."""
    made = anonymous_shared_memory(8192)
    yield made
    # Locks that this thread still held would stay in the C library's list, which must not lead to unmapped memory.
    left = [address for address in _placed.held if locks.mutex_unlock(address) == 0]
    left += _rwlock._holds.by_address
    _placed.held.clear()  # entries of threads that have ended
    _rwlock._holds.by_address.clear()
    # pytest keeps the values of fixtures, and the traceback of a failed test keeps its objects.
    for found in gc.get_objects():
        if isinstance(found, _placed.Placed) and getattr(found, "_region", None) is made:
            found.detach()
    gc.collect()
    with contextlib.suppress(RegionBusyError):
        made.close()
    assert not left, "the test has not released what it acquired"


@pytest.fixture
def cell(region):
    """Return words of 8 bytes in the second page."""
    with region.buf[4096:].cast("q") as words:
        yield words


@pytest.fixture(params=MUTEXES)
def mutex(request, region):
    """Provide a mutex of each kind."""
    return request.param(region)


@pytest.fixture
def fork():
    """Fork a child that runs a callable; every child must end with exit code 0."""
    pids = []

    def start(action, *args):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                action(*args)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
        return pid

    def join():
        while pids:
            assert os.waitstatus_to_exitcode(os.waitpid(pids.pop(), 0)[1]) == 0

    start.join = join
    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def thread():
    """Run a callable in a thread, and return its result."""

    def run(action, *args):
        answer = []
        worker = threading.Thread(target=lambda: answer.append(action(*args)))
        worker.start()
        worker.join()
        return answer[0]

    return run


@pytest.fixture
def named(request):
    """Provide a named object of 8192 bytes, and its name."""
    name = f"forkshm-test-{os.getpid()}-{time.monotonic_ns()}"
    with SharedMemoryObject("create_only", name) as shm:
        shm.truncate(8192)
        yield shm
    SharedMemoryObject.remove(name)


def killed(action):
    """Run a callable in a child, which then kills itself."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def let_others_run():
    """Sleep at a bad moment, on purpose."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def count_up(cell, turns, enter):
    for _ in range(turns):
        with enter():
            value = cell[0]
            if value % 16 == 0:
                let_others_run()
            cell[0] = value + 1


def parked(pid):
    """Return whether a process sleeps in the kernel."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


# -- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_fits_exactly_at_the_end_of_a_region(region, kind):
    lock = KINDS[kind](region, region.size - kind.SIZE)
    assert f"offset {region.size - kind.SIZE:,}" in repr(lock)
    last = region.size - kind.SIZE + 64
    with pytest.raises(ValueError, match=f"takes {kind.SIZE:,} bytes, which do not fit at offset {last:,}"):
        KINDS[kind](region, last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [-64, 8192, 1 << 70])
def test_an_offset_outside_is_refused(region, kind, offset):
    for make in (KINDS[kind], ATTACH[kind]):
        with pytest.raises(ValueError, match=f"do not fit at offset {offset:,} into a region of 8,192 bytes"):
            make(region, offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1, 4, 63, 65])
def test_an_unaligned_offset_is_refused(region, kind, offset):
    with pytest.raises(ValueError, match=f"multiple of 64 bytes: offset {offset} is at address 0x"):
        KINDS[kind](region, offset)


def test_the_address_must_be_aligned(named):
    shifted = MappedRegion(named, offset=16)
    with pytest.raises(ValueError, match="multiple of 64"):
        Mutex(shifted)
    Mutex(shifted, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_that_are_no_integers_are_refused(region, kind):
    with pytest.raises(TypeError):
        KINDS[kind](region, 1.5)


@pytest.mark.parametrize("mode", ["read_only", "copy_on_write", "read_private"])
@pytest.mark.parametrize("kind", KINDS)
def test_locks_need_read_write_memory(named, kind, mode):
    with pytest.raises(RegionAccessError, match=f"is mapped {mode}: map it read_write"):
        kind(MappedRegion(named, mode), *((0, None) if kind is Condition else ()))


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_to_zeros_is_refused(region, kind):
    with pytest.raises(NotConstructedError, match=f"cannot attach a {kind.__name__} at offset 128 .*: there is none"):
        ATTACH[kind](region, 128)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_attaching_to_another_kind_is_refused_and_named(region, kind, other):
    lock = KINDS[other](region)
    if kind is other:
        assert type(ATTACH[kind](region)) is type(lock)
        return
    with pytest.raises(NotConstructedError, match=f"there is a {other.__name__}"):
        ATTACH[kind](region)


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_to_an_incomplete_lock_is_refused(region, kind, monkeypatch):
    def killed_here(*args):
        raise KeyboardInterrupt

    KINDS[kind](region)
    monkeypatch.setattr(kind, "_complete", killed_here)
    with pytest.raises(KeyboardInterrupt):
        KINDS[kind](region) if kind is not Condition else Condition(region, 0, None)
    monkeypatch.undo()
    with pytest.raises(NotConstructedError, match="there is none"):
        ATTACH[kind](region)


def test_attaching_with_another_c_library_is_refused(region, monkeypatch):
    Mutex(region)
    monkeypatch.setattr(locks, "LOCK_LAYOUT", 0x204)
    with pytest.raises(NotConstructedError, match="a different C library or word size"):
        Mutex.attach(region)


def test_a_lock_of_random_bytes_is_refused(region):
    region.buf[:4096] = bytes(range(256)) * 16
    for kind in KINDS:
        with pytest.raises(NotConstructedError):
            ATTACH[kind](region)


def test_a_lock_that_this_process_holds_is_not_overwritten(region):
    mutex = Mutex(region, 128)
    with mutex, pytest.raises(SyncError, match="this process holds a lock at that offset"):
        Semaphore(region, 128)
    Semaphore(region, 128)


def test_constructing_anew_forgets_the_past(region):
    mutex = Mutex(region)
    killed(mutex.acquire)
    with mutex:
        assert mutex.owner_died
    with pytest.raises(NotRecoverableError):
        mutex.acquire()
    with Mutex(region) as fresh:
        assert not fresh.owner_died


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_with_a_lock_object_is_busy_until_that_is_detached(kind):
    region = anonymous_shared_memory(4096)
    lock = KINDS[kind](region)
    with pytest.raises(RegionBusyError):
        region.close()
    lock.detach()
    lock.detach()
    if kind is Condition:
        lock.mutex.detach()
    region.close()
    assert "detached" in repr(lock)
    use = {RWLock: "acquire_read", Barrier: "wait", Condition: "wait"}.get(kind, "acquire")
    with pytest.raises(RegionClosedError, match="it was detached in this process"):
        getattr(lock, use)()
    with pytest.raises(RegionClosedError):
        KINDS[kind](region)


def test_a_lock_keeps_its_memory(cell):
    mutex = Mutex(anonymous_shared_memory(4096))
    with mutex:
        pass


def test_a_mutex_that_is_held_stays_mapped_without_its_object(wait_until):
    region = anonymous_shared_memory(4096)
    address = region.address
    mutex = Mutex(region)
    mutex.acquire()
    mutex.detach()
    del mutex
    with pytest.raises(RegionBusyError):
        region.close()
    again = Mutex.attach(region)
    assert region.address == address
    again.release()
    again.detach()
    region.close()
    assert not _placed.held


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_lock_that_is_held_stays_mapped_without_its_object(how):
    region = anonymous_shared_memory(4096)
    lock = RWLock(region)
    getattr(lock, f"acquire_{how}")()
    lock.detach()
    del lock
    with pytest.raises(RegionBusyError):
        region.close()
    again = RWLock.attach(region)
    again.release()
    assert again.acquire_write(0)
    again.release()
    again.detach()
    region.close()
    assert not _placed.held


def test_a_plain_pickle_is_refused(mutex):
    with pytest.raises(NotPicklableError):
        pickle.dumps(mutex)


def add_under(mutex, cell_of):
    for _ in range(200):
        with mutex:
            cell = cell_of.buf[4096:4104].cast("q")
            cell[0] += 1
    return type(mutex).__name__


@pytest.mark.parametrize("kind", MUTEXES)
def test_workers_of_a_pool_take_a_lock_as_an_argument(pool, kind):
    region = anonymous_shared_memory(8192)
    mutex = kind(region)
    assert pool.starmap(add_under, [(mutex, region)] * 4) == [kind.__name__] * 4
    assert region.buf[4096:4104].cast("q")[0] == 800


@pytest.mark.parametrize(
    ("ctype", "header", "room"),
    [
        ("pthread_mutex_t", "pthread.h", locks.MUTEX_SIZE),
        ("sem_t", "semaphore.h", locks.SEMAPHORE_SIZE),
        ("pthread_mutexattr_t", "pthread.h", 64),
    ],
)
def test_the_reserved_sizes_fit_the_c_library(tmp_path, ctype, header, room):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "size.c"
    source.write_text(
        f"#include <{header}>\n#include <stdio.h>\n"
        f'int main(void) {{ printf("%zu %zu", sizeof({ctype}), _Alignof({ctype})); }}\n'
    )
    subprocess.run([compiler, "-o", tmp_path / "size", source], check=True)
    size, alignment = map(int, subprocess.check_output([tmp_path / "size"]).split())
    assert 0 < size <= room <= Mutex.SIZE - HEADER
    assert Mutex.ALIGNMENT % alignment == 0


@pytest.mark.parametrize(
    ("name", "value"), [("PTHREAD_PROCESS_SHARED", 1), ("PTHREAD_MUTEX_ROBUST", 1), ("PTHREAD_MUTEX_ERRORCHECK", 2)]
)
def test_the_constants_match_the_c_headers(tmp_path, name, value):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "constant.c"
    source.write_text(f'#include <pthread.h>\n_Static_assert({name} == {value}, "");\nint main(void) {{ return 0; }}\n')
    subprocess.run([compiler, "-o", tmp_path / "constant", source], check=True)


# -- mutex ------------------------------------------------------------------------------------


def test_a_mutex_is_acquired_and_released(mutex):
    assert mutex.acquire() is True
    mutex.release()
    assert mutex.acquire(timeout=0) is True
    mutex.release()
    with mutex as entered:
        assert entered is mutex
        assert not mutex.owner_died
    assert not _placed.held


@pytest.mark.parametrize("timeout", [-1, -0.001, float("-inf"), float("nan"), True, False, "1"])
def test_timeouts_before_now_are_refused_and_nothing_is_held(region, mutex, timeout, thread):
    kind = ValueError if type(timeout) in (int, float) else TypeError  # True would be *blocking* in threading
    semaphore, lock, barrier = Semaphore(region, 256), RWLock(region, 2048), Barrier(region, 512)
    calls = [mutex.acquire, semaphore.acquire, lock.acquire_read, lock.acquire_write, barrier.wait]
    with mutex:
        condition = Condition(region, 1024, mutex)
        for call in (condition.wait, lambda timeout: condition.wait_for(bool, timeout)):
            with pytest.raises(kind, match="timeout must be None"):
                call(timeout)
    for call in calls:
        with pytest.raises(kind, match="timeout must be None"):
            call(timeout)
    assert thread(mutex.acquire, 0)
    assert semaphore.value == 1
    assert thread(lock.acquire_write, 0)


def test_releasing_an_unheld_lock_is_an_error(mutex):
    with pytest.raises(NotOwnerError, match="does not hold it, no thread does"):
        mutex.release()


def test_releasing_a_lock_of_another_thread_is_an_error(mutex, thread):
    def release():
        with pytest.raises(NotOwnerError, match=f"thread {threading.main_thread().native_id} does"):
            mutex.release()
        with pytest.raises(NotOwnerError):
            mutex.make_consistent()
        return mutex.acquire(timeout=0)

    with mutex:
        assert thread(release) is False


def test_a_forked_child_does_not_hold_its_parents_locks(mutex, in_child):
    def child():
        assert not _placed.held
        with pytest.raises(NotOwnerError):
            mutex.release()
        assert mutex.acquire(timeout=0) is False

    with mutex:
        assert in_child(child) == 0
    assert mutex.acquire(timeout=0)
    mutex.release()


def test_acquiring_twice_is_an_error_and_leaves_the_mutex_held(region, thread):
    mutex = Mutex(region)
    with mutex:
        for timeout in (None, 0, 1):
            with pytest.raises(DeadlockError, match=r"this thread already holds it\. Use a RecursiveMutex"):
                mutex.acquire(timeout)
        with pytest.raises(DeadlockError), mutex:
            pass
        assert thread(mutex.acquire, 0) is False
    with pytest.raises(NotOwnerError):
        mutex.release()


def test_a_recursive_mutex_is_free_after_as_many_releases(region, thread):
    mutex = RecursiveMutex(region)
    for _ in range(3):
        assert mutex.acquire()
    with mutex:
        assert mutex.acquire(timeout=0)
    for _ in range(4):
        assert thread(mutex.acquire, 0) is False
        mutex.release()
    with pytest.raises(NotOwnerError):
        mutex.release()
    assert thread(mutex.acquire, 0) is True


@pytest.mark.parametrize("timeout", [0, 0.01, 0.15])
def test_an_acquire_gives_up_after_its_timeout_and_not_before(mutex, child_that_holds, timeout):
    child_that_holds(mutex.acquire)
    start = time.perf_counter()
    assert mutex.acquire(timeout=timeout) is False
    assert time.perf_counter() - start >= timeout
    with pytest.raises(NotOwnerError):
        mutex.release()


def test_one_process_at_a_time(mutex, cell, fork):
    for _ in range(4):
        fork(count_up, cell, 1000, lambda: mutex)
    fork.join()
    assert cell[0] == 4000


def test_one_thread_at_a_time(mutex, cell):
    threads = [threading.Thread(target=count_up, args=(cell, 500, lambda: mutex)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert cell[0] == 2000


def test_one_of_threads_and_processes_at_a_time(mutex, cell, fork):
    for _ in range(2):
        fork(count_up, cell, 500, lambda: mutex)
    threads = [threading.Thread(target=count_up, args=(cell, 500, lambda: mutex)) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    fork.join()
    assert cell[0] == 2000


STRANGER = """
import sys
from forkshm import MappedRegion, SharedMemoryObject
from forkshm.region.locks import Mutex, Semaphore, RWLock, Barrier, Condition
region = MappedRegion(SharedMemoryObject("open_only", sys.argv[1]))
cell = region.buf[4096:].cast("q")
mutex = Mutex.attach(region)
barrier = Barrier.attach(region, 256)
lock = RWLock.attach(region, 1024)
condition = Condition.attach(region, 512, mutex)
semaphore = Semaphore.attach(region, 768)
barrier.wait(30)
for _ in range(500):
    with mutex:
        cell[0] += 1
    with lock.write():
        cell[1] += 1
    with semaphore:
        cell[2] += 1
with condition:
    cell[3] += 1
    condition.notify_all()
"""


def test_unrelated_processes_use_all_locks_by_name(named):
    region = MappedRegion(named)
    cell = region.buf[4096:].cast("q")
    mutex = Mutex(region)
    condition = Condition(region, 512, mutex)
    Barrier(region, 256, parties=2)
    RWLock(region, 1024)
    Semaphore(region, 768)
    strangers = [subprocess.Popen([sys.executable, "-c", STRANGER, named.name]) for _ in range(2)]
    with condition:
        assert condition.wait_for(lambda: cell[3] == 2, timeout=60)
    assert [stranger.wait() for stranger in strangers] == [0, 0]
    assert list(cell[:4]) == [1000, 1000, 1000, 2]


def test_two_mappings_of_one_object_are_one_mutex(named, thread):
    one, two = MappedRegion(named), MappedRegion(named)
    assert one.address != two.address
    here, there = Mutex(one, 64), Mutex.attach(two, 64)
    cell, other_cell = one.buf[4096:].cast("q"), two.buf[4096:].cast("q")
    with here:
        assert thread(there.acquire, 0) is False
        with pytest.raises(DeadlockError):
            there.acquire()
    threads = [
        threading.Thread(target=count_up, args=(words, 500, lambda mutex=mutex: mutex))
        for mutex, words in ((here, cell), (there, other_cell))
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert cell[0] == 1000
    # A thread may hold several mutexes at once, and release them in any order and through any mapping.
    more = [Mutex(one, 64 + 128 * index) for index in range(1, 5)]
    again = [Mutex.attach(two, 64 + 128 * index) for index in range(1, 5)]
    for mutex in (*more[:2], *again[2:]):
        mutex.acquire()
    for mutex in (again[1], more[3], more[0], again[2]):
        mutex.release()
    for mutex in again:
        assert mutex.acquire(timeout=0)
        mutex.release()
    for mutex in more:
        assert mutex.acquire(timeout=0)
        mutex.release()
    assert not _placed.held


def test_the_death_of_a_holder_is_told_and_can_be_repaired(mutex, cell, child_that_holds, thread):
    pid = child_that_holds(lambda: (mutex.acquire(), cell.__setitem__(0, -1)))
    assert mutex.acquire(timeout=0) is False
    child_that_holds.end(pid)
    assert mutex.acquire() is True
    assert mutex.owner_died
    assert thread(lambda: mutex.owner_died)
    cell[0] = 0
    mutex.make_consistent()
    assert not mutex.owner_died
    mutex.release()
    for _ in range(2):
        with mutex:
            assert not mutex.owner_died


def test_a_waiter_gets_the_lock_of_a_killed_holder(mutex, child_that_holds, fork, wait_until):
    def wait():
        assert mutex.acquire()
        assert mutex.owner_died
        mutex.make_consistent()
        mutex.release()

    holder = child_that_holds(mutex.acquire)
    waiter = fork(wait)
    wait_until(lambda: parked(waiter))
    child_that_holds.end(holder)
    fork.join()
    with mutex:
        assert not mutex.owner_died


def test_a_thread_that_ends_is_as_dead_as_a_process(mutex, thread):
    thread(mutex.acquire)
    with mutex:
        assert mutex.owner_died
        mutex.make_consistent()
    with mutex:
        assert not mutex.owner_died


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT], ids=lambda number: number.name)
def test_any_death_is_told(mutex, number, tmp_path):
    pid = os.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(number, signal.SIG_DFL)
        mutex.acquire()
        os.kill(os.getpid(), number)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
    with mutex:
        assert mutex.owner_died
        mutex.make_consistent()


def test_even_an_orderly_end_is_told(mutex, in_child):
    assert in_child(lambda: mutex.acquire() and 0) == 0
    with mutex:
        assert mutex.owner_died
        mutex.make_consistent()


def test_a_mutex_released_without_repair_is_unusable_and_blocks_no_process(mutex, child_that_holds, fork, wait_until):
    def refused():
        with pytest.raises(NotRecoverableError):
            mutex.acquire()

    killed(mutex.acquire)
    assert mutex.acquire()
    waiters = [fork(refused) for _ in range(3)]
    for waiter in waiters:
        wait_until(lambda waiter=waiter: parked(waiter))
    mutex.release()
    fork.join()
    for timeout in (None, 0, 5):
        with pytest.raises(NotRecoverableError, match="in an unknown state"):
            mutex.acquire(timeout)
    with pytest.raises(NotRecoverableError), mutex:
        pass
    assert mutex.owner_died
    assert not _placed.held


def test_death_upon_death_is_told_again(mutex):
    killed(mutex.acquire)
    killed(mutex.acquire)
    killed(lambda: (mutex.acquire(), mutex.make_consistent()))
    with mutex:
        assert mutex.owner_died
        mutex.make_consistent()
    with mutex:
        assert not mutex.owner_died


@pytest.mark.parametrize("kind", MUTEXES)
def test_repair_is_called_once_with_the_mutex_held(region, kind, thread):
    repaired = []
    kind(region)
    mutex = kind.attach(region, repair=lambda: repaired.append(thread(kind.attach(region).acquire, 0)))
    with mutex:
        pass
    killed(mutex.acquire)
    with mutex:
        assert repaired == [False]
        assert not mutex.owner_died
    assert mutex.acquire(timeout=1)
    assert repaired == [False]
    mutex.release()


def test_a_failed_repair_is_left_to_the_next_holder(region):
    def fail():
        raise ZeroDivisionError

    mutex = Mutex(region, 0, fail)
    killed(mutex.acquire)
    with pytest.raises(ZeroDivisionError):
        mutex.acquire()
    assert not _placed.held
    other = Mutex.attach(region)
    with other:
        assert other.owner_died
        other.make_consistent()
    with mutex:
        pass


def test_a_recursive_mutex_of_the_dead_is_held_once(region, thread):
    mutex = RecursiveMutex(region)
    killed(lambda: [mutex.acquire() for _ in range(5)])
    mutex.acquire()
    mutex.make_consistent()
    mutex.release()
    assert thread(mutex.acquire, 0)


def test_make_consistent_of_a_consistent_mutex_changes_nothing(mutex):
    with pytest.raises(NotOwnerError):
        mutex.make_consistent()
    with mutex:
        mutex.make_consistent()
    with mutex:
        pass


def test_a_killed_waiter_leaves_the_others_alone(mutex, fork, wait_until, child_that_holds):
    def wait():
        with mutex:
            assert not mutex.owner_died

    with mutex:
        for _ in range(3):
            victim = os.fork()
            if victim == 0:
                mutex.acquire()
                os._exit(1)
            wait_until(lambda victim=victim: parked(victim))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
        fork(wait)
        fork(wait)
    fork.join()
    wait()


@pytest.mark.slow
def test_random_deaths_never_stop_the_others(mutex, cell, wait_until):
    """Processes that count under the mutex are killed continuously; the surviving one always continues."""

    def work():
        while True:
            with mutex:
                if mutex.owner_died:
                    mutex.make_consistent()
                cell[0] += 1

    pids = collections.deque()
    try:
        for _ in range(30):
            while len(pids) < 3:
                pid = os.fork()
                if pid == 0:
                    try:
                        work()
                    finally:
                        os._exit(1)
                pids.append(pid)
            before = cell[0]
            wait_until(lambda before=before: cell[0] > before + 50)
            os.kill(pids[0], signal.SIGKILL)
            os.waitpid(pids.popleft(), 0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert mutex.acquire(timeout=10)
    mutex.release()


INTERRUPTED = """
import _thread, os, signal, sys, threading, time
from forkshm import anonymous_shared_memory
from forkshm.region.locks import *
region = anonymous_shared_memory(8192)
mutex = Mutex(region)
semaphore = Semaphore(region, 256, value=0)
lock = RWLock(region, 1024)
barrier = Barrier(region, 512, parties=2)
other = Mutex(region, 768)
condition = Condition(region, 4096, other)
waits = {
    "mutex": mutex.acquire, "with": mutex.__enter__, "semaphore": semaphore.acquire, "read": lock.acquire_read,
    "write": lock.acquire_write, "barrier": barrier.wait, "condition": condition.wait,
}
go, done = threading.Event(), threading.Event()
def hold():
    with mutex, lock.write():
        go.set()
        done.wait()
holder = threading.Thread(target=hold)
holder.start()
go.wait()
what = sys.argv[1]
if what == "condition":
    other.acquire()
def interrupt():
    parent = os.getppid()
    while True:
        with open(f"/proc/{parent}/task/{parent}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "S":
                break
    os.kill(parent, signal.SIGINT)
pid = 0
if not hasattr(os, "fork"):  # a thread has to do: when the other one waits for a while, it does so in the kernel
    threading.Timer(0.5, _thread.interrupt_main).start()
elif not (pid := os.fork()):
    interrupt()
    os._exit(0)
try:
    waits[what]()
except KeyboardInterrupt:
    print("interrupted")
if pid:
    os.waitpid(pid, 0)
if what == "condition":
    other.release()
done.set()
holder.join()
assert mutex.acquire(0) and not mutex.owner_died
mutex.release()
assert lock.acquire_write(0)
lock.release()
assert semaphore.value == 0 and barrier.n_waiting == 0 and not barrier.broken
assert other.acquire(0)
with condition:
    assert condition._words[3] == 0
"""


@pytest.mark.parametrize("what", ["mutex", "with", "semaphore", "read", "write", "barrier", "condition"])
def test_a_keyboard_interrupt_during_a_wait_leaves_the_lock_unchanged(run_script, what):
    script = INTERRUPTED.replace("assert other.acquire(0)\n", "assert other.acquire(0); other.release()\n")
    assert run_script(script, what, timeout=30) == "interrupted\n"


STORM = """
import _thread, itertools, os, signal, sys, threading, time
from forkshm import anonymous_shared_memory
from forkshm.region.locks import _placed
from forkshm.region.locks import *
region = anonymous_shared_memory(8192)
locks = {
    "mutex": Mutex(region),
    "recursive": RecursiveMutex(region, 128),
    "semaphore": Semaphore(region, 256),
}
rwlock = RWLock(region, 1024)
enter = {
    **{name: (lock.acquire, lock.release) for name, lock in locks.items()},
    "read": (rwlock.acquire_read, rwlock.release),
    "write": (rwlock.acquire_write, rwlock.release),
}
take, give = enter[sys.argv[1]]
class Stop(Exception): pass
armed = False
def handler(*_):
    global armed
    if armed:
        armed = False
        raise Stop
if not hasattr(signal, "setitimer"):  # no timers: a thread strikes all the time
    signal.signal(signal.SIGINT, handler)
    sys.setswitchinterval(1e-6)
    def strike():
        for turn in itertools.count():
            _thread.interrupt_main()
            until = time.perf_counter() + 1e-6 * (1 + turn % 60)
            while time.perf_counter() < until:
                time.sleep(0)
    threading.Thread(target=strike, daemon=True).start()
    def set_timer(seconds): pass
else:
    signal.signal(signal.SIGALRM, handler)
    def set_timer(seconds): signal.setitimer(signal.ITIMER_REAL, seconds)
stopped = taken = 0
deadline = time.monotonic() + 1.0
while time.monotonic() < deadline or not stopped:
    got = []
    set_timer(1e-6 * (1 + (stopped + taken) % 60))
    try:
        armed = True
        # Called and stored in one go: before 3.11 a signal may come between a call and the store.
        got[:] = map(take, (1,))
        armed = False
    except Stop:
        armed = False
        stopped += 1
        # Either it was interrupted before the caller had it, or between the call and the name.
        continue
    set_timer(0)
    assert got == [True]
    give()
    taken += 1
print("stopped", stopped, "taken", taken, file=sys.stderr)
lost = sys.argv[1] == "semaphore" and locks["semaphore"].value != 1
assert not lost, locks["semaphore"].value
assert not _placed.held, _placed.held
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["mutex", "recursive", "semaphore", "read", "write"])
def test_an_interruption_at_any_moment_undoes_the_call(run_script, what):
    assert run_script(STORM, what) == ""


# -- condition --------------------------------------------------------------------------------


@pytest.fixture(params=MUTEXES)
def condition(request, region):
    """Provide a condition with a mutex of each kind."""
    return Condition(region, 512, request.param(region))


def test_a_condition_needs_its_mutex_held(condition):
    for call in (condition.wait, condition.notify, condition.notify_all, lambda: condition.wait_for(bool)):
        with pytest.raises(NotOwnerError, match="this thread"):
            call()
    with condition, pytest.raises(ValueError, match="n must be 0 or more, got -1"):
        condition.notify(-1)


def test_a_wait_gives_up_after_its_timeout_with_the_mutex_held(condition, thread):
    for timeout in (0, 0.01, 0.15):
        with condition:
            start = time.perf_counter()
            assert condition.wait(timeout) is False
            assert time.perf_counter() - start >= timeout
            assert thread(condition.acquire, 0) is False
    assert condition.acquire(0)
    condition.release()


def test_a_notification_before_the_wait_is_not_kept(condition):
    with condition:
        condition.notify()
        condition.notify_all()
        assert condition.wait(0.01) is False


def test_a_wait_gives_up_every_level_of_a_recursive_mutex(region, fork):
    condition = Condition(region, 512, RecursiveMutex(region))

    def tell():
        with condition:
            condition.notify()

    with condition, condition:
        fork(tell)
        assert condition.wait(30) is True
        assert condition.mutex._count() == 2
    fork.join()


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6, 100])
def test_notify_lets_exactly_as_many_go(condition, cell, fork, wait_until, n):
    def wait():
        with condition:
            cell[1] += 1
            assert condition.wait(60)
            cell[2] += 1

    def look(index):
        with condition:
            return cell[index]

    for _ in range(5):
        fork(wait)
    wait_until(lambda: look(1) == 5)
    with condition:
        condition.notify(n)
    wait_until(lambda: look(2) == min(n, 5))
    time.sleep(0.25)  # every remaining waiter looks twice
    assert look(2) == min(n, 5)
    with condition:
        condition.notify_all()
    fork.join()
    assert look(2) == 5


def test_two_notifications_let_two_go(condition, cell, fork, wait_until):
    def wait():
        with condition:
            cell[1] += 1
            assert condition.wait(60)

    for _ in range(2):
        fork(wait)
    wait_until(lambda: condition.acquire() and (cell[1], condition.release())[0] == 2)
    with condition:
        condition.notify()
        condition.notify()
    fork.join()


def test_a_thousand_items_go_from_producers_to_consumers(condition, cell, fork):
    # cell: 0 items available, 1 produced, 2 consumed, 3 sum of the consumed items
    def produce():
        for _ in range(500):
            with condition:
                assert condition.wait_for(lambda: cell[0] < 4, 60)
                cell[1] += 1
                cell[0] += 1
                condition.notify_all()

    def consume():
        while True:
            with condition:
                assert condition.wait_for(lambda: cell[0] > 0 or cell[2] == 1000, 60)
                if cell[2] == 1000:
                    return
                cell[0] -= 1
                cell[2] += 1
                cell[3] += cell[2]
                condition.notify_all()

    for action in (produce, consume, produce, consume):
        fork(action)
    fork.join()
    assert list(cell[:4]) == [0, 1000, 1000, 500500]


def test_wait_for_returns_the_last_result_of_the_predicate(condition):
    with condition:
        assert condition.wait_for(lambda: 7) is True
        start = time.perf_counter()
        assert condition.wait_for(lambda: 0, timeout=0.05) is False
        assert time.perf_counter() - start >= 0.05


@pytest.mark.parametrize("n", [1, 2, 100])
def test_killed_waiters_take_no_notification_along(condition, cell, fork, wait_until, n):
    def wait():
        with condition:
            cell[1] += 1
            assert condition.wait(60)

    def waiting():
        with condition:
            return cell[1]

    victims = []
    for _ in range(2):
        victims.append(pid := os.fork())
        if pid == 0:
            try:
                wait()
            finally:
                os._exit(1)
    wait_until(lambda: waiting() == 2)
    wait_until(lambda: all(map(parked, victims)))
    fork(wait)
    wait_until(lambda: waiting() == 3)
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)  # so that the kernel's wakeup goes to them
    with condition:
        condition.notify(n)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    fork.join()
    with condition:
        condition.notify_all()
        assert condition.wait(0.01) is False


def test_a_condition_waiter_gets_the_mutex_of_a_dead_holder(condition, cell, fork, wait_until):
    def wait():
        with condition:
            cell[1] = 1
            assert condition.wait(60)
            assert condition.mutex.owner_died
            condition.mutex.make_consistent()

    fork(wait)
    wait_until(lambda: condition.acquire() and (cell[1], condition.release())[0] == 1)
    killed(lambda: (condition.acquire(), condition.notify()))
    fork.join()


def test_the_sequence_starts_again_at_its_end(condition, cell, fork, wait_until):
    with condition:
        condition._words[2] = condition._words[5] = 0xFFFFFFFF

    def wait():
        with condition:
            cell[1] += 1
            assert condition.wait(60)

    def waiting():
        with condition:
            return cell[1]

    for turn in range(3):
        fork(wait)
        wait_until(lambda turn=turn: waiting() == turn + 1)
        with condition:
            condition.notify()
        fork.join()
    assert condition._words[2] == 2


# -- semaphore --------------------------------------------------------------------------------


def test_a_semaphore_counts(region):
    semaphore = Semaphore(region, value=2)
    assert (semaphore.acquire(), semaphore.acquire(timeout=0), semaphore.acquire(timeout=0)) == (True, True, False)
    semaphore.release(3)
    assert semaphore.value == 3
    with semaphore as entered:
        assert (entered, semaphore.value) == (semaphore, 2)
    assert Semaphore.attach(region).value == 3


@pytest.mark.parametrize("value", [-1, 1 << 31])
def test_impossible_numbers_of_permits_are_refused(region, value):
    with pytest.raises(ValueError, match="value must be between 0 and"):
        Semaphore(region, value=value)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        Semaphore(region).release(0)
    with pytest.raises(ValueError, match="it has 2,147,483,647 permits"):
        Semaphore(region, value=(1 << 31) - 1).release()


@pytest.mark.parametrize("timeout", [0, 0.01, 0.15])
def test_a_semaphore_gives_up_after_its_timeout_and_not_before(region, timeout):
    semaphore = Semaphore(region, value=0)
    start = time.perf_counter()
    assert semaphore.acquire(timeout) is False
    assert time.perf_counter() - start >= timeout


def test_one_permit_is_for_one_process(region, cell, fork):
    semaphore = Semaphore(region)
    for _ in range(4):
        fork(count_up, cell, 1000, lambda: semaphore)
    fork.join()
    assert (cell[0], semaphore.value) == (4000, 1)


def test_one_permit_is_for_one_thread(region, cell):
    semaphore = Semaphore(region)
    threads = [threading.Thread(target=count_up, args=(cell, 500, lambda: semaphore)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (cell[0], semaphore.value) == (2000, 1)


def test_as_many_wait_as_there_are_too_few_permits(region, fork, wait_until):
    semaphore = Semaphore(region, value=0)
    pids = [fork(semaphore.acquire) for _ in range(5)]
    for pid in pids:
        wait_until(lambda pid=pid: parked(pid))
    semaphore.release(5)
    fork.join()
    assert semaphore.value == 0


def test_any_process_can_replace_the_permit_of_a_killed_one(region):
    semaphore = Semaphore(region)
    killed(semaphore.acquire)
    assert semaphore.acquire(timeout=0.01) is False
    semaphore.release()
    assert semaphore.acquire()


def test_a_permit_given_to_a_killed_waiter_goes_to_another(region, fork, wait_until):
    semaphore = Semaphore(region, value=0)
    victim = os.fork()
    if victim == 0:
        semaphore.acquire()
        os._exit(1)
    wait_until(lambda: parked(victim))
    survivor = fork(semaphore.acquire)
    wait_until(lambda: parked(survivor))
    os.kill(victim, signal.SIGSTOP)
    semaphore.release()  # the kernel wakes the first waiter, which can no longer act
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    fork.join()
    assert semaphore.value == 0


# -- readers and writers ----------------------------------------------------------------------


def test_readers_read_together_and_a_writer_is_alone(region, thread, in_child):
    lock = RWLock(region)
    other = RWLock.attach(region)
    with lock.read() as entered:
        assert entered is lock
        assert thread(lambda: other.acquire_read(0) and (other.release(), True)[1])
        assert in_child(lambda: 0 if other.acquire_read(0) else 1) == 0
        assert thread(lock.acquire_write, 0) is False
        assert thread(lock.acquire_write, 0.03) is False
    with lock.write() as entered:
        assert entered is lock
        assert thread(lock.acquire_read, 0) is False
        assert thread(lock.acquire_read, 0.03) is False
        assert thread(lock.acquire_write, 0) is False
    assert lock.acquire_write(0)
    lock.release()
    assert not lock.owner_died
    assert not _placed.held


def test_sections_that_cannot_be_entered_in_time_raise(region, child_that_holds):
    lock = RWLock(region)
    child_that_holds(lock.acquire_write)
    for section in (lock.read, lock.write):
        start = time.perf_counter()
        with pytest.raises(LockTimeoutError, match=r"in 0\.15 seconds"), section(timeout=0.15):
            pass
        assert time.perf_counter() - start >= 0.15


def test_a_reader_may_read_again_and_a_holder_may_not_write(region, thread):
    lock = RWLock(region, readers=1)
    with lock.read(), lock.read():
        assert lock.acquire_read(0)
        lock.release()
        assert thread(lock.acquire_read, 0) is False
        with pytest.raises(DeadlockError):
            lock.acquire_write()
    assert thread(lambda: lock.acquire_read(0) and (lock.release(), True)[1])
    with lock.write():
        for call in (lock.acquire_read, lock.acquire_write):
            with pytest.raises(DeadlockError):
                call()
        with pytest.raises(DeadlockError), lock.read():
            pass
        assert thread(lock.acquire_read, 0) is False
    with pytest.raises(NotOwnerError):
        lock.release()


def test_a_forked_child_does_not_hold_the_lock_of_its_parent(region, in_child):
    lock = RWLock(region)

    def child():
        with pytest.raises(NotOwnerError):
            lock.release()
        assert lock.acquire_write(0) is False

    with lock.read():
        assert in_child(child) == 0
    with lock.write():
        assert in_child(child) == 0


@pytest.mark.parametrize("readers", [1, 2, 16, 40])
def test_the_maximum_number_of_readers_read_and_one_more_waits(region, readers, wait_until):
    assert RWLock.SIZE == RWLock.size_for(16)
    lock = RWLock(region, readers=readers)
    assert RWLock.attach(region)._slots == lock._slots
    inside, leave = threading.Semaphore(0), threading.Event()

    def read():
        with lock.read():
            inside.release()
            leave.wait()

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for each in threads:
        each.start()
    for _ in range(readers):
        assert inside.acquire(timeout=30)
    assert lock.acquire_read(0) is False
    assert lock.acquire_read(0.03) is False
    late = threading.Thread(target=read)
    late.start()
    leave.set()
    for each in (*threads, late):
        each.join()
    assert lock.acquire_write(0)
    lock.release()


@pytest.mark.parametrize("readers", [0, -1, 1001])
def test_impossible_numbers_of_readers_are_refused(region, readers):
    with pytest.raises(ValueError, match="readers must be between 1 and 1,000"):
        RWLock(region, readers=readers)


@pytest.mark.parametrize("readers", [1, 3, 16])
def test_writers_change_both_halves_and_readers_never_see_one(region, cell, fork, readers):
    lock = RWLock(region, readers=readers)

    def write():
        for _ in range(300):
            with lock.write():
                cell[0] += 1
                cell[1] += 1

    def read():
        for _ in range(600):
            with lock.read():
                first = cell[0]
                let_others_run()
                assert cell[1] == first

    for action in (write, read, write, read):
        fork(action)
    fork.join()
    assert cell[0] == cell[1] == 600


def test_readers_and_writers_among_threads(region, cell):
    lock = RWLock(region, readers=2)
    torn = []

    def write():
        count_up(cell, 300, lock.write)

    def read():
        for _ in range(300):
            with lock.read():
                first = cell[0]
                let_others_run()
                torn.extend([first] * (cell[0] != first))

    threads = [threading.Thread(target=action) for action in (write, read, write, read, read)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (cell[0], torn) == (600, [])


def test_a_writer_that_waits_goes_before_new_readers(region, child_that_holds, fork, wait_until):
    lock = RWLock(region)
    reader = child_that_holds(lock.acquire_read)

    def write():
        with lock.write():
            pass

    fork(write)
    wait_until(lambda: lock._words[4])
    assert lock.acquire_read(0) is False
    child_that_holds.end(reader)
    fork.join()
    assert lock.acquire_read(0)
    lock.release()


def test_a_writer_that_gives_up_lets_the_readers_in(region, child_that_holds, fork, thread):
    lock = RWLock(region)
    child_that_holds(lock.acquire_read)
    assert lock.acquire_write(0.05) is False
    assert lock._words[4] == 0
    assert not _placed.held
    assert thread(lambda: lock.acquire_read(0) and (lock.release(), True)[1])
    for _ in range(14):
        child_that_holds(lock.acquire_read)
    assert thread(lambda: lock.acquire_read(0) and (lock.release(), True)[1])


def test_a_killed_reader_leaves_nothing_behind(region, child_that_holds, fork, wait_until):
    lock = RWLock(region)
    pids = [child_that_holds(lock.acquire_read) for _ in range(3)]

    def write():
        assert lock.acquire_write()
        assert not lock.owner_died
        lock.release()

    fork(write)
    wait_until(lambda: lock._words[4])
    for pid in pids:
        child_that_holds.end(pid)
    fork.join()
    for _ in range(20):
        killed(lock.acquire_read)
    with lock.read():
        assert not lock.owner_died


@pytest.mark.parametrize("first", ["read", "write"])
def test_the_death_of_a_writer_is_told_to_readers_and_writers(region, child_that_holds, first, thread):
    lock = RWLock(region)
    child_that_holds.end(child_that_holds(lock.acquire_write))
    with getattr(lock, first)():
        assert lock.owner_died
        if first == "write":
            lock.make_consistent()
            assert not lock.owner_died
    if first == "read":
        with lock.read():
            assert lock.owner_died
            with pytest.raises(NotOwnerError, match="does not hold it for writing"):
                lock.make_consistent()
        with lock.write():
            assert lock.owner_died
            lock.make_consistent()
    for section in (lock.read, lock.write):
        with section():
            assert not lock.owner_died
    assert lock.acquire_write(0)
    lock.release()


def test_waiters_for_a_killed_writer_get_the_lock(region, child_that_holds, fork, wait_until):
    lock = RWLock(region)
    holder = child_that_holds(lock.acquire_write)

    def read():
        with lock.read():
            pass

    pids = [fork(read), fork(read)]
    for pid in pids:
        wait_until(lambda pid=pid: parked(pid))
    child_that_holds.end(holder)
    fork.join()


def test_a_killed_waiting_writer_blocks_no_reader(region, child_that_holds, wait_until):
    lock = RWLock(region)
    child_that_holds(lock.acquire_read)
    victim = os.fork()
    if victim == 0:
        lock.acquire_write()
        os._exit(1)
    wait_until(lambda: lock._words[4])
    wait_until(lambda: parked(victim))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    with lock.read():
        assert not lock.owner_died


def test_a_lock_released_by_a_writer_without_repair_is_given_up(region):
    lock = RWLock(region)
    killed(lock.acquire_write)
    with lock.write():
        assert lock.owner_died
    for call in (lock.acquire_read, lock.acquire_write):
        for timeout in (None, 0, 3):
            with pytest.raises(NotRecoverableError):
                call(timeout)
    assert lock.owner_died
    assert not _placed.held


@pytest.mark.parametrize("first", ["read", "write"])
def test_the_repair_of_a_lock_is_called_once_for_writing(region, first, thread):
    repaired = []
    lock = RWLock(region, repair=lambda: repaired.append(thread(RWLock.attach(region).acquire_read, 0)))
    killed(lock.acquire_write)
    with getattr(lock, first)():
        assert repaired == [False]
        assert not lock.owner_died
        assert thread(lambda: lock.acquire_read(0) and (lock.release(), True)[1]) is (
            True if first == "read" else False
        )
        assert thread(lock.acquire_write, 0) is False
    with lock.write(), pytest.raises(DeadlockError):
        lock.acquire_read()
    assert repaired == [False]
    assert not _placed.held


def test_a_failed_repair_of_an_rwlock_is_left_to_the_next_holder(region):
    def fail():
        raise ZeroDivisionError

    lock = RWLock(region, repair=fail)
    killed(lock.acquire_write)
    for call in (lock.acquire_read, lock.acquire_write):
        with pytest.raises(ZeroDivisionError):
            call()
    assert not _placed.held
    other = RWLock.attach(region)
    with other.write():
        assert other.owner_died
        other.make_consistent()
    with lock.read():
        pass


@pytest.mark.slow
def test_random_deaths_of_readers_and_writers_never_stop_the_others(region, cell, wait_until):
    def repair():
        cell[1] = cell[0]
        cell[3] += 1

    lock = RWLock(region, readers=4, repair=repair)

    def work(write):
        while True:
            if write:
                with lock.write():
                    cell[0] += 1
                    cell[1] += 1
            else:
                with lock.read():
                    if cell[0] != cell[1]:
                        cell[4] += 1
                cell[2] += 1

    pids = collections.deque()
    try:
        for turn in range(40):
            while len(pids) < 4:
                pid = os.fork()
                if pid == 0:
                    try:
                        work((turn + len(pids)) % 2)
                    finally:
                        os._exit(1)
                pids.append(pid)
            for index, more in ((0, 20), (2, 20)):
                before = cell[index]
                wait_until(lambda index=index, least=before + more: cell[index] > least)
            os.kill(pids[0], signal.SIGKILL)
            os.waitpid(pids.popleft(), 0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with lock.write(timeout=10):
        assert cell[0] == cell[1]
    assert cell[4] == 0


# -- barrier ----------------------------------------------------------------------------------


def test_no_party_passes_before_all_have_arrived(region, cell, fork):
    barrier = Barrier(region, parties=4)

    def run(index):
        places = set()
        for turn in range(1, 101):
            cell[index] = turn
            place = barrier.wait(60)
            places.add(place)
            assert all(cell[other] >= turn for other in range(4))
            assert barrier.wait(60) in range(4)
        assert places <= set(range(4))

    for index in range(4):
        fork(run, index)
    fork.join()
    assert (barrier.n_waiting, barrier.parties, barrier.broken) == (0, 4, False)


def test_each_arrives_in_another_place(region):
    barrier = Barrier(region, parties=5)
    places = []
    threads = [threading.Thread(target=lambda: places.append(barrier.wait(60))) for _ in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(places) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("parties", [0, -1, 1 << 31])
def test_impossible_numbers_of_parties_are_refused(region, parties):
    with pytest.raises(ValueError, match="parties must be between 1 and"):
        Barrier(region, parties=parties)


@pytest.mark.parametrize("timeout", [0, 0.01, 0.15])
def test_a_timeout_breaks_the_barrier(region, timeout):
    barrier = Barrier(region)
    start = time.perf_counter()
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait(timeout)
    assert time.perf_counter() - start >= timeout
    assert barrier.broken
    with pytest.raises(threading.BrokenBarrierError, match=r"Call reset\(\) first"):
        barrier.wait()
    barrier.reset()
    assert not barrier.broken


@pytest.mark.parametrize("how", ["abort", "reset", "timeout"])
def test_breaking_the_barrier_ends_every_wait(region, fork, wait_until, how):
    barrier = Barrier(region, parties=4)

    def wait():
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait()

    fork(wait)
    fork(wait)
    wait_until(lambda: barrier.n_waiting == 2)
    if how == "timeout":
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(0.01)
    else:
        getattr(barrier, how)()
    fork.join()
    assert (barrier.broken, barrier.n_waiting) == (how != "reset", 0)
    barrier.reset()
    for _ in range(3):
        fork(barrier.wait)
    barrier.wait(60)
    fork.join()


def test_a_party_killed_after_its_arrival_counts(region, wait_until):
    barrier = Barrier(region)
    victim = os.fork()
    if victim == 0:
        barrier.wait()
        os._exit(1)
    wait_until(lambda: barrier.n_waiting == 1)
    # It reports the break before it releases the barrier.
    wait_until(lambda: locks.mutex_trylock(barrier._address + HEADER) == 0)
    locks.mutex_unlock(barrier._address + HEADER)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    assert barrier.wait(60) == 1


def test_a_party_killed_while_changing_the_barrier_breaks_the_barrier(region, fork, wait_until):
    barrier = Barrier(region, parties=3)

    def wait():
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait()

    fork(wait)
    wait_until(lambda: barrier.n_waiting == 1)
    killed(lambda: locks.mutex_trylock(barrier._address + HEADER))
    fork.join()
    assert barrier.broken
    barrier.reset()
    assert not barrier.broken


def test_the_generations_start_again_at_their_end(region, fork):
    barrier = Barrier(region)
    barrier._words[3] = 0xFFFFFFFE

    def run():
        for _ in range(50):
            barrier.wait(60)

    fork(run)
    run()
    fork.join()
    assert barrier._words[3] == 48
