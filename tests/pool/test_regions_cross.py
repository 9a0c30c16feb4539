"""Regions of every kind, and parts of them, sent through a Pool: what arrives, and which writes are seen."""

from __future__ import annotations

import copy
import os
import pickle
import secrets

import functions as f
import pytest
import started
from system import in_pages

import forkshm
from forkshm import (
    FileMapping,
    MappedRegion,
    NotPicklableError,
    Pool,
    SharedMemoryObject,
    anonymous_shared_memory,
    remove_on_exit,
)
from forkshm.backend import kernel
from forkshm.errors import RegionClosedError

PAGE = kernel.page_size
SIZE = 3 * PAGE + 5
KINDS = ["named", "file", "anonymous"]


def pattern(size):
    return bytes(position % 251 for position in range(size))


@pytest.fixture(params=KINDS)
def mappable(request, tmp_path):
    """Provide an object of SIZE bytes that contains the pattern."""
    if request.param == "named":
        name = f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"
        with remove_on_exit(name), SharedMemoryObject("create_only", name) as made:
            made.truncate(SIZE)
            with MappedRegion(made) as region:
                region.buf[:] = pattern(SIZE)
            yield made
    elif request.param == "file":
        (tmp_path / "file").write_bytes(pattern(SIZE))
        with FileMapping(tmp_path / "file") as made:
            yield made
    else:
        with anonymous_shared_memory(SIZE) as made:
            made.buf[:] = pattern(SIZE)
            yield made


def content_of(mappable):
    with MappedRegion(mappable, "read_only") as whole:
        return bytes(whole.buf)


def look(region):
    return type(region).__name__, region.mode.value, region.offset, region.size, bytes(region.buf), region.buf.readonly


def fill(region, value):
    region.buf[:] = bytes([value]) * region.size
    return os.getpid()


PARTS = [(0, None), (1, None), (PAGE - 1, 2), (PAGE, PAGE), (PAGE + 1, PAGE + 1), (SIZE - 1, 1)]


@pytest.mark.parametrize(("offset", "size"), PARTS, ids=in_pages)
def test_the_whole_or_a_part_arrives_and_writes_are_seen(pool, mappable, offset, size):
    with MappedRegion(mappable, offset=offset, size=size) as region:
        expected = pattern(SIZE)[offset:][:size]
        before = pool.statistics()
        assert pool.apply(look, (region,)) == ("MappedRegion", "read_write", offset, len(expected), expected, False)
        assert pool.apply(fill, (region, 255)) != os.getpid()
        assert bytes(region.buf) == b"\xff" * region.size
        # No byte around the part was sent.
        content = content_of(mappable)
        assert content == pattern(SIZE)[:offset] + b"\xff" * region.size + pattern(SIZE)[offset + region.size :]
        # The same in the other direction.
        region.buf[0] = 7
        assert pool.apply(lambda region: region.buf[0], (region,)) == 7
        assert pool.statistics().bytes_shared - before.bytes_shared == 3 * region.size


@pytest.mark.parametrize("mode", ["read_only", "read_private"])
def test_a_read_only_region_arrives_read_only(pool, mappable, mode):
    with MappedRegion(mappable, mode, offset=5) as region:
        arrived = pool.apply(look, (region,))
        assert arrived == ("MappedRegion", mode, 5, SIZE - 5, pattern(SIZE)[5:], True)
        with pytest.raises(TypeError, match="read-only"):
            pool.apply(fill, (region, 1))
        with MappedRegion(mappable) as writer:
            writer.buf[5] = 9
            if mode == "read_only":
                assert pool.apply(look, (region,))[4][0] == 9
    assert pool.statistics().workers_replaced == 0


def test_an_object_opened_for_reading_arrives_for_reading(pool, tmp_path):
    (tmp_path / "file").write_bytes(pattern(SIZE))
    os.chmod(tmp_path / "file", 0o400)
    with FileMapping(tmp_path / "file", "read_only") as file, MappedRegion(file, "read_only", offset=1) as region:
        assert pool.apply(look, (region,)) == ("MappedRegion", "read_only", 1, SIZE - 1, pattern(SIZE)[1:], True)


def overwrite(region, position, value):
    region.buf[position] = value
    return region


