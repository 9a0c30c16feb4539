"""Copies into memory without pages are written by a system call, and mapped when it is filled again."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import forkshm
from forkshm.backend import kernel
from forkshm.errors import RegionCreateError
from forkshm.pickler import pack
from forkshm.region.blocks import _arena
from forkshm.region.blocks._arena import COLD_LEAST, MIB, arena
from forkshm.region.blocks._segment import with_range, within, without_range

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.needs("pwrite")

NUMBERS = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12)), max_size=12)


@given(NUMBERS, st.integers(0, 40), st.integers(1, 12))
def test_ranges_are_sets_of_numbers(changes, start, size):
    ranges, numbers = (), set()
    for is_added, low, length in changes:
        part = set(range(low, low + length))
        if is_added:
            ranges, numbers = with_range(ranges, low, low + length), numbers | part
        else:
            ranges, numbers = without_range(ranges, low, low + length), numbers - part
    assert [number for low, high in ranges for number in range(low, high)] == sorted(numbers)
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
    inside = {number for low, high in within(ranges, start, start + size) for number in range(low, high)}
    assert inside == numbers & set(range(start, start + size))


@pytest.fixture
def calls(monkeypatch):
    """Return the sizes that were written by system calls."""
    sizes = []

    def pwrite(fd, data, offset):
        sizes.append(len(data))
        return real(fd, data, offset)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    return sizes


def content(block):
    return bytes(memoryview(kernel.buffer_at(block.address, block.size)).cast("B"))


def faults():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_only_the_first_use_is_written_by_a_system_call(fresh_arena, calls):
    source = os.urandom(MIB)
    for _ in range(3):
        block = fresh_arena.allocate(MIB)
        block.write(0, source, MIB)
        assert content(block) == source
        fresh_arena.free(block)
    assert calls == [MIB]


def test_small_copies_go_through_the_mapping(fresh_arena, calls):
    block = fresh_arena.allocate(MIB)
    block.write(0, bytes(COLD_LEAST - 1), COLD_LEAST - 1)
    assert calls == []


def test_the_second_use_takes_no_fault_for_each_page(fresh_arena):
    source = os.urandom(8 * MIB)
    block = fresh_arena.allocate(8 * MIB)
    block.write(0, source, len(source))
    fresh_arena.free(block)
    again = fresh_arena.allocate(8 * MIB)
    assert again.offset == block.offset
    before = faults()
    again.write(0, source, len(source))
    assert faults() - before < 300  # of 2,048 pages; the call itself counts some
    assert content(again) == source
    assert block.carved.unmapped == ()


def test_a_copy_across_warm_and_cold_memory(fresh_arena, calls):
    first = fresh_arena.allocate(MIB)
    first.write(0, b"x" * MIB, MIB)
    fresh_arena.free(first)
    calls.clear()
    source = os.urandom(3 * MIB)
    across = fresh_arena.allocate(3 * MIB)
    assert (across.offset, across.used) == (first.offset, MIB)
    across.write(0, source, len(source))
    assert content(across)[: len(source)] == source
    assert calls == [2 * MIB]


def test_memory_given_back_is_cold_again(fresh_arena, calls):
    low, high = fresh_arena.allocate(4 * MIB), fresh_arena.allocate(MIB)
    low.write(0, b"x" * 4 * MIB, 4 * MIB)
    high.write(0, b"y" * MIB, MIB)
    fresh_arena.free(low)
    fresh_arena.trim()
    assert fresh_arena.statistics().warm_bytes == 0
    calls.clear()
    again = fresh_arena.allocate(2 * MIB)
    assert (again.offset, again.cold) == (0, ((0, 2 * MIB),))
    assert not any(content(again))
    again.write(0, b"z" * 2 * MIB, 2 * MIB)
    assert calls == [2 * MIB]
    assert content(again) == b"z" * 2 * MIB
    assert content(high) == b"y" * MIB
    assert fresh_arena.statistics().warm_bytes == 0


def test_short_writes_go_on_where_they_ended(fresh_arena, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:100_001], offset))
    source = os.urandom(MIB)
    block = fresh_arena.allocate(MIB)
    block.write(0, source, MIB)
    assert content(block) == source


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_lack_of_memory_during_a_copy_raises_with_advice(monkeypatch, number):
    arena.trim()
    written = []

    def pwrite(fd, data, offset):
        if written:
            raise OSError(number, os.strerror(number))
        written.append(offset)
        return real(fd, data[:1_000_000], offset)

    real = os.pwrite
    blocks = arena.statistics().blocks
    array = np.ones(4 * MIB)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        with pytest.raises(RegionCreateError, match="33,554,432 bytes") as caught:
            pack(array)
    assert caught.value.errno == number
    assert written
    assert arena.statistics().blocks == blocks
    pack(array).close()


def test_a_limit_on_the_size_of_files(run_script):
    assert (
        run_script("""
