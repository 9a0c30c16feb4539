"""The wire form of a payload's head and tables is read back, or refused."""

from __future__ import annotations

import pytest

from forkshm.descriptor._tables import (
    BLOCK,
    COPIED_IN,
    INLINE,
    LOOSE,
    READ_ONLY,
    BlockRef,
    Head,
    RegionRef,
    Span,
    body_tables,
    is_plain,
    read_head,
    read_tables,
    write_plain,
    write_tables,
)
from forkshm.errors import ChannelBrokenError
from forkshm.region import Mode
from forkshm.region.blocks._claim import Share

STREAM = b"the pickle stream"
# The size of the segment that has the blocks of these tests.
SEGMENT = 2**24

REGIONS = [
    RegionRef(0, 4096, Mode.read_write),
    RegionRef(4099, 77, Mode.read_only),
    RegionRef(2**40, 2**41, Mode.read_private),
    RegionRef(8192, 4096, Share.private),
]
SPANS = [Span(0, 0, 4096), Span(1, 70, 7), Span(2, 2**40, 2**40), Span(0, 17, 0)]
IN_BLOCK = [Span(BLOCK, 0, 100), Span(BLOCK, 8000, 192)]

PAYLOADS = {
    "plain": (None, [], []),
    "regions": (None, REGIONS, SPANS),
    "block": (BlockRef(8192, 8192, private=False), [], IN_BLOCK),
    "both": (BlockRef(0, 8192, private=True), REGIONS, [*IN_BLOCK, *SPANS]),
}


def wire(block, regions, spans, *, body_in_block=False):
    body = body_tables(regions, spans) + STREAM
    head = write_tables(Head(block, body_in_block, len(regions), len(spans), len(body)))
    return (head, body) if body_in_block else (head + body, None)


def parse(data, body=None, position=0):
    """Read tables as the pickler does, but without memory; the checks are those of claiming a block."""
    head, start = read_head(data, position)
    if head.block is not None and head.block.offset + head.block.size > SEGMENT:
        raise ChannelBrokenError("claim would have refused it")
    if head.body_in_block:
        view = memoryview((body or b"").ljust(head.body_size, b"\xee"))[: head.body_size]
    else:
        view = memoryview(data)[start : start + head.body_size]
    assert len(view) == head.body_size
    return head, read_tables(head, view), bytes(view[read_tables(head, view).stream :])


@pytest.fixture(params=[*PAYLOADS, "block, body in it", "both, body in it"])
def payload(request):
    name, _, where = request.param.partition(", ")
    return wire(*PAYLOADS[name], body_in_block=bool(where))


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("position", [0, 24])
def test_written_tables_are_read_back(name, position):
    block, regions, spans = PAYLOADS[name]
    data, _ = wire(block, regions, spans)
    head, tables, stream = parse(b"x" * position + data, position=position)
    assert head.block == block
    assert head.fds == len(regions) + (block is not None)
    assert list(tables.regions) == regions
    assert list(tables.spans) == spans
    assert stream == STREAM


def test_the_objects_of_many_files_are_read_back():
    named = [(0, 2**64 - 1), (7, 8), (1, 2), (3, 4)]
    body = body_tables(REGIONS, SPANS, None, named) + STREAM
    head, tables, stream = parse(
        write_tables(Head(None, False, len(REGIONS), len(SPANS), len(body), identities=True)) + body
    )
    assert head.identities
    assert (list(tables.identities), stream) == (named, STREAM)
    assert_in_bounds(head, tables)


def test_a_body_in_the_block_is_read_back():
    block, regions, spans = PAYLOADS["both"]
    data, body = wire(block, regions, spans, body_in_block=True)
    head, tables, stream = parse(data, body)
    assert head.body_in_block
    assert (list(tables.regions), list(tables.spans), stream) == (regions, spans, STREAM)


def test_a_plain_payload_is_recognised_and_no_other():
    data = write_plain(len(STREAM)) + STREAM
    assert data == wire(None, [], [])[0]
    assert data[is_plain(data, 0) :] == STREAM
    for name in ("regions", "block", "both"):
        assert is_plain(wire(*PAYLOADS[name])[0], 0) == 0
    assert is_plain(data[:12], 0) == is_plain(b"", 0) == 0


