"""The parent gives memory back over some seconds without calls; a fork finds no thread."""

from __future__ import annotations

import os
import sys
import time

import pytest

import forkshm
from forkshm.region.blocks import _decay
from forkshm.region.blocks._arena import KEEP_WARM, MIB, arena

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.needs("punch_holes")


def resident():
    """Return the bytes of the arena that take memory, whether this process has mapped them or not."""
    return sum(os.fstat(carved.segment.fd).st_blocks * 512 for carved in list(arena._carved))


def mapped():
    """Return the bytes of shared memory, of any process, that this process has mapped and that take memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssShmem"))


def is_there():
    """Return whether the thread exists."""
    return arena.decay.is_running and str(arena.decay._thread_id) in os.listdir("/proc/self/task")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_decay, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(_decay, "_LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(_decay, "EMPTY_SECONDS", 3.0)
    arena.trim()
    yield
    deadline = time.monotonic() + 20
    while arena.decay.is_running and time.monotonic() < deadline:
        time.sleep(0.01)


def fill(megabytes):
    blocks = [arena.allocate(16 * MIB) for _ in range(megabytes // 16)]
    for block in blocks:
        block.write(0, memoryview(b"x" * block.size), block.size)
    return blocks


def drop(blocks):
    while blocks:
        arena.free(blocks.pop())


def test_memory_is_given_back_in_steps(quick, wait_until):
    before = resident()
    blocks = fill(320)
    assert resident() > before + 300 * MIB
    assert arena.decay.is_running
    drop(blocks)
    seen = []

    def is_cool():
        seen.append(resident())
        return seen[-1] <= before + KEEP_WARM + 2 * MIB

    wait_until(is_cool)
    # Not all at once, but in steps.
    assert any(before + KEEP_WARM + 8 * MIB < now < before + 300 * MIB for now in seen), seen
    wait_until(lambda: not arena.decay.is_running)


def test_memory_stays_warm_while_there_are_calls(quick):
    blocks = fill(160)
    drop(blocks)
    warm = resident()
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        arena.free(arena.allocate(4096))
        time.sleep(0.01)
    assert resident() >= warm - 110 * MIB  # only the recent demand may have been dropped


def test_memory_in_use_is_given_back_once_dropped(quick, wait_until):
    before = resident()
    blocks = fill(160)
    time.sleep(0.7)
    assert resident() > before + 150 * MIB
    assert arena.decay.is_running
    drop(blocks)
    wait_until(lambda: resident() <= before + KEEP_WARM + 2 * MIB)


def test_all_is_given_back_at_once_when_memory_is_short(quick, wait_until, monkeypatch):
    before = resident()
    blocks = fill(160)
    monkeypatch.setattr(_decay, "is_short", lambda: True)
    drop(blocks)
    wait_until(lambda: resident() <= before + 2 * MIB)


def test_a_fork_finds_no_thread_and_the_thread_goes_on(quick, wait_until):
    blocks = fill(160)
    wait_until(is_there)
    first = arena.decay._thread_id
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, bytes([len(os.listdir("/proc/self/task")), arena.decay.is_running]))
        os._exit(0)
    os.waitpid(pid, 0)
    counted = os.read(read_end, 2)
    os.close(read_end)
    os.close(write_end)
    assert counted == bytes([1, False])
    wait_until(is_there)
    drop(blocks)
    assert arena.decay._thread_id != first


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs the warning of Python 3.12")
def test_a_fork_does_not_warn_of_the_thread(run_script):
    assert (
        run_script("""
import os, warnings
import forkshm
from forkshm.region.blocks._arena import arena
warnings.simplefilter("error")
block = arena.allocate(100 * 2**20)
for _ in range(20):
    pid = os.fork()
    if not pid: os._exit(0)
    os.waitpid(pid, 0)
print("ok")
""").strip()
        == "ok"
    )


def test_nothing_is_kept_after_a_long_pause(quick, wait_until):
    drop(fill(160))
    wait_until(lambda: resident() <= KEEP_WARM)
    assert resident() > 0
    wait_until(lambda: resident() == 0)
    wait_until(lambda: not arena.decay.is_running)
    assert arena.statistics().warm_bytes == 0


@pytest.mark.slow
def test_an_idle_pool_gives_back_the_memory_of_its_arguments(wait_until):
    arena.trim()
    before = mapped()
    with forkshm.Pool(2) as pool:
        results = pool.map(np.negative, [np.ones(MIB) for _ in range(40)], chunksize=1)
        assert mapped() > before + KEEP_WARM
        del results
        wait_until(lambda: mapped() < before + 3 * KEEP_WARM + 8 * MIB, 60)  # of two workers and this process