@pytest.mark.parametrize(("offset", "size"), PARTS, ids=in_pages)
def test_a_copy_on_write_region_arrives_with_its_writes(pool, mappable, offset, size):
    content = pattern(SIZE)[offset:][:size]
    with MappedRegion(mappable, "copy_on_write", offset, size) as region:
        assert pool.apply(look, (region,)) == ("MappedRegion", "copy_on_write", offset, len(content), content, False)
        region.buf[-1] = 255
        written = content[:-1] + b"\xff"
        assert pool.apply(look, (region,))[4] == written
        # Back again, with the worker's writes.
        returned = pool.apply(overwrite, (region, 0, 254))
        assert look(returned)[1:5] == ("copy_on_write", offset, region.size, b"\xfe" + written[1:])
        assert bytes(region.buf) == written
        assert content_of(mappable) == pattern(SIZE)
        returned.close()


@pytest.mark.needs("seals")
def test_a_sealed_region_arrives_read_only_and_the_creator_goes_on(pool):
    with anonymous_shared_memory(SIZE) as region:
        region.seal()
        region.buf[:] = pattern(SIZE)
        assert pool.apply(look, (region,)) == ("MappedRegion", "read_only", 0, SIZE, pattern(SIZE), True)
        with pytest.raises(TypeError, match="read-only"):
            pool.apply(fill, (region, 1))
        region.buf[0] = 9
        assert pool.apply(look, (region,))[4][0] == 9
        # On its way back it has the same mode as before.
        with pool.apply(lambda region: region, (region,)) as back:
            assert (back.mode, back.buf[0]) == ("read_only", 9)
            assert region.mode == "read_write"


@pytest.mark.parametrize("from_back", [True, False])
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE + 1, SIZE - 1], ids=in_pages)
def test_a_shrunk_region_arrives_shrunk(pool, mappable, nbytes, from_back):
    with MappedRegion(mappable) as region:
        pool.apply(look, (region,))  # the worker has the whole
        region.shrink_by(nbytes, from_back)
        start = 0 if from_back else nbytes
        expected = pattern(SIZE)[start : start + SIZE - nbytes]
        assert pool.apply(look, (region,))[2:5] == (start, SIZE - nbytes, expected)
        pool.apply(fill, (region, 255))
        assert content_of(mappable).count(255) == SIZE - nbytes


def test_a_shrunk_file_region_keeps_its_offset_in_the_file(pool, mappable):
    with MappedRegion(mappable, offset=PAGE - 1) as region:
        region.shrink_by(3, from_back=False)
        assert pool.apply(look, (region,))[2:5] == (PAGE + 2, SIZE - PAGE - 2, pattern(SIZE)[PAGE + 2 :])


@pytest.mark.needs("inheritance")
def test_a_region_made_before_the_pool_is_the_one_the_workers_inherited(mappable):
    with MappedRegion(mappable, offset=1, size=PAGE) as region, Pool(1) as pool:
        address = region.address
        # The worker has it mapped already, and does not map it again.
        assert pool.apply(lambda region: region.address, (region,)) == address
        pool.apply(fill, (region, 3))
        assert set(region.buf) == {3}


def test_a_worker_keeps_a_mapping_while_it_holds_the_region(mappable):
    def held_now(value):
        held = f.get_state()
        held.buf[0] = value
        return held.address, held.size, held.closed

    with MappedRegion(mappable, offset=3) as whole, Pool(1) as one, MappedRegion(whole, offset=4) as region:
        one.apply(f.set_state, (region,))
        address, *_ = one.apply(held_now, (77,))
        assert region.buf[0] == 77
        assert one.apply(lambda region: region.address, (region,)) == address  # it is not mapped again
        region.close()
        assert one.apply(held_now, (78,)) == (address, SIZE - 4, False)
        assert whole.buf[1] == 78


def test_regions_of_one_object_that_overlap_stay_two_and_share_bytes(pool, mappable):
    def through_one(first, second):
        first.buf[PAGE] = 99
        return first is second, second.buf[0], first.offset, second.offset

    with MappedRegion(mappable, size=2 * PAGE) as first, MappedRegion(mappable, offset=PAGE) as second:
        assert pool.apply(through_one, (first, second)) == (False, 99, 0, PAGE)
        assert second.buf[0] == 99


def test_one_region_twice_arrives_as_one(pool, mappable):
    with MappedRegion(mappable, offset=1) as region:
        assert pool.apply(lambda a, b: a is b["again"][0], (region, {"again": [region]}))
        assert pool.apply(lambda a: a, (region,)) is region