def test_a_payload_cut_anywhere_is_refused(payload):
    data, body = payload
    for length in range(len(data)):
        with pytest.raises(ChannelBrokenError):
            parse(data[:length], body)


def assert_in_bounds(head, tables):
    regions = [RegionRef(*ref) for ref in tables.regions]
    for ref in regions:
        assert ref.size >= 1
        assert 0 <= ref.offset
        assert ref.offset + ref.size < 2**63
    for span in (Span(*span) for span in tables.spans):
        copies = {BLOCK: head.block and head.block.size, INLINE: head.inline, LOOSE: head.block and head.block.size}
        copies |= {region - READ_ONLY: room for region, room in copies.items()}
        if span.region <= COPIED_IN:
            assert isinstance(regions[COPIED_IN - span.region].mode, Share)
            copies[span.region] = regions[COPIED_IN - span.region].size
        assert span.region in copies or 0 <= span.region < len(tables.regions)
        room = copies[span.region] if span.region < 0 else regions[span.region].size
        assert 0 <= span.offset
        assert 0 <= span.nbytes
        assert span.offset + span.nbytes <= room
    assert 0 <= tables.stream <= head.body_size


def test_a_payload_with_any_bit_flipped_is_refused_or_stays_within_its_memory(payload):
    data, body = payload
    refused = 0
    for position in range(len(data) * 8):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        try:
            head, tables, _ = parse(bytes(changed), body)
        except ChannelBrokenError:
            refused += 1
        else:
            assert_in_bounds(head, tables)
    assert refused


def test_a_body_with_any_bit_flipped_in_the_block_is_refused_or_stays_within_its_memory():
    data, body = wire(*PAYLOADS["both"], body_in_block=True)
    for position in range(len(body) * 8):
        changed = bytearray(body)
        changed[position // 8] ^= 1 << position % 8
        try:
            head, tables, _ = parse(data, bytes(changed))
        except ChannelBrokenError:
            continue
        assert_in_bounds(head, tables)


@pytest.mark.parametrize(
    ("block", "regions", "spans", "telling"),
    [
        (None, [], [Span(BLOCK, 0, 1)], "there are 0"),
        (BlockRef(0, 4096, private=False), [], [Span(BLOCK, 4096, 1)], "span of 1 bytes at 4,096, but there are 4,096"),
        (None, REGIONS, [Span(1, 0, 78)], "span of 78 bytes"),
        (None, REGIONS, [Span(4, 0, 1)], "span of region 4, but there are 4"),
        (None, REGIONS, [Span(INLINE, 0, 1)], "there are 0"),
        (None, REGIONS, [Span(LOOSE - 1, 0, 1)], "span of region -6"),
        (None, REGIONS, [Span(LOOSE, 0, 1)], "there are 0"),
        (None, REGIONS, [Span(COPIED_IN - 4, 0, 1)], "span of region -20"),
        (None, REGIONS, [Span(COPIED_IN, 0, 1)], "span of region -16"),
        (None, [RegionRef(0, 0, Mode.read_write)], [], "region of 0 bytes"),
        (None, [RegionRef(2**63, 1, Mode.read_write)], [], "region of 1 bytes"),
        (None, [RegionRef(1, 2**63 - 1, Mode.read_write)], [], "region of"),
    ],
)
def test_tables_that_name_missing_memory_are_refused_with_the_values(block, regions, spans, telling):
    data, _ = wire(block, regions, spans)
    with pytest.raises(ChannelBrokenError, match=telling):
        parse(data)


def test_the_pickler_and_the_mode_agree_on_every_mode():
    data, _ = wire(None, [RegionRef(0, 1, mode) for mode in (*Mode, *Share)], [])
    assert [mode for _, _, mode in parse(data)[1].regions] == [*Mode, *Share]


def test_counts_that_do_not_fit_the_body_are_refused_before_anything_is_made_of_them():
    data = write_tables(Head(None, body_in_block=False, regions=2**32 - 1, spans=2**32 - 1, body_size=8)) + bytes(8)
    with pytest.raises(ChannelBrokenError, match="4294967295 regions"):
        parse(data)
