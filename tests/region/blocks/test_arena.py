"""The arena: carving, growing, giving back."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading

import pytest
from system import in_pages, open_fds

from forkshm.backend import kernel
from forkshm.region._lifetime import guard
from forkshm.region.blocks import _arena
from forkshm.region.blocks._arena import BLOCKS_PER_SEGMENT, FIRST_SEGMENT, MIB, block_size
from forkshm.region.blocks._claim import Share, claim_at
from forkshm.region.blocks._segment import segments_mapped

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(arena):
    return sum(os.fstat(carved.segment.fd).st_blocks * 512 for carved in arena._carved)


def fill(block, byte):
    block.write(0, bytes([byte]) * block.size, block.size)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, PAGE, PAGE + 1, 100_001, MIB, 10 * MIB + 1], ids=in_pages)
def test_a_block_is_at_least_as_large_as_asked_for_and_page_aligned(fresh_arena, nbytes):
    block = fresh_arena.allocate(nbytes)
    assert nbytes <= block.size <= max(PAGE, nbytes * 9 // 8 + PAGE)
    assert block.offset % PAGE == block.size % PAGE == block.address % PAGE == 0
    fresh_arena.free(block)


@pytest.mark.parametrize("exponent", range(12, 40, 3))
def test_there_are_few_sizes_between_powers_of_two(exponent):
    sizes = {block_size(2**exponent + step * 2**exponent // 64 + 1) for step in range(64)}
    assert len(sizes) <= 9


@pytest.mark.needs("carving")
def test_the_lowest_free_address_is_used_again_first(fresh_arena):
    blocks = [fresh_arena.allocate(PAGE) for _ in range(5)]
    offsets = [block.offset for block in blocks]
    assert offsets == sorted(offsets) == [PAGE * number for number in range(5)]
    fresh_arena.free(blocks[3])
    fresh_arena.free(blocks[1])
    again = [fresh_arena.allocate(PAGE) for _ in range(2)]
    assert [block.offset for block in again] == [offsets[1], offsets[3]]
    assert fresh_arena.allocate(PAGE).offset == 5 * PAGE


def test_free_neighbours_become_one_range(fresh_arena):
    blocks = [fresh_arena.allocate(PAGE) for _ in range(4)]
    for number in (0, 2, 1):
        fresh_arena.free(blocks[number])
    assert fresh_arena.allocate(3 * PAGE).offset == 0
    fresh_arena.free(blocks[3])


def test_blocks_do_not_overlap_and_keep_their_bytes(fresh_arena):
    blocks = [fresh_arena.allocate(1 + 3000 * number) for number in range(20)]
    for number, block in enumerate(blocks):
        fill(block, number)
    for number, block in enumerate(blocks):
        window = memoryview(_arena.kernel.buffer_at(block.address, block.size)).cast("B")
        assert bytes(window) == bytes([number]) * block.size


def test_writing_beyond_a_block_is_refused(fresh_arena):
    block = fresh_arena.allocate(PAGE)
    with pytest.raises(ValueError, match="do not fit"):
        block.write(1, bytes(PAGE), PAGE)
    with pytest.raises(ValueError, match="source holds only 3"):
        block.write(0, b"abc", 4)
    block.write(PAGE - 3, b"abc", 3)


def test_one_large_block_gets_a_segment_of_its_size(fresh_arena):
    small = fresh_arena.allocate(PAGE)
    large = fresh_arena.allocate(FIRST_SEGMENT + 1)
    assert small.carved is not large.carved
    assert large.size <= large.carved.segment.size
    fill(small, 1)
    statistics = fresh_arena.statistics()
    assert (statistics.segments, statistics.blocks) == (2, 2)
    assert statistics.used_bytes == small.size + large.size
    assert statistics.reserved_bytes >= statistics.used_bytes


@pytest.mark.needs("exact_objects")
def test_an_untouched_arena_takes_no_memory(fresh_arena):
    assert fresh_arena.statistics().segments == 0
    fresh_arena.free(fresh_arena.allocate(10 * MIB))
    assert resident(fresh_arena) == 0


@pytest.mark.needs("carving")
def test_a_segment_holds_no_more_blocks_than_locks_are_cheap_for(fresh_arena):
    blocks = [fresh_arena.allocate(1) for _ in range(2 * BLOCKS_PER_SEGMENT + 1)]
    assert fresh_arena.statistics().segments == 3
    assert len({(id(block.carved), block.offset) for block in blocks}) == len(blocks)
    for block in blocks:
        fresh_arena.free(block)
    statistics = fresh_arena.statistics()
    assert (statistics.blocks, statistics.used_bytes) == (0, 0)


def test_statistics_go_back_to_zero(fresh_arena):
    block = fresh_arena.allocate(3 * PAGE)
    assert fresh_arena.statistics().blocks == 1
    fresh_arena.lend(block).close()
    statistics = fresh_arena.statistics()
    assert (statistics.blocks, statistics.used_bytes, statistics.warm_bytes) == (0, 0, block.size)


@pytest.mark.needs("punch_holes")
def test_trim_keeps_the_memory_of_blocks_in_use(fresh_arena):
    free, used = fresh_arena.allocate(4 * MIB), fresh_arena.allocate(2 * MIB)
    fill(free, 1)
    fill(used, 2)
    fresh_arena.free(free)
    assert resident(fresh_arena) == 6 * MIB
    fresh_arena.trim()
    assert resident(fresh_arena) == 2 * MIB
    window = memoryview(_arena.kernel.buffer_at(used.address, used.size)).cast("B")
    assert window[0] == window[-1] == 2
    fresh_arena.free(used)
    fresh_arena.trim()
    assert resident(fresh_arena) == 0
    assert fresh_arena.statistics().warm_bytes == 0


@pytest.mark.needs("punch_holes")
def test_trim_keeps_the_requested_amount_warm(fresh_arena):
    block = fresh_arena.allocate(4 * MIB)
    fill(block, 1)
    fresh_arena.free(block)
    fresh_arena.trim(keep=4 * MIB)
    assert resident(fresh_arena) == 4 * MIB
    fresh_arena.trim(keep=MIB + 1)
    assert resident(fresh_arena) == MIB
    fresh_arena.trim()
    assert resident(fresh_arena) == 0


@pytest.mark.needs("punch_holes")
def test_memory_beyond_the_recent_demand_goes_back_by_itself(fresh_arena, monkeypatch):
    monkeypatch.setattr(_arena, "KEEP_WARM", MIB)
    block = fresh_arena.allocate(8 * MIB)
    fill(block, 1)
    fresh_arena.free(block)
    for _ in range(_arena._EPOCH):
        fresh_arena.free(fresh_arena.allocate(1))
    assert resident(fresh_arena) == 8 * MIB  # it was in use a moment ago
    for _ in range(_arena._EPOCH):
        fresh_arena.free(fresh_arena.allocate(1))
    # The warm memory, and the block that was in use then.
    assert resident(fresh_arena) <= MIB + PAGE


@pytest.mark.needs("punch_holes")
def test_excess_is_memory_beyond_the_warm_amount(fresh_arena, monkeypatch):
    monkeypatch.setattr(_arena, "KEEP_WARM", MIB)
    assert not fresh_arena.has_excess()
    block = fresh_arena.allocate(2 * MIB)
    fresh_arena.free(block)
    assert fresh_arena.has_excess()
    fresh_arena.trim()
    assert not fresh_arena.has_excess()


def test_a_refused_segment_leaves_the_arena_usable(fresh_arena):
    small = fresh_arena.allocate(PAGE)
    before = open_fds()
    with pytest.raises(OSError, match=r"mmap|CreateFileMapping|No space left"):
        fresh_arena.allocate(2**61)
    assert len(open_fds()) == len(before)
    assert fresh_arena.statistics().blocks == 1
    fresh_arena.free(small)
    assert fresh_arena.allocate(PAGE).offset == small.offset


def test_a_child_starts_an_arena_of_its_own(in_child):
    from forkshm.region.blocks._arena import arena

    block = arena.allocate(PAGE)
    try:

        def look():
            assert arena.statistics().segments == 0
            mine = arena.allocate(PAGE)
            assert mine.carved.segment.identity != block.carved.segment.identity
            arena.free(mine)

        assert in_child(look) == 0
    finally:
        arena.free(block)


def test_many_threads_never_get_the_same_block(fresh_arena):
    wrong = []

    def work(number):
        try:
            for turn in range(100):
                block = fresh_arena.allocate(1 + turn * 500)
                fill(block, number)
                window = memoryview(_arena.kernel.buffer_at(block.address, block.size)).cast("B")
                assert window[0] == window[-1] == number
                if turn % 2:
                    fresh_arena.free(block)
                else:
                    fresh_arena.lend(block).close()
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fresh_arena.statistics().blocks == 0


def test_segments_are_counted_while_they_are_mapped(fresh_arena):
    before = segments_mapped()
    fresh_arena.allocate(1)
    assert segments_mapped() == before + 1


@pytest.mark.needs("carving")
def test_a_block_knows_its_previously_used_bytes(fresh_arena):
    first = fresh_arena.allocate(4 * PAGE)
    assert first.used == 0
    fill(first, 7)
    fresh_arena.free(first)
    again = fresh_arena.allocate(2 * PAGE)
    assert (again.offset, again.used) == (first.offset, 2 * PAGE)
    across = fresh_arena.allocate(8 * PAGE)
    assert across.used == 2 * PAGE
    assert not any(kernel.bytes_at(across.address + across.used, across.size - across.used))
    fresh_arena.free(again)
    fresh_arena.free(across)


@pytest.mark.needs("carving")
@pytest.mark.parametrize("share", [Share.exclusive, Share.shared])
def test_a_block_that_is_held_comes_back_when_its_claim_has_ended(fresh_arena, share):
    block = fresh_arena.allocate(PAGE)
    held = fresh_arena.hold(block, share)
    claim = held.claim
    assert claim_at(block.address + PAGE - 1) is claim
    assert fresh_arena.allocate(PAGE).offset != block.offset
    with contextlib.closing(claim.lend()) as lease:
        del held
        assert claim_at(block.address) is None
        assert fresh_arena.statistics().blocks == 1
        assert claim.share_out(to_many=False) is share
        assert lease.fd >= 0
    assert fresh_arena.statistics().blocks == 0


@pytest.mark.needs("carving")
def test_only_an_exclusive_held_block_becomes_private_when_shared_out(fresh_arena):
    for share, to_others in ((Share.exclusive, Share.private), (Share.shared, Share.shared)):
        held = fresh_arena.hold(fresh_arena.allocate(PAGE), share)
        claim = held.claim
        assert claim.share_out(to_many=False) is to_others
        assert claim.share_out(to_many=True) is to_others
        del held
    assert fresh_arena.statistics().blocks == 0


def test_blocks_dropped_under_the_lock_are_freed_afterwards(fresh_arena):
    held = fresh_arena.hold(fresh_arena.allocate(PAGE), Share.exclusive)
    claim = held.claim
    with guard:
        del held
        assert len(claim.holds) == 1
    assert fresh_arena.statistics().blocks == 0
    assert not claim.holds


@pytest.mark.needs("fork")
@pytest.mark.needs("fd_numbers")
def test_a_lease_that_is_collected_closes_no_file_of_other_code(fresh_arena):
    lease = fresh_arena.lend(fresh_arena.allocate(PAGE))
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), lease.fd)
        fd = lease.fd
        del lease
        fresh_arena.statistics()  # acts on what was collected
        assert os.path.sameopenfile(fd, file.fileno())
        os.close(fd)


def test_a_forked_child_does_not_hold_its_parents_parked_leases():
    arena = _arena.arena
    lease = arena.lend(arena.allocate(4096))
    beside = arena.lend(arena.allocate(4096), [lease])  # the same lease, if one fd can hold several blocks
    beside.park()
    lease.park()
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"x")
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        assert arena.statistics().blocks == 2
        lease.close()
        beside.close()
        assert arena.statistics().blocks == 0
    finally:
        for fd in (*ready, *done):
            os.close(fd)
        os.waitpid(pid, 0)
