"""The address table, which finds the region of an address."""

from __future__ import annotations

import os
import random

import pytest
from system import in_pages

from forkshm import MappedRegion, anonymous_shared_memory
from forkshm.backend import kernel
from forkshm.region import _table
from forkshm.region._attach import region_at
from forkshm.region._table import Mode, mapping_at, mapping_of, round_up

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 10 * PAGE], ids=in_pages)
def test_every_interior_address_is_found(size):
    with anonymous_shared_memory(size) as region:
        for distance in {0, 1, size // 2, size - 1} & set(range(size)):
            assert region_at(region.address + distance) is region


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE], ids=in_pages)
def test_the_address_behind_a_region_is_outside_of_the_region(size):
    regions = [anonymous_shared_memory(size) for _ in range(20)]
    starts = {region.address: region for region in regions}
    for region in regions:
        behind = region.address + size
        found = region_at(behind)
        # A region that existed in the process before may start here.
        assert found is starts.get(behind, found)
        assert found is not region
        assert region_at(region.address - 1) is not region
    assert region_at(0) is None
    assert region_at(2**64) is None


def test_an_address_of_ordinary_memory_is_in_no_region():
    with anonymous_shared_memory(PAGE):
        assert mapping_at(kernel.address_of(bytearray(100))) is None


def test_the_table_agrees_with_a_linear_search_after_many_changes():
    chance = random.Random(3)
    regions = []
    for _ in range(300):
        if regions and chance.random() < 0.45:
            regions.pop(chance.randrange(len(regions))).close()
        else:
            regions.append(anonymous_shared_memory(chance.randrange(1, 5 * PAGE)))
        address = chance.choice(regions).address + chance.randrange(-PAGE, 6 * PAGE) if regions else 1
        expected = [r for r in regions if r.address <= address < r.address + r.size]
        found = region_at(address)
        # Mappings kept by earlier tests of this process may be adjacent.
        assert found is expected[0] if expected else not any(found is r for r in regions)
    assert _table._starts == sorted(_table._starts)


def test_a_region_is_found_again_by_object_part_and_mode():
    with anonymous_shared_memory(2 * PAGE) as region:
        identity, size = kernel.identify(region.fileno())
        assert size == 2 * PAGE
        mapping, window = mapping_of(identity, 0, 2 * PAGE, Mode.read_write)
        assert mapping.address == region.address
        del window
        assert mapping_of(identity, 0, PAGE, Mode.read_write) is None
        assert mapping_of(identity, 1, 2 * PAGE, Mode.read_write) is None
        assert mapping_of(identity, 0, 2 * PAGE, Mode.read_only) is None
        with MappedRegion(region, "read_only") as other:
            mapping, window = mapping_of(identity, 0, 2 * PAGE, Mode.read_only)
            assert mapping.address == other.address
            del window
    assert mapping_of(identity, 0, 2 * PAGE, Mode.read_write) is None


def test_a_region_is_entered_at_the_first_lookup():
    with anonymous_shared_memory(PAGE) as first, anonymous_shared_memory(PAGE) as second:
        assert {first.address, second.address} <= set(_table._new)
        assert region_at(second.address) is second
        assert not _table._new
        assert {first.address, second.address} <= set(_table._starts)
        with anonymous_shared_memory(PAGE) as third:
            assert list(_table._new) == [third.address]
        assert not _table._new
        second.shrink_by(1)
        assert region_at(second.address) is second
        assert region_at(second.address + second.size) is None


def test_closing_takes_the_region_out_before_the_address_is_used_again():
    region = anonymous_shared_memory(PAGE)
    address = region.address
    region.close()
    assert mapping_at(address) is None
    with anonymous_shared_memory(PAGE) as other:
        assert mapping_at(other.address).address == other.address


@pytest.mark.parametrize(
    ("value", "multiple", "rounded"),
    [(0, PAGE, 0), (1, PAGE, PAGE), (PAGE, PAGE, PAGE), (PAGE + 1, PAGE, 2 * PAGE), (2**62 + 1, PAGE, 2**62 + PAGE)],
    ids=["zero", "one", "a page", "more", "huge"],
)
def test_rounding_up(value, multiple, rounded):
    assert round_up(value, multiple) == rounded
