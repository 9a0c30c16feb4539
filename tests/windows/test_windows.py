"""Features of the Windows backend: sections, handles that are fetched or pushed, and files for named objects."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import work

import forkshm
from forkshm.backend import kernel
from forkshm.backend.windows import _winapi
from forkshm.errors import (
    NotRecoverableError,
    RegionAccessError,
    RegionBusyError,
    RegionCreateError,
    RegionExistsError,
    RegionGoneError,
    RegionNotFoundError,
    UnsupportedError,
    WorkerDiedError,
)
from forkshm.testing import holdings

HUNDRED_MB = 12_500_000


def name_of(test):
    return rf"Local\forkshm-test-{os.getpid()}-{test}"


def own_handles():
    """Return the number of handles of each kind, as the kernel counts them, except those of the arena."""
    kinds = [kind for _, kind in holdings().fds]
    return {kind: kinds.count(kind) for kind in set(kinds)}


# -- sections -------------------------------------------------------------------------


def test_a_named_section_has_the_exact_size_for_every_opener():
    with forkshm.region.WindowsSharedMemory("create_only", name_of("size"), size=100_001) as shm:
        assert (shm.size, shm.mode, shm.name) == (100_001, "read_write", name_of("size"))
        with forkshm.region.WindowsSharedMemory("open_only", name_of("size"), "read_only") as again:
            assert again.size == 100_001
            region = forkshm.MappedRegion(again, "read_only")
            assert len(region.buf) == 100_001
            with pytest.raises(RegionCreateError) as caught:
                forkshm.MappedRegion(again, "read_write")
            assert caught.value.errno == 13
            copy = forkshm.MappedRegion(again, "copy_on_write", offset=70_000)
            copy.buf[0] = 1
            assert region.buf[70_000] == 0


def test_a_named_section_is_gone_with_its_last_handle_and_view_and_no_sooner():
    shm = forkshm.region.WindowsSharedMemory("create_only", name_of("gone"), size=10)
    region = forkshm.MappedRegion(shm)
    region.buf[:3] = b"abc"
    shm.close()
    again = forkshm.region.WindowsSharedMemory("open_only", name_of("gone"))
    assert bytes(forkshm.MappedRegion(again).buf[:3]) == b"abc"
    again.close()
    region.close()
    with pytest.raises(RegionNotFoundError):
        forkshm.region.WindowsSharedMemory("open_only", name_of("gone"))
    with forkshm.region.WindowsSharedMemory("open_or_create", name_of("gone"), size=20) as new:
        assert (new.size, bytes(forkshm.MappedRegion(new).buf[:3])) == (20, b"\0\0\0")


def test_a_name_that_is_taken_is_refused_or_opened_as_was_asked_for():
    with forkshm.region.WindowsSharedMemory("create_only", name_of("taken"), size=10):
        with pytest.raises(RegionExistsError):
            forkshm.region.WindowsSharedMemory("create_only", name_of("taken"), size=10)
        with forkshm.region.WindowsSharedMemory("open_or_create", name_of("taken"), size=99) as other:
            assert other.size == 10


def test_a_name_that_something_else_has_is_refused():
    mutex = _winapi.create_mutex(name_of("mutex"))
    try:
        with pytest.raises(RegionAccessError, match="another kind of object has that name"):
            forkshm.region.WindowsSharedMemory("create_only", name_of("mutex"), size=10)
    finally:
        _winapi.close(mutex)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("create_only", "x", "read_write"), "size must be given with create_only"),
        (("create_only", "x", "read_write", 0), "at least 1 byte"),
        (("open_only", None), "name must be given"),
        (("open_only", "x", "read_write", 10), "size must not be given with open_only"),
        (("create_only", r"a\b", "read_write", 10), "no backslash"),
        (("create_only", "x", "read_private", 10), "read_private"),
        (("create_only", "x", "read_write", 10, 0o777), "permissions must be"),
    ],
)
def test_invalid_arguments_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        forkshm.region.WindowsSharedMemory(*arguments)


def test_a_section_of_another_program_is_opened_with_whole_pages():
    from multiprocessing.shared_memory import SharedMemory

    theirs = SharedMemory(create=True, size=5000)
    theirs.buf[:3] = b"abc"
    with forkshm.region.WindowsSharedMemory("open_only", theirs.name) as shm:
        assert shm.size == 8192
        assert bytes(forkshm.MappedRegion(shm, "read_only").buf[:3]) == b"abc"
    theirs.close()


def test_more_memory_than_there_can_be_is_an_error_and_leaves_nothing():
    before = own_handles()
    with pytest.raises(RegionCreateError) as caught:
        forkshm.anonymous_shared_memory(2**62)
    assert caught.value.size == 2**62
    assert own_handles() == before


def test_regions_start_at_any_byte_and_at_an_address_that_is_free():
    region = forkshm.anonymous_shared_memory(300_000)
    region.buf[:] = bytes(range(250)) * 1200
    part = forkshm.MappedRegion(region, "read_only", offset=70_001, size=100_000)
    assert bytes(part.buf) == bytes(region.buf[70_001:170_001])
    address = part.address & ~0xFFFF
    with pytest.raises(forkshm.errors.RegionAddressError):
        forkshm.MappedRegion(region, address=address)
    part.close()
    assert forkshm.MappedRegion.page_size() == 65536
    there = forkshm.MappedRegion(region, address=address)
    assert there.address == address
    assert bytes(there.buf[:3]) == b"\0\1\2"


# -- files for named objects -----------------------------------------------------------


@pytest.fixture
def object_name():
    name = f"forkshm test: {os.getpid()}"
    yield name
    forkshm.SharedMemoryObject.remove(name)


def test_a_named_object_outlives_its_creator_until_removed(object_name):
    with forkshm.SharedMemoryObject("create_only", object_name) as shm:
        assert shm.size == 0
        shm.truncate(1000)
        region = forkshm.MappedRegion(shm)
    with forkshm.Pool(1) as pool:
        assert pool.apply(work.open_file_object, (object_name,)) == 1000
    assert bytes(region.buf[:2]) == b"ok"
    # The name is free at once, although the object is mapped; the mapping remains.
    assert forkshm.SharedMemoryObject.remove(object_name)
    assert not forkshm.SharedMemoryObject.remove(object_name)
    with forkshm.SharedMemoryObject("create_only", object_name) as other:
        assert other.size == 0
    assert bytes(region.buf[:2]) == b"ok"
    region.close()
    forkshm.SharedMemoryObject.remove(object_name)
    left = [name for name in os.listdir(kernel.folder_of_named()) if name.startswith("removed-")]
    assert left == []


def test_names_that_differ_by_capital_letters_are_different_objects(object_name):
    with forkshm.SharedMemoryObject("create_only", object_name), forkshm.remove_on_exit(object_name.upper()):
        forkshm.SharedMemoryObject("create_only", object_name.upper()).close()


def test_objects_older_than_the_system_start_are_deleted(object_name):
    with forkshm.SharedMemoryObject("create_only", object_name) as shm:
        shm.truncate(10)
    path = kernel._path_of(object_name)
    long_ago = time.time() - _winapi.milliseconds_since_boot() / 1000 - 3600
    os.utime(path, (long_ago, long_ago))
    kernel._sweep(kernel.folder_of_named())
    with pytest.raises(RegionNotFoundError):
        forkshm.SharedMemoryObject("open_only", object_name)


def test_writes_to_a_mapped_file_are_flushed(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"hello world")
    with forkshm.FileMapping(path) as file, forkshm.MappedRegion(file, offset=6) as region:
        region.buf[:] = b"there"
        region.flush()
        private = forkshm.MappedRegion(file, "copy_on_write")
        private.buf[:5] = b"HELLO"
        private.close()
    assert path.read_bytes() == b"hello there"
    with path.open("rb") as plain, forkshm.MappedRegion(plain, "read_only") as region:
        assert bytes(region.buf) == b"hello there"


# -- sending ------------------------------------------------------------------------------


def test_a_region_reaches_new_and_running_children():
    region = forkshm.anonymous_shared_memory(100)
    here, there = forkshm.Pipe()
    process = forkshm.Process(target=work.answer, args=(there, region))
    process.start()
    there.close()
    assert here.recv() == (process.pid, 100)
    assert bytes(region.buf[:5]) == b"child"
    here.send("end")
    process.join()
    assert process.exitcode == 0
    process.close()
    with forkshm.Pool(1) as pool:
        later = forkshm.zeros(1000)
        assert pool.apply(work.fill, (later, 5.0)) != os.getpid()
        assert later.sum() == 5000


def test_an_array_of_100_mb_crosses_a_pool_without_a_pickle_copy_and_into_warm_memory():
    big = np.ones(HUNDRED_MB)
    with forkshm.Pool(2) as pool:
        before = pool.statistics()
        for _ in range(3):
            assert pool.apply(work.total, (big,)) == HUNDRED_MB
        after = pool.statistics()
        # One copy of each into a section, and next to nothing in messages, which hold 64 KiB at most.
        assert after.bytes_copied - before.bytes_copied == 3 * big.nbytes
        result = pool.apply(work.double, (big,))
        assert result.sum() == 2 * HUNDRED_MB
        from forkshm.region.blocks._arena import arena

        assert arena.statistics().segments <= 2
    del result
    with forkshm.assert_zero_copy():
        shared = forkshm.ones(HUNDRED_MB)
        with forkshm.Pool(1) as pool:
            assert pool.apply(work.total, (shared,)) == HUNDRED_MB


def test_items_put_by_a_child_before_its_end_are_received():
    queue = forkshm.Queue()
    process = forkshm.Process(target=work.put_and_end, args=(queue, 100_000))
    process.start()
    assert queue.get(timeout=30).sum() == sum(range(100_000))
    process.join()
    process.close()
    queue.close()


def test_unreceived_messages_of_an_ended_process_raise_region_gone():
    here, there = forkshm.Pipe()
    process = forkshm.Process(target=work.send_region_and_wait, args=(there,))
    process.start()
    assert here.poll(30)
    process.kill()
    process.join()
    there.close()
    with pytest.raises(RegionGoneError, match="has ended, or been killed"):
        here.recv()
    here.close()
    process.close()


# -- death ----------------------------------------------------------------------------


def test_a_killed_worker_fails_its_task_and_leaves_no_handle_section_or_file():
    with forkshm.Pool(2) as pool:
        big = np.ones(1_000_000)
        assert pool.apply(work.total, (big,)) == 1_000_000
        before, files = own_handles(), os.listdir(kernel.folder_of_named())
        for number, name in ((signal.SIGKILL, "SIGKILL"), (signal.SIGTERM, "SIGTERM")):
            with pytest.raises(WorkerDiedError) as caught:
                pool.apply(work.end_self, (number,))
            assert (caught.value.exitcode, caught.value.signal) == (-number, name)
        with pytest.raises(WorkerDiedError) as caught:
            pool.apply(work.die, (77,))
        assert caught.value.exitcode == 77
        assert pool.apply(work.total, (big,)) == 1_000_000
        deadline = time.monotonic() + 10
        while own_handles() != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert own_handles() == before
        assert os.listdir(kernel.folder_of_named()) == files


def test_workers_that_are_killed_amid_arrays_leave_nothing_behind():
    big = np.ones(100_000)
    with forkshm.Pool(2) as pool:
        assert pool.map(work.total, [big] * 4) == [100_000.0] * 4
        before = own_handles()
        for _ in range(3):
            results = [pool.apply_async(work.total, (big,)) for _ in range(20)]
            with contextlib.suppress(ProcessLookupError):  # the worker of the last round, not yet found dead
                os.kill(pool._pool[0].pid, signal.SIGKILL)
            for result in results:
                with contextlib.suppress(WorkerDiedError):
                    assert result.get(30) == 100_000
        assert pool.map(work.total, [big] * 4) == [100_000.0] * 4
        deadline = time.monotonic() + 10
        while own_handles() != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert own_handles() == before


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "import forkshm, work\n"
        "if __name__ == '__main__':\n"
        "    pool = forkshm.Pool(2)\n"
        "    pool.map(abs, range(10))\n"
        "    pool.apply_async(work.sleep, (60,))\n"
        "    print(*[process.pid for process in pool._pool], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(kernel.is_running(pid) for pid in pids)
        parent.kill()
        deadline = time.monotonic() + 10
        while any(kernel.is_running(pid) for pid in pids):
            assert time.monotonic() < deadline, "a worker outlives who started it"
            time.sleep(0.01)


def test_a_mutex_reports_a_dead_holder_and_is_lost_without_repair():
    region = forkshm.anonymous_shared_memory(forkshm.region.Mutex.SIZE)
    mutex = forkshm.region.Mutex(region)
    for repairs in (True, False):
        here, there = forkshm.Pipe()
        process = forkshm.Process(target=work.hold_mutex, args=(region, there))
        process.start()
        assert here.recv() == "held"
        assert not mutex.acquire(timeout=0)
        assert not mutex.acquire(timeout=0.05)
        process.kill()
        process.join()
        assert mutex.acquire(timeout=10)
        assert mutex.owner_died
        if repairs:
            mutex.make_consistent()
            assert not mutex.owner_died
        mutex.release()
        process.close()
        here.close()
        there.close()
    with pytest.raises(NotRecoverableError):
        mutex.acquire()
    mutex.detach()


def test_a_mutex_keeps_processes_apart():
    region = forkshm.anonymous_shared_memory(4096)
    mutex = forkshm.region.Mutex(region)
    processes = [forkshm.Process(target=work.count, args=(region, 300)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        process.close()
    assert region.buf.cast("Q")[-1] == 600
    mutex.detach()


# -- missing features --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "instead"),
    [
        (lambda: forkshm.context.get_context("fork"), "spawn"),
        (lambda: forkshm.context.get_context("forkserver"), "spawn"),
        (lambda: forkshm.team(2), "Pool"),
        (lambda: forkshm.supervise(print), "Process"),
        (lambda: forkshm.launch(print), "Pool"),
        (lambda: forkshm.shared_allocations().__enter__(), "hook"),
    ],
)
def test_unsupported_features_name_an_alternative(ask, instead):
    with pytest.raises(UnsupportedError, match=instead):
        ask()


def test_the_default_start_method_is_spawn():
    assert forkshm.get_all_start_methods() == ["spawn"]
    assert forkshm.get_context().get_start_method() == "spawn"


def test_closing_a_region_with_views_raises():
    region = forkshm.anonymous_shared_memory(10)
    view = region.buf
    with pytest.raises(RegionBusyError):
        region.close()
    view.release()
    region.close()


# -- executor and decorator ----------------------------------------------------------------------------


def test_executor_and_decorator_run_over_spawned_workers():
    array = forkshm.ones(100_000)
    with forkshm.Executor(2) as executor:
        assert list(executor.map(work.total, [array] * 3)) == [100_000.0] * 3

    @forkshm.parallel(workers=2)
    def scaled(part, by):
        return part * by

    assert scaled(np.ones(1000), 3).sum() == 3000


# -- commands -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["ls"], ["top"], ["clean"], ["run", "script.py"]], ids=lambda words: words[0])
def test_a_command_that_needs_proc_or_forks_says_so_in_one_line(words):
    # Without the warning that the system is experimental.
    command = [sys.executable, "-W", "ignore:forkshm on ", "-m", "forkshm", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"python -m forkshm {words[0]}: ")
