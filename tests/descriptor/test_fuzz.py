"""Descriptors with changed numbers are refused with a reason, or lead to the region that they name."""

from __future__ import annotations

import dataclasses
import gc
import os

import pytest
from fuzzing import EXAMPLES, NUMBERS, changed, try_all
from hypothesis import strategies as st
from system import open_fds

import forkshm
from forkshm.descriptor import describe
from forkshm.descriptor._tables import (
    HANDLE,
    BlockRef,
    Head,
    RegionRef,
    Span,
    body_tables,
    is_plain,
    read_head,
    read_one_region,
    read_tables,
    write_tables,
)
from forkshm.errors import ChannelBrokenError
from forkshm.region import Mode
from forkshm.region.blocks._claim import Share


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_changed_descriptor_is_refused_or_names_the_same_object(examples):
    with forkshm.anonymous_shared_memory(10_000) as region, forkshm.anonymous_shared_memory(100) as other:
        region.buf[:] = bytes(range(250)) * 40
        honest = describe(region)
        strangers = [os.memfd_create("stranger"), *os.pipe()]
        before = open_fds()
        values = st.one_of(
            NUMBERS,
            st.integers(-(2**70), 2**70),
            st.just(10**300),
            st.sampled_from([os.getpid(), os.getppid(), 1, *strangers, describe(other).fd, describe(other).inode]),
        )
        fields = ["pid", "start_time", "fd", "device", "inode", "offset", "size"]
        changes = st.dictionaries(st.sampled_from(fields), values, min_size=1, max_size=3)

        def check(example):
            change, mode = example
            forged = dataclasses.replace(honest, **change, mode=mode)
            try:
                found = forged.attach()
            except forkshm.ForkshmError:
                return
            assert (forged.pid, forged.device, forged.inode) == (honest.pid, honest.device, honest.inode)
            assert 0 <= forged.offset < forged.offset + forged.size <= 10_000
            assert bytes(found.buf) == bytes(region.buf[forged.offset : forged.offset + forged.size])

        try_all(examples, st.tuples(changes, st.sampled_from(list(Mode))), check)
        gc.collect()
        assert open_fds() == before
        for fd in strangers:
            os.close(fd)


REGIONS = [
    RegionRef(0, 4096, Mode.read_write),
    RegionRef(4099, 77, Mode.read_only),
    RegionRef(8192, 4096, Share.private),
    RegionRef(0, 1, HANDLE),
]
SPANS = [Span(0, 0, 4096), Span(1, 70, 7), Span(-1, 0, 100), Span(-2, 3, 5), Span(-3, 8000, 192), Span(3, 0, 1)]


def wires():
    for regions, spans, block in (
        ([], [], None),
        (REGIONS[:1], SPANS[:1], None),
        (REGIONS[:2], SPANS[:2], None),
        (REGIONS, SPANS, BlockRef(8192, 8192, private=True)),
    ):
        inline = 16 if block else 0
        body = body_tables(regions, spans) + b"the pickle stream" + bytes(inline)
        yield write_tables(Head(block, False, len(regions), len(spans), len(body), inline)) + body


@pytest.mark.parametrize("examples", EXAMPLES)
def test_changed_tables_are_refused_or_stay_within_their_memory(examples):
    def check(data):
        if start := is_plain(data, 0):
            assert start <= len(data)
        if (one := read_one_region(data, 0)) is not None:
            (offset, size, _), (_, first, nbytes), stream, end = one
            assert 0 <= offset < offset + size < 2**63
            assert 0 <= first <= first + nbytes <= size
            assert stream <= end <= len(data)
        try:
            head, body = read_head(data, 0)
            if head.body_in_block:
                return
            tables = read_tables(head, memoryview(data)[body : body + head.body_size])
        except ChannelBrokenError:
            return
        assert len(tables.regions) == head.regions
        assert tables.stream <= head.body_size - head.inline
        for region, offset, nbytes in tables.spans:
            if region >= 0:
                room = tables.regions[region][1]
            elif region in (-1, -3):
                room = head.block.size
            else:
                room = head.inline
            assert 0 <= offset <= offset + nbytes <= room

    try_all(examples, changed(list(wires())), check)
