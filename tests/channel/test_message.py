"""Messages are read back whole, or refused with nothing left open."""

from __future__ import annotations

import gc
import os
import random

import pytest
import system

from forkshm import ForkshmError, anonymous_shared_memory
from forkshm.backend import kernel
from forkshm.channel import Kind, open_answer, read_header, read_message, write_message
from forkshm.channel._endpoint import Received
from forkshm.errors import ChannelBrokenError
from forkshm.pickler import pack
from forkshm.region.blocks._arena import arena
from forkshm.region.blocks._segment import forget_abandoned


def open_fds():
    arena.statistics()  # returned blocks may keep fds until this look
    return system.open_fds()


def message(*things, kind=Kind.RESULT, number=7, group=0):
    """Return a message as it arrives: the payloads are closed, and the receiver owns the fds."""
    payloads = [pack(thing) for thing in things]
    data, fds = write_message(kind, number, *payloads, group=group)
    received = Received(data, [kernel.duplicate(fd) for fd in fds])
    for payload in payloads:
        payload.close()
    return received


def refuse_and_leave_nothing(received):
    with pytest.raises(ChannelBrokenError) as caught:
        read_message(received)
    assert received.fds == []
    return str(caught.value)


# -- whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("number", [0, 1, 2**64 - 1])
def test_kind_number_and_group_are_read_back(kind, number):
    received = message("payload", kind=kind, number=number, group=number // 3)
    assert read_header(received.data)[:3] == (kind, number, number // 3)
    read = read_message(received)
    assert (read.kind, read.number, read.group) == (kind, number, number // 3)
    assert type(read.kind) is Kind


@pytest.mark.parametrize("count", [0, 1, 2, 255])
def test_payloads_are_read_back_in_order(count):
    read = read_message(message(*range(count)))
    assert [payload.open() for payload in read.payloads] == list(range(count))


def test_payloads_with_blocks_and_regions_are_read_back():
    with anonymous_shared_memory(100) as region:
        things = [b"x" * 100_000, region, 3, [region, b"y" * 50_000]]
        read = read_message(message(*things))
        assert [payload.open() for payload in read.payloads] == things
        del read


def test_the_function_of_a_known_group_is_passed_over_and_its_fds_are_closed():
    before = open_fds()
    received = message(b"x" * 100_000, "argument", kind=Kind.MAP, group=5)
    read = read_message(received, known_groups={5})
    assert read.payloads[0] is None
    assert read.payloads[1].open() == "argument"
    assert open_fds() == before
    assert arena.statistics().blocks == 0


def test_a_small_answer_is_opened_in_the_short_way_and_no_other():
    assert open_answer(message({"a": 1}).data) == {"a": 1}
    with pytest.raises(LookupError):
        open_answer(message(1, 2).data)
    large = message(b"x" * 100_000)
    with pytest.raises(LookupError):
        open_answer(large.data)
    read_message(large)


# -- broken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "telling"),
    [
        (b"", "received 0 bytes, too few"),
        (b"fsm", "received 3 bytes, too few"),
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "not a message of forkshm 1: b'GET / HTTP/1.1"),
        (bytes(24), "not a message"),
        (bytes(range(23)), "too few"),
    ],
)
def test_malformed_messages_are_refused_with_the_reason(data, telling):
    with pytest.raises(ChannelBrokenError, match=telling):
        read_header(data)
    refuse_and_leave_nothing(Received(data, [os.memfd_create("beside")]))


@pytest.mark.parametrize(("position", "value"), [(0, 0), (3, 0), (3, 2), (4, 0), (4, 200)])
def test_another_version_or_kind_is_refused(position, value):
    data = bytearray(message(1).data)
    data[position] = value
    with pytest.raises(ChannelBrokenError):
        read_header(bytes(data))


def test_a_message_with_bytes_or_fds_too_many_is_refused():
    received = message(1)
    assert "1 bytes and 0 fds too many" in refuse_and_leave_nothing(Received(received.data + b"x", []))
    beside = [os.memfd_create("beside")]
    assert "0 bytes and 1 fds too many" in refuse_and_leave_nothing(Received(received.data, beside))


@pytest.fixture(params=["plain", "block", "region", "mixed"])
def things(request):
    """Return the object to send, which is created here because the value of a fixture outlives the end of the test."""
    return {
        "plain": lambda region: (1, "text", [2.5]),
        "block": lambda region: (b"x" * 30_000,),
        "region": lambda region: (region, [region, 1]),
        "mixed": lambda region: ("f", [region, bytearray(30_000)], b"y" * 30_000),
    }[request.param]


def test_a_message_cut_anywhere_is_refused_and_leaves_nothing_open(things):
    with anonymous_shared_memory(5000) as region:
        length = len(message_data(things(region)))
        for cut in range(length):
            received = message(*things(region))
            refuse_and_leave_nothing(Received(received.data[:cut], received.fds))
        gc.collect()  # the tracebacks keep what was received until then


def message_data(sent):
    received = message(*sent)
    for fd in received.fds:
        kernel.close(fd)
    return received.data


def flip_and_read(received, bits):
    changed = bytearray(received.data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    changed = Received(bytes(changed), received.fds)
    try:
        read = read_message(changed)
    except (ForkshmError, OSError):
        read = None
    assert changed.fds == []
    return read


def test_a_message_with_flipped_bits_is_refused_or_read_and_leaves_nothing_open(things):
    """Nothing but our errors and the kernel's is raised; the pickle stream is not opened."""
    chance = random.Random(11)
    forget_abandoned()
    with anonymous_shared_memory(5000) as region:
        before = None
        size = len(message_data(things(region))) * 8
        for turn in range(300):
            bits = [turn] if turn < min(size, 200) else chance.sample(range(size), chance.choice([1, 2, 8]))
            flip_and_read(message(*things(region)), bits)
            if turn == 0:
                forget_abandoned()
                gc.collect()
                before = open_fds()
        forget_abandoned()
        gc.collect()
        assert len(open_fds()) <= len(before)


def test_random_bytes_behind_a_good_header_are_refused():
    chance = random.Random(12)
    header = message(1).data[:24]
    for _ in range(300):
        received = Received(header + chance.randbytes(chance.randrange(80)), [os.memfd_create("beside")])
        try:
            read_message(received)
        except (ForkshmError, OSError):
            pass
        assert received.fds == []
    forget_abandoned()


@pytest.mark.needs("fds_of_files")
def test_fds_that_are_no_memory_are_refused_and_closed():
    with anonymous_shared_memory(5000) as region:
        for thing in (region, b"x" * 100_000):
            received = message(thing)
            for fd in received.fds:
                kernel.close(fd)
            read_end, write_end = os.pipe()
            os.close(write_end)
            with pytest.raises((ForkshmError, OSError)):
                read_message(Received(received.data, [read_end]))
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(read_end)