import os, resource
import numpy as np
import forkshm
array = np.arange(2**19, dtype=float)
with forkshm.Pool(1) as pool:
    assert pool.apply(np.sum, (array[:50_000],)) == array[:50_000].sum()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    assert pool.apply(np.sum, (array,)) == array.sum()
print("ok")
""").strip()
        == "ok"
    )


def test_a_source_that_cannot_be_read_is_an_error():
    arena.trim()
    mapped = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
    array = np.frombuffer(mapped, np.uint8)
    # Through the mapping, this would be SIGSEGV.
    with pytest.raises(RegionCreateError) as caught:
        pack(array)
    assert caught.value.errno == errno.EFAULT
    del array, caught
    mapped.close()


def test_a_file_in_the_place_of_the_segment_is_not_written_to(fresh_arena, tmp_path):
    block = fresh_arena.allocate(MIB)
    segment = block.carved.segment
    kept = os.dup(segment.fd)
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    with open(path, "r+b") as file:
        os.dup2(file.fileno(), segment.fd, inheritable=False)
    block.write(0, b"x" * MIB, MIB)
    assert path.read_bytes() == b"precious"
    assert content(block) == b"x" * MIB
    os.dup2(kept, segment.fd, inheritable=False)
    os.close(kept)
    fresh_arena.free(block)


def test_a_source_that_changes_during_a_copy_arrives_with_bytes_it_had():
    arena.trim()
    array = np.zeros(4 * MIB, np.uint8)
    is_over = threading.Event()

    def change():
        while not is_over.is_set():
            array[:] = 1
            array[:] = 0

    thread = threading.Thread(target=change)
    thread.start()
    try:
        here, there = forkshm.Pipe()
        with here, there:
            for _ in range(5):
                here.send(array)
                got = there.recv()
                assert set(np.unique(got)) <= {0, 1}
                del got
                arena.trim()
    finally:
        is_over.set()
        thread.join()


def die_between_copy_and_message(_):
    arena.lend = lambda block: os.kill(os.getpid(), signal.SIGKILL)
    return np.ones(MIB)


def test_memory_of_a_worker_killed_before_sending_is_freed():
    with forkshm.Pool(1) as pool:
        with pytest.raises(forkshm.WorkerDiedError):
            pool.apply(die_between_copy_and_message, (0,))
        assert pool.apply(np.sum, (np.ones(MIB),)) == MIB


def test_received_arrays_take_no_fault_for_each_page():
    arena.trim()

    def count(array):
        before = faults()
        total = array.sum()
        array[:] = 2
        return total, faults() - before

    with forkshm.Pool(1) as pool:
        total, count = pool.apply(count, (np.ones(MIB),))
    assert total == MIB
    assert count < 100  # of 2,048 pages


def test_huge_pages_are_filled_through_the_mapping(fresh_arena, calls, monkeypatch):
    monkeypatch.setattr(type(kernel), "fills_huge_pages", lambda self: True)
    asked = []
    real = kernel.advise
    monkeypatch.setattr(kernel, "advise", lambda *args, **kwargs: (asked.append(args[2]), real(*args, **kwargs)))
    source = os.urandom(3 * MIB)
    block = fresh_arena.allocate(3 * MIB)
    block.write(0, source, len(source))
    assert content(block)[: len(source)] == source
    assert calls == []
    assert _arena.Advice.huge_pages in asked


def test_other_systems_copy_through_the_mapping():
    program = """
import numpy as np, forkshm, os
os.pwrite = None
with forkshm.Pool(1) as pool:
    print(pool.apply(np.sum, (np.ones(2**20),)))
"""
    environment = {**os.environ, "FORKSHM_BACKEND": "posix"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "1048576.0", done.stderr
