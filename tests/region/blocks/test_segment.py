"""Leases: a block is reused only once it has no holder."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from consuming import claim
from system import in_pages

from forkshm.backend import kernel
from forkshm.channel import pair
from forkshm.region.blocks import _segment
from forkshm.region.blocks._arena import Arena
from forkshm.region.blocks._claim import Share
from forkshm.region.blocks._segment import forget_abandoned, segments_mapped

PAGE = os.sysconf("SC_PAGE_SIZE")


def lent(arena, text=b"content", nbytes=PAGE):
    block = arena.allocate(nbytes)
    block.write(0, text, len(text))
    return block, arena.lend(block)


def claimed(fd, block, *, private=False):
    """Claim a block, and return a view; the exporter itself is dropped, as in the pickler."""
    return memoryview(claim(fd, block.offset, block.size, Share.private if private else Share.exclusive)).cast("B")


def blocks(arena):
    return arena.statistics().blocks


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def channel():
    sender, receiver = pair()
    yield sender, receiver
    sender.close()
    receiver.close()


# -- one process ----------------------------------------------------------------------


@pytest.mark.needs("carving")
@pytest.mark.needs("locks_as_leases")
def test_a_lease_holds_all_blocks_that_were_added_to_it(fresh_arena):
    first, lease = lent(fresh_arena)
    second = fresh_arena.allocate(PAGE)
    assert fresh_arena.lend(second, [lease]) is lease
    lease.park()
    assert blocks(fresh_arena) == 2
    lease.unpark()
    views = [claimed(kernel.duplicate(lease.fd), block) for block in (first, second)]
    lease.close()
    assert blocks(fresh_arena) == 2
    del views[0]
    assert blocks(fresh_arena) == 1
    views.clear()
    assert blocks(fresh_arena) == 0


@pytest.mark.needs("carving")
@pytest.mark.needs("locks_as_leases")
def test_a_closed_lease_takes_no_more_blocks(fresh_arena):
    _, lease = lent(fresh_arena)
    lease.close()
    other = fresh_arena.lend(fresh_arena.allocate(PAGE), [lease])
    assert other is not lease
    assert blocks(fresh_arena) == 1
    other.close()
    assert blocks(fresh_arena) == 0


@pytest.mark.needs("carving")
def test_a_block_is_not_used_again_while_its_lease_is_open(fresh_arena):
    block, lease = lent(fresh_arena)
    other = fresh_arena.allocate(PAGE)
    assert other.offset != block.offset
    lease.close()
    lease.close()
    assert blocks(fresh_arena) == 1
    assert fresh_arena.allocate(PAGE).offset == block.offset


def test_a_block_is_not_used_again_while_its_lease_is_in_flight(fresh_arena, channel):
    sender, receiver = channel
    block, lease = lent(fresh_arena)
    sender.send(b"here", [lease.fd])
    lease.close()
    assert blocks(fresh_arena) == 1
    received = receiver.receive_nowait()
    assert blocks(fresh_arena) == 1
    view = claimed(received.fds[0], block)
    assert blocks(fresh_arena) == 1
    assert bytes(view[:7]) == b"content"
    del view
    assert blocks(fresh_arena) == 0


def test_a_received_lease_that_is_closed_unclaimed_frees_the_block(fresh_arena, channel):
    sender, receiver = channel
    _, lease = lent(fresh_arena)
    sender.send(b"here", [lease.fd])
    lease.close()
    receiver.receive_nowait().close()
    assert blocks(fresh_arena) == 0


def test_an_unread_message_frees_its_block_with_the_socket(fresh_arena, wait_until):
    sender, receiver = pair()
    _, lease = lent(fresh_arena)
    sender.send(b"here", [lease.fd])
    lease.close()
    sender.close()
    assert blocks(fresh_arena) == 1
    receiver.close()
    wait_until(lambda: blocks(fresh_arena) == 0)


def test_the_block_is_held_until_the_last_of_several_views_is_gone(fresh_arena):
    block, lease = lent(fresh_arena)
    view = claimed(kernel.duplicate(lease.fd), block)
    lease.close()
    part = view[3:5]
    array = [view[1:].toreadonly(), memoryview(view)]
    del view
    assert blocks(fresh_arena) == 1
    array.clear()
    assert blocks(fresh_arena) == 1
    assert bytes(part) == b"te"
    del part
    assert blocks(fresh_arena) == 0


def test_two_claims_of_one_block_are_counted(fresh_arena):
    block, lease = lent(fresh_arena)
    first = claimed(kernel.duplicate(lease.fd), block)
    second = claimed(kernel.duplicate(lease.fd), block)
    lease.close()
    first[:3] = b"CON"
    assert bytes(second[:7]) == b"CONtent"
    del first
    assert blocks(fresh_arena) == 1
    del second
    assert blocks(fresh_arena) == 0
    assert block.carved.segment.held == {}


def test_private_claims_see_the_block_and_not_each_others_writes(fresh_arena):
    block, lease = lent(fresh_arena)
    first = claimed(kernel.duplicate(lease.fd), block, private=True)
    second = claimed(kernel.duplicate(lease.fd), block, private=True)
    shared = claimed(kernel.duplicate(lease.fd), block)
    lease.close()
    first[:3] = b"ABC"
    assert bytes(first[:7]) == b"ABCtent"
    assert bytes(second[:7]) == bytes(shared[:7]) == b"content"
    del shared, second
    assert blocks(fresh_arena) == 1
    del first
    assert blocks(fresh_arena) == 0


@pytest.mark.needs("carving")
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (-PAGE, PAGE),
        (0, 0),
        (0, -PAGE),
        (1, PAGE),
        (0, PAGE - 1),
        (0, 2**40),
        (2**40, PAGE),
        (2**62, PAGE),
        (2**64, PAGE),
        (PAGE, 16 * 2**20),
    ],
    ids=in_pages,
)
@pytest.mark.parametrize("private", [False, True])
def test_a_claim_of_an_invalid_block_is_refused_and_closes_the_lease(fresh_arena, offset, size, private):
    _, lease = lent(fresh_arena)
    fd = kernel.duplicate(lease.fd)
    with pytest.raises(ValueError, match=r"does not fit a segment of 16,777,216 bytes"):
        claim(fd, offset, size, Share.private if private else Share.exclusive)
    assert not is_open(fd)
    assert fresh_arena._carved[0].segment.held == {}
    lease.close()
    assert blocks(fresh_arena) == 0


@pytest.mark.needs("carving")
def test_a_claim_without_a_lease_is_refused_and_closes_the_fd():
    before = segments_mapped()
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(OSError, match="mmap"):
        claim(read_end, 0, PAGE)
    assert not is_open(read_end)
    forget_abandoned()
    assert segments_mapped() == before


def test_a_memory_object_that_was_never_a_segment_is_not_kept():
    before = segments_mapped()
    fd = kernel.create_memory(PAGE, "stranger")
    with pytest.raises(ValueError, match="does not fit"):
        claim(fd, PAGE, PAGE)
    forget_abandoned()
    assert segments_mapped() == before


# -- other processes ------------------------------------------------------------------


def receive_and_claim(receiver, block, *, private=False):
    received = receiver.receive_nowait()
    return claimed(received.fds[0], block, private=private)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_blocks_of_a_killed_process_are_free(fresh_arena, channel, child_that_holds, number):
    sender, receiver = channel
    block, lease = lent(fresh_arena)
    sender.send(b"here", [lease.fd])
    lease.close()
    pid = child_that_holds(lambda: receive_and_claim(receiver, block))
    assert blocks(fresh_arena) == 1
    child_that_holds.end(pid, number)
    assert blocks(fresh_arena) == 0


def test_a_lease_received_and_not_claimed_by_a_killed_process_is_free(fresh_arena, channel, child_that_holds):
    sender, receiver = channel
    _, lease = lent(fresh_arena)
    sender.send(b"here", [lease.fd])
    lease.close()
    pid = child_that_holds(receiver.receive_nowait)
    assert blocks(fresh_arena) == 1
    child_that_holds.end(pid)
    assert blocks(fresh_arena) == 0


def test_a_forked_child_holds_its_parents_blocks(fresh_arena, child_that_holds):
    block, lease = lent(fresh_arena)
    holder = [claimed(kernel.duplicate(lease.fd), block)]
    lease.close()
    pid = child_that_holds(lambda: bytes(holder[0][:7]) == b"content" or os._exit(1))
    holder.clear()
    assert blocks(fresh_arena) == 1
    child_that_holds.end(pid)
    assert blocks(fresh_arena) == 0


def test_a_block_released_by_a_child_is_still_held_by_its_parent(fresh_arena, child_that_holds):
    block, lease = lent(fresh_arena)
    holder = [claimed(kernel.duplicate(lease.fd), block), claimed(kernel.duplicate(lease.fd), block, private=True)]
    lease.close()

    def let_go():
        holder.clear()
        gc.collect()
        (segment,) = [s for s in _segment.segments_held.values() if s.identity == block.carved.segment.identity]
        return segment.held == {} or os._exit(1)

    child_that_holds(let_go)
    assert blocks(fresh_arena) == 1
    assert bytes(holder[0][:7]) == bytes(holder[1][:7]) == b"content"
    holder.clear()
    assert blocks(fresh_arena) == 0


def test_a_grandchild_holds_too(fresh_arena, child_that_holds):
    block, lease = lent(fresh_arena)
    holder = [claimed(kernel.duplicate(lease.fd), block)]
    lease.close()
    read_end, write_end = os.pipe()

    def have_a_child_and_let_go():
        grandchild = os.fork()
        if grandchild == 0:
            os.close(write_end)
            os.read(read_end, 1)  # until the test closes its end
            os._exit(0 if bytes(holder[0][:7]) == b"content" else 1)
        os.close(write_end)
        holder.clear()

    pid = child_that_holds(have_a_child_and_let_go)
    child_that_holds.end(pid)
    holder.clear()
    assert blocks(fresh_arena) == 1
    os.close(write_end)
    os.close(read_end)


@pytest.mark.needs("fork")
def test_a_child_does_not_hold_leases_that_are_about_to_be_sent(fresh_arena, child_that_holds):
    _, lease = lent(fresh_arena)
    child_that_holds(lambda: None)
    lease.close()
    assert blocks(fresh_arena) == 0


def start_creator(child_that_holds, sender):
    """Start a child with an arena of its own, which sends one block."""

    def create():
        arena = Arena()
        block, lease = lent(arena, b"from the child")
        sender.send(f"{block.offset} {block.size}".encode(), [lease.fd])
        lease.close()
        return arena

    return child_that_holds(create)


def claim_from_creator(receiver):
    received = receiver.receive_nowait()
    offset, size = map(int, received.data.split())
    return memoryview(claim(received.fds[0], offset, size)).cast("B")


def test_a_view_outlives_the_process_that_made_the_block_and_then_the_segment_goes(channel, child_that_holds):
    sender, receiver = channel
    forget_abandoned()
    before = segments_mapped()
    pid = start_creator(child_that_holds, sender)
    view = claim_from_creator(receiver)
    child_that_holds.end(pid)
    forget_abandoned()
    assert segments_mapped() == before + 1
    assert bytes(view[:14]) == b"from the child"
    del view
    assert segments_mapped() == before


def test_a_segment_stays_mapped_while_its_creator_lives_and_is_forgotten_afterwards(channel, child_that_holds):
    sender, receiver = channel
    forget_abandoned()
    before = segments_mapped()
    pid = start_creator(child_that_holds, sender)
    view = claim_from_creator(receiver)
    del view
    forget_abandoned()
    assert segments_mapped() == before + 1
    child_that_holds.end(pid)
    forget_abandoned()
    assert segments_mapped() == before


def test_a_new_segment_makes_room_by_dropping_segments_of_dead_processes(channel, child_that_holds):
    sender, receiver = channel
    forget_abandoned()
    before = segments_mapped()
    for _ in range(3):
        pid = start_creator(child_that_holds, sender)
        view = claim_from_creator(receiver)
        assert segments_mapped() == before + 1
        del view
        child_that_holds.end(pid)
    forget_abandoned()
    assert segments_mapped() == before