def test_a_view_of_a_region_crosses_too(pool, mappable):
    np = pytest.importorskip("numpy")

    def write(array):
        array[:] = 1

    with MappedRegion(mappable, offset=1) as region:
        array = np.frombuffer(region.buf, "u1")[PAGE : PAGE + 10]
        pool.apply(write, (array,))
        assert array.tolist() == [1] * 10
        assert content_of(mappable)[PAGE : PAGE + 12] == pattern(SIZE)[PAGE : PAGE + 1] + b"\1" * 10 + bytes(
            [pattern(SIZE)[PAGE + 11]]
        )
        del array


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_that_a_worker_made_comes_back(pool, kind, tmp_path):
    name = f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))

    def make():
        if kind == "named":
            with SharedMemoryObject("create_only", name) as shm:
                shm.truncate(SIZE)
                made = MappedRegion(shm, offset=5)
        elif kind == "file":
            with FileMapping(path) as file:
                made = MappedRegion(file, offset=5)
        else:
            made = anonymous_shared_memory(SIZE - 5)
        made.buf[:] = pattern(SIZE - 5)
        return made

    with remove_on_exit(name), pool.apply(make) as region:
        assert (region.size, region.mode) == (SIZE - 5, "read_write")
        assert bytes(region.buf) == pattern(SIZE - 5)
        pool.apply(fill, (region, 1))
        assert set(region.buf) == {1}


def test_more_than_4_gib_cross_as_a_descriptor(pool):
    with anonymous_shared_memory(4 * 2**30 + PAGE) as region, MappedRegion(region, offset=4 * 2**30 + 1) as part:

        def write(region, part):
            region.buf[-1] = 1
            return part.buf[-1], part.offset, part.size

        before = pool.statistics().bytes_copied
        assert pool.apply(write, (region, part)) == (1, 4 * 2**30 + 1, PAGE - 1)
        assert pool.statistics().bytes_copied == before
        assert part.buf[-1] == 1


def test_a_closed_region_does_not_cross(pool, mappable):
    region = MappedRegion(mappable)
    region.close()
    with pytest.raises((NotPicklableError, RegionClosedError), match="closed"):
        pool.apply(look, (region,))


def itself(thing):
    return thing


class Labelled(SharedMemoryObject):
    label = None


@pytest.fixture(scope="module")
def _resource_tracker():
    # It lives as long as this process.
    with forkshm.get_context("spawn").Pool(1) as pool:
        pool.apply(int)


@pytest.mark.usefixtures("_resource_tracker")
@pytest.mark.parametrize("method", started.methods("fork", "spawn"))
def test_an_opened_object_crosses_without_its_name(mappable, method):
    """An fd number means another file in another process: in a pool of spawn, the number named a pipe."""
    if not isinstance(mappable, (SharedMemoryObject, FileMapping)):
        pytest.skip("it is a region")
    with forkshm.get_context(method).Pool(1) as pool:
        pool.apply(os.getpid)
        type(mappable).remove(mappable.name)
        assert pool.apply(f.map_and_write, (mappable,)) is False
        assert content_of(mappable)[0] == 7
        again = pool.apply(f.itself, (mappable,))
        assert content_of(again) == content_of(mappable)
        assert (type(again), again.name, again.mode) == (type(mappable), mappable.name, mappable.mode)
        again.close()
        mappable.close()
        with pytest.raises(RegionClosedError, match="closed"):
            pool.apply(f.map_and_write, (mappable,))


def test_an_opened_object_keeps_its_class_and_attributes(pool):
    name = f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"
    with remove_on_exit(name), Labelled("create_only", name, "read_write") as opened:
        opened.truncate(10)
        opened.label = "a"
        with pool.apply(itself, (opened,)) as again:
            assert type(again) is Labelled
            assert (again.label, again.size) == ("a", 10)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_opened_object_is_not_pickled_as_a_number(mappable, duplicate):
    """Two objects with one fd number would close it twice."""
    with pytest.raises(NotPicklableError, match="plain pickle cannot carry"):
        duplicate(mappable)


def test_all_workers_write_their_part_of_one_region(pool, mappable):
    with MappedRegion(mappable) as region:

        def write(number):
            region.buf[number * 100 : number * 100 + 100] = bytes([number % 256]) * 100

        pool.map(write, range(SIZE // 100), chunksize=1)
        for number in range(SIZE // 100):
            assert set(region.buf[number * 100 : number * 100 + 100]) == {number % 256}
