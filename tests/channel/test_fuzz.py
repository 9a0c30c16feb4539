"""Truncated or changed messages are refused with a reason, or read as what they say."""

from __future__ import annotations

import contextlib
import gc

import pytest
import system
from fuzzing import EXAMPLES, changed, try_all
from hypothesis import strategies as st

import forkshm
from forkshm.backend import kernel
from forkshm.channel import Kind, read_message, write_message
from forkshm.channel._endpoint import Received, pair
from forkshm.pickler import pack
from forkshm.pickler._handles import ReceivedFd
from forkshm.region._table import mapping_at
from forkshm.region.blocks._arena import arena
from forkshm.region.blocks._claim import claim_at


@pytest.fixture
def messages():
    """Return messages of every kind: their bytes, and their fds."""
    made = []
    first, second = forkshm.anonymous_shared_memory(5000), forkshm.anonymous_shared_memory(4096)
    ours, theirs = forkshm.Pipe()
    payloads = [
        [pack(17)],
        [pack(first)],
        [pack((first, second, b"x" * 100_000))],
        [pack(b"x" * 70_000), pack(bytearray(3000))],
        [pack((ours, first, bytearray(20_000))), pack(b"y" * 40_000)],
        [pack(["small"] * 30_000)],
        [pack(b"z" * 100_000, for_many=True), pack(None)],
    ]
    made = [write_message(Kind.CALL, number, *some, group=3) for number, some in enumerate(payloads)]
    yield [(data, list(fds)) for data, fds in made]
    for some in payloads:
        for payload in some:
            payload.close()
    first.close()
    second.close()
    ours.close()
    theirs.close()


def open_fds():
    arena.statistics()  # returned blocks may keep fds until this look
    return system.open_fds()


def memory_of(buffer):
    """Return the object that a buffer is in, or None if it belongs to this process alone."""
    address = kernel.address_of(buffer)
    if (mapping := mapping_at(address)) is not None:
        assert address + buffer.nbytes <= mapping.address + mapping.size
        return mapping.identity
    if (claim := claim_at(address)) is not None:
        assert address + buffer.nbytes <= claim.address + claim.size
        return claim.segment.identity
    return None


def read(data, fds):
    """Read a message as every receiver does; the result may only use memory that came with it."""
    identities = set()
    for fd in fds:
        with contextlib.suppress(OSError):  # a pipe, which not every system identifies as memory
            identities.add(kernel.identify(fd)[0])
    beside = [kernel.duplicate(fd) for fd in fds]
    try:
        message = read_message(Received(data, beside))
    except forkshm.ForkshmError:
        return None
    finally:
        assert beside == []
    for incoming in message.payloads:
        if incoming is None:
            continue
        for buffer in incoming._buffers:
            if type(buffer) is ReceivedFd:
                continue
            view = memoryview(buffer).cast("B")
            if not view.nbytes:
                continue
            assert memory_of(view) in {None, *identities}
            # Nothing beyond the end of an object is mapped; otherwise this would be a SIGBUS.
            assert len(bytes(view[:: max(view.nbytes // 64, 1)]) + bytes(view[-1:])) > 1
    return message


def test_the_messages_of_these_tests_are_read(messages):
    for data, fds in messages:
        message = read(data, fds)
        assert message is not None
        assert message.group == 3


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_changed_message_is_refused_or_names_its_own_memory(messages, examples):
    by_data = [data for data, _ in messages]
    beside = [fds for _, fds in messages]
    before = open_fds()

    def check(example):
        data, which, drop, turn = example
        fds = beside[which]
        fds = fds[: len(fds) - drop] if drop else fds
        read(data, [*fds[turn:], *fds[:turn]])

    example = st.tuples(
        changed(by_data), st.integers(0, len(messages) - 1), st.integers(0, 2), st.sampled_from([0, 0, 0, 1])
    )
    try_all(examples, example, check)
    gc.collect()
    assert open_fds() == before


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_changed_message_with_fds_is_refused_or_names_its_own_memory(messages, examples):
    before = open_fds()
    for data, fds in messages:
        try_all(examples // len(messages), changed([data]), lambda changed, fds=fds: read(changed, fds))
    gc.collect()
    assert open_fds() == before


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_message_after_malformed_data_is_complete(messages, examples):
    sender, receiver = pair()

    def check(data):
        if not data:
            return
        sender.send(data[:60_000], [sender.fileno()] * (len(data) % 20))
        received = receiver.receive_nowait()
        with pytest.raises(forkshm.ForkshmError):
            read_message(received)
            raise forkshm.ForkshmError("it was a whole message nevertheless")
        sender.send(b"next")
        assert receiver.receive_nowait() == Received(b"next", [])

    try_all(examples, changed([data for data, _ in messages]), check)
    sender.close()
    receiver.close()


def test_a_lease_on_another_block_is_refused():
    """Receive the bytes of one message with the fd of another: a replay never maps a block that was not lent."""
    # With one memory object for each block, a block of 70,000 bytes may be in an object of 1 MiB.
    here, there = pack(b"x" * 70_000), pack(b"y" * 2**21)
    data, _ = write_message(Kind.RESULT, 0, there)
    _, fds = write_message(Kind.RESULT, 0, here)
    fds = [kernel.duplicate(fd) for fd in fds]
    there.close()
    with pytest.raises(forkshm.errors.RegionGoneError, match=r"the lease does not hold it|does not fit a segment"):
        read_message(Received(data, fds))
    here.close()
