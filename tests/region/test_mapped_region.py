"""The contract of MappedRegion, for every kind of mappable object.

Comments with "Boost 4.11" quote rows of "behavior measured on Boost" for Boost.Interprocess' ``mapped_region``.
"""

from __future__ import annotations

import contextlib
import ctypes  # noqa: TID251 - raw addresses are looked at
import errno
import faulthandler
import gc
import io
import mmap
import os
import secrets
import signal
import sys

import pytest
from capability_skips import has
from system import in_pages, is_mapped, open_fds

from forkshm import FileMapping, MappedRegion, Mode, RegionError, SharedMemoryObject, anonymous_shared_memory
from forkshm.backend import kernel
from forkshm.errors import RegionAddressError, RegionBusyError, RegionClosedError, RegionCreateError
from forkshm.region import Advice
from forkshm.region._attach import region_at

PAGE = os.sysconf("SC_PAGE_SIZE")
GIB = 2**30
# One byte less than a page, a page, one byte more.
EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1]
SIZE = 3 * PAGE + 5
KINDS = ["named object", "file mapping", "open file", "anonymous region", "wrapped memfd"]


class Wrapped:
    """The minimal mappable object: an fd, and a method that returns it."""

    def __init__(self, fd, name=""):
        self.fd = fd
        self.name = name

    def fileno(self):
        return self.fd

    def close(self):
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Handle(Wrapped):
    """Memory with the backend's own kind of fd."""

    _has_kernel_fd = True

    def close(self):
        kernel.close(self.fd)


class Maker:
    """Creates mappable objects of one kind, and removes them."""

    def __init__(self, kind, folder):
        self.kind = kind
        self.folder = folder
        self.cleanup = contextlib.ExitStack()

    def __call__(self, size=SIZE, content=None):
        made = self.cleanup.enter_context(contextlib.closing(self._make(size)))
        if content is not None:
            os.pwrite(made.fileno(), content, 0)
        return made

    def _make(self, size):
        if self.kind == "named object":
            name = f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"
            made = SharedMemoryObject("create_only", name)
            self.cleanup.callback(SharedMemoryObject.remove, name)
            if size > GIB and has("fds_of_files"):
                os.ftruncate(made.fileno(), size)  # truncate() would allocate all the memory now
            else:
                made.truncate(size)
            return made
        if self.kind == "anonymous region":
            return anonymous_shared_memory(size)
        if self.kind == "wrapped memfd":
            if not has("fds_of_files"):  # files have fds of the C library, and memory has handles
                path = self.folder / secrets.token_hex(8)
                path.write_bytes(b"")
                os.truncate(path, size)
                return Wrapped(os.open(path, os.O_RDWR | os.O_BINARY), path)
            fd = os.memfd_create("forkshm-region-test", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            return Wrapped(fd)
        path = self.folder / secrets.token_hex(8)
        with open(path, "wb") as file:
            file.truncate(size)
        return FileMapping(path) if self.kind == "file mapping" else open(path, "r+b")

    def for_reading(self, made):
        """Open the same object again, read-only."""
        if self.kind == "named object":
            opened = SharedMemoryObject("open_only", made.name, "read_only")
        elif self.kind == "file mapping":
            opened = FileMapping(made.name, "read_only")
        elif self.kind == "open file":
            opened = open(made.name, "rb")
        elif not has("fds_of_files") and self.kind == "wrapped memfd":
            opened = Wrapped(os.open(made.name, os.O_RDONLY | os.O_BINARY))
        elif not has("fds_of_files"):
            opened = Handle(kernel.read_only(made.fileno()))
        else:
            opened = open(f"/proc/self/fd/{made.fileno()}", "rb")
        return self.cleanup.enter_context(contextlib.closing(opened))


@pytest.fixture(params=KINDS)
def make(request, tmp_path):
    """Create a mappable object of *size* bytes that starts with *content*."""
    maker = Maker(request.param, tmp_path)
    with maker.cleanup:
        yield maker


def content_of(mappable, size=SIZE + 1):
    fd = mappable.fileno()
    # A file has an fd of the C library, which on POSIX is the kernel's.
    known = kernel.of_file(fd) if isinstance(mappable, (io.IOBase, Wrapped)) else fd
    return os.pread(fd, min(size, kernel.identify(known)[1]), 0)


def pattern(size):
    return bytes(position % 251 for position in range(size))


def resident(address):
    """Return the bytes in memory of the mapping that starts at *address*."""
    with open("/proc/self/smaps") as maps:
        here = False
        for line in maps:
            first, _, rest = line.partition(" ")
            if "-" in first:
                here = int(first.partition("-")[0], 16) == address
            elif here and first == "Rss:":
                return int(rest.split()[0]) * 1024
    raise LookupError(hex(address))


@pytest.fixture(scope="module")
def free_address():
    """Return an address with nothing around it, a different one at each call.

    It is half a GiB inside of a free range; other mappings are placed at the ends of the range.
    """
    with anonymous_shared_memory(GIB) as region:
        middle = region.address + GIB // 2
    middle -= middle % PAGE
    steps = iter(range(10_000))
    return lambda: middle + next(steps) * 16 * PAGE


# -- modes ----------------------------------------------------------------------------


class TestModes:
    def test_read_write_writes_reach_the_object_and_every_mapping(self, make):
        mappable = make(content=pattern(SIZE))
        with MappedRegion(mappable, "read_write") as region, MappedRegion(mappable, "read_only") as other:
            for position in (*EDGES, SIZE - 1):
                region.buf[position] = 255
                assert other.buf[position] == content_of(mappable)[position] == 255

    def test_parent_and_forked_child_see_each_others_writes(self, make, in_child):
        with MappedRegion(make()) as region:
            region.buf[0] = 1

            def answer():
                assert region.buf[0] == 1
                region.buf[SIZE - 1] = 2

            assert in_child(answer) == 0
            assert region.buf[SIZE - 1] == 2

    def test_a_child_that_maps_the_object_itself_sees_and_is_seen(self, make, in_child):
        mappable = make()
        with MappedRegion(mappable) as region:

            def answer():
                with MappedRegion(mappable, offset=1, size=PAGE) as its_own:
                    its_own.buf[:3] = b"abc"

            assert in_child(answer) == 0
            assert bytes(region.buf[:5]) == b"\0abc\0"

    def test_copy_on_write_writes_are_private(self, make, in_child):
        mappable = make(content=pattern(SIZE))
        with MappedRegion(mappable, "copy_on_write") as region:
            region.buf[PAGE - 1 : PAGE + 1] = b"xy"
            assert bytes(region.buf[PAGE - 1 : PAGE + 1]) == b"xy"
            assert content_of(mappable) == pattern(SIZE)

            def look():  # a child gets a copy of the memory
                assert region.buf[PAGE] == ord("y")
                region.buf[PAGE] = 0

            assert in_child(look) == 0
            assert region.buf[PAGE] == ord("y")

    def test_copy_on_write_sees_others_writes_on_unwritten_pages(self, make):
        mappable = make()
        with MappedRegion(mappable, "copy_on_write") as region, MappedRegion(mappable) as writer:
            writer.buf[SIZE - 1] = 3
            assert region.buf[SIZE - 1] == 3

    @pytest.mark.parametrize("mode", ["read_only", "read_private"])
    def test_a_mode_for_reading_reads_and_refuses_to_write(self, make, mode):
        mappable = make(content=pattern(SIZE))
        with MappedRegion(mappable, mode) as region:
            assert (region.mode, bytes(region.buf)) == (mode, pattern(SIZE))
            assert region.buf.readonly
            with pytest.raises(TypeError):
                region.buf[0] = 1
            with pytest.raises(TypeError):
                region.buf[:] = bytes(SIZE)

    def test_read_only_regions_see_others_writes(self, make):
        mappable = make()
        with MappedRegion(mappable, "read_only") as region, MappedRegion(mappable) as writer:
            writer.buf[SIZE - 1] = 4
            assert region.buf[SIZE - 1] == 4

    @pytest.mark.parametrize("mode", ["read_only", "read_private"])
    def test_forcing_a_write_to_a_read_only_region_kills_the_process(self, make, mode, in_child):
        def write():
            faulthandler.disable()  # otherwise it prints all stacks
            ctypes.memset(region.address, 1, 1)

        with MappedRegion(make(), mode) as region:
            assert in_child(write) == -signal.SIGSEGV

    # Boost 4.11: "read_write map of a read_only object": security_error, EACCES.
    def test_an_object_opened_for_reading_cannot_be_mapped_read_write(self, make):
        opened = make.for_reading(make(content=pattern(SIZE)))
        before = open_fds()
        with pytest.raises(RegionCreateError, match="does not allow a read_write mapping") as caught:
            MappedRegion(opened)
        assert (caught.value.errno, caught.value.size) == (errno.EACCES, SIZE)
        assert open_fds() == before
        for mode in ("read_only", "copy_on_write", "read_private"):
            with MappedRegion(opened, mode) as region:
                assert bytes(region.buf) == pattern(SIZE)

    @pytest.mark.parametrize("mode", ["invalid_mode", "READ_WRITE", None, 0])
    def test_a_mode_that_is_none_is_refused(self, make, mode):
        with pytest.raises(ValueError, match=repr(mode)):
            MappedRegion(make(), mode)


# Boost 4.11: "region of anonymous_shared_memory": get_mode() says read_only there, although it is writable.
def test_an_anonymous_region_has_mode_read_write():
    with anonymous_shared_memory(10) as region:
        assert region.mode is Mode.read_write
        region.buf[:] = b"0123456789"


# -- the mapped part ------------------------------------------------------------------


class TestPart:
    @pytest.mark.parametrize("offset", [*EDGES, SIZE - 1], ids=in_pages)
    def test_any_offset_and_any_size(self, make, offset):
        mappable = make(content=pattern(SIZE))
        for size in (None, 1, PAGE - 1, PAGE, PAGE + 1):
            expected = pattern(SIZE)[offset:][:size]
            if size is not None and offset + size > SIZE:
                with pytest.raises(ValueError, match="reaches past the end"):
                    MappedRegion(mappable, offset=offset, size=size)
                continue
            with MappedRegion(mappable, offset=offset, size=size) as region:
                assert (region.offset, region.size, len(region)) == (offset, len(expected), len(expected))
                assert bytes(region.buf) == expected
                assert region.buf.nbytes == len(expected)
                region.buf[-1] = 255
                assert content_of(mappable)[offset + region.size - 1] == 255
                region.buf[-1] = expected[-1]

    @pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1], ids=in_pages)
    def test_objects_of_any_size_are_mapped_to_their_end(self, make, size):
        with MappedRegion(make(size, pattern(size))) as region:
            assert bytes(region.buf) == pattern(size)

    # Boost 4.11: "map an object of size 0": invalid_argument, EINVAL.
    @pytest.mark.parametrize("size", [None, 1])
    def test_an_object_of_no_bytes_cannot_be_mapped(self, make, size):
        if make.kind == "anonymous region":
            with pytest.raises(ValueError, match="at least 1 byte, got 0"):
                make(0)
            return
        with pytest.raises(ValueError, match="0 bytes"):
            MappedRegion(make(0), size=size)

    # Boost 4.11: "offset past the end": size_error.
    def test_an_offset_outside_of_the_object_is_refused_with_both_values(self, make):
        mappable = make()
        before = open_fds()
        for offset in (SIZE, SIZE + 1, SIZE + PAGE, -1, 2**63, 2**64):
            with pytest.raises(ValueError, match=f"offset must be within the object's {SIZE:,} bytes, got {offset:,}"):
                MappedRegion(mappable, offset=offset)
        assert open_fds() == before

    def test_a_size_that_the_object_has_not_is_refused(self, make):
        mappable = make()
        before = open_fds()
        for size in (0, -1, SIZE + 1, SIZE + PAGE, 2**63, 2**64):
            with pytest.raises(ValueError, match=r"at least 1 byte|past the end|at most"):
                MappedRegion(mappable, size=size)
        assert open_fds() == before

    def test_bytes_beyond_4_gib(self, make):
        whole = 4 * GIB + 2 * PAGE + 3
        mappable = make(whole)
        with MappedRegion(mappable) as region:
            assert region.size == whole
            region.buf[4 * GIB + 1] = 7
            region.buf[-1] = 8
        with MappedRegion(mappable, offset=4 * GIB + 1) as region:
            assert (region.offset, region.size) == (4 * GIB + 1, 2 * PAGE + 2)
            assert (region.buf[0], region.buf[-1]) == (7, 8)
            region.flush(PAGE + 1, 5)
            region.shrink_by(PAGE, from_back=False)
            assert (region.offset, region.buf[-1]) == (4 * GIB + PAGE + 1, 8)

    def test_parts_that_overlap_are_the_same_bytes(self, make):
        mappable = make()
        with MappedRegion(mappable, size=2 * PAGE) as first, MappedRegion(mappable, offset=PAGE + 5) as second:
            assert first.address != second.address
            first.buf[PAGE + 5] = 1
            second.buf[1] = 2
            assert (second.buf[0], first.buf[PAGE + 6]) == (1, 2)
            assert region_at(first.address + PAGE + 5) is first
            assert region_at(second.address) is second

    def test_one_part_mapped_twice_are_two_regions(self, make):
        mappable = make()
        with MappedRegion(mappable) as first, MappedRegion(mappable) as second:
            assert first.address != second.address
            first.close()
            second.buf[0] = 1
            assert content_of(mappable)[0] == 1

    def test_a_region_can_be_mapped_from_a_region(self, make):
        with (
            MappedRegion(make(content=pattern(SIZE)), offset=PAGE + 1) as region,
            MappedRegion(region, "read_only") as again,
        ):
            # The offset is relative to the object, not to the region that names it.
            assert bytes(again.buf) == pattern(SIZE)


# -- lifetime -------------------------------------------------------------------------


class TestLifetime:
    def test_a_region_outlives_its_mappable(self, make):
        mappable = make(content=pattern(SIZE))
        region = MappedRegion(mappable)
        mappable.close()
        del mappable
        gc.collect()
        assert bytes(region.buf) == pattern(SIZE)
        region.buf[0] = 9
        with MappedRegion(region, "read_only") as again:
            assert again.buf[0] == 9
        region.close()

    @pytest.mark.needs("cut_files", only="file mapping")
    @pytest.mark.parametrize("make", ["named object", "file mapping"], indirect=True)
    def test_a_region_outlives_the_name(self, make):
        mappable = make(content=pattern(SIZE))
        region = MappedRegion(mappable)
        assert type(mappable).remove(mappable.name)
        assert not type(mappable).remove(mappable.name)
        region.buf[0] = 9
        assert (region.buf[0], region.buf[1]) == (9, 1)
        region.close()

    def test_a_closed_object_cannot_be_mapped(self, make):
        mappable = make()
        mappable.close()
        with pytest.raises((RegionError, ValueError), match=r"closed|its fd is not open") as caught:
            MappedRegion(mappable)
        if isinstance(caught.value, OSError):
            assert caught.value.errno == errno.EBADF

    def test_a_closed_region_cannot_be_used(self, make):
        region = MappedRegion(make())
        region.close()
        region.close()
        assert region.closed
        assert (region.size, region.mode, region.offset) == (SIZE, "read_write", 0)
        for use in (
            lambda: region.buf,
            lambda: region.address,
            region.fileno,
            region.flush,
            lambda: region.advise("normal"),
            lambda: region.shrink_by(0),
            lambda: region.shrink_by(1),
            region.seal,
            region.__enter__,
            lambda: MappedRegion(region),
        ):
            with pytest.raises(RegionClosedError, match="closed in this process"):
                use()

    def test_a_view_keeps_the_memory_and_says_so(self, make):
        region = MappedRegion(make(content=b"abc"))
        address, view = region.address, region.buf[1:2]
        with pytest.raises(RegionBusyError) as caught:
            region.close()
        assert caught.value.exports == 1
        del caught  # its traceback holds the region
        assert not region.closed
        del region
        gc.collect()
        assert (bytes(view), is_mapped(address)) == (b"b", True)
        view.release()
        del view
        gc.collect()
        assert region_at(address) is None

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="Python calls __buffer__ since 3.12")
    def test_a_region_is_a_buffer(self, make):
        with MappedRegion(make(content=pattern(SIZE))) as region:
            with memoryview(region) as view:
                assert bytes(view) == pattern(SIZE)
                view[0] = 7
                with pytest.raises(RegionBusyError):
                    region.close()
            assert region.buf[0] == 7
        with MappedRegion(make(), "read_only") as region, memoryview(region) as view:
            assert view.readonly
            del view


# -- page size and fixed addresses ----------------------------------------------------


class TestAddress:
    def test_the_page_size_is_the_systems(self, make):
        assert MappedRegion.page_size() == PAGE
        with MappedRegion(make()) as region:
            assert region.page_size() == PAGE

    def test_a_free_address_is_taken_exactly(self, make, free_address):
        address = free_address()
        with MappedRegion(make(content=pattern(SIZE)), address=address) as region:
            assert region.address == address
            assert bytes(region.buf) == pattern(SIZE)
            assert region_at(address + SIZE - 1) is region
        assert not is_mapped(address)
        with MappedRegion(make(), "read_only", PAGE, 2 * PAGE, address) as region:
            assert (region.address, region.offset, region.size) == (address, PAGE, 2 * PAGE)

    # Boost 4.11: "fixed address already used": busy_error.
    @pytest.mark.parametrize("shift", [0, -2 * PAGE, PAGE, -PAGE], ids=["exactly", "its front", "inside", "across"])
    def test_a_used_address_is_refused_and_its_mapping_stays(self, make, free_address, shift):
        address = free_address() + 4 * PAGE
        mappable = make()
        with anonymous_shared_memory(3 * PAGE, address=address) as there:
            there.buf[:] = pattern(3 * PAGE)
            before = open_fds()
            with pytest.raises(RegionAddressError, match="the address range is in use") as caught:
                MappedRegion(mappable, address=address + shift)
            assert (caught.value.address, caught.value.errno) == (address + shift, errno.EEXIST)
            assert isinstance(caught.value, OSError)
            assert open_fds() == before
            assert bytes(there.buf) == pattern(3 * PAGE)
            behind = 3 * PAGE + (mmap.PAGESIZE if os.name == "nt" else 0)  # the trailer of a section
            assert is_mapped(address - 1) is is_mapped(address + behind) is False

    def test_the_address_of_ordinary_memory_is_refused(self, make):
        mine = ctypes.create_string_buffer(b"mine", 4 * PAGE)
        address = ctypes.addressof(mine)
        with pytest.raises(RegionAddressError):
            MappedRegion(make(), address=address - address % PAGE)
        assert mine.value == b"mine"

    def test_an_address_that_is_no_page_is_refused_with_the_size_of_a_page(self, make, free_address):
        mappable = make()
        for shift in (1, 8, PAGE - 1):
            with pytest.raises(ValueError, match=rf"multiple of the page size, {PAGE:,} bytes, got 0x"):
                MappedRegion(mappable, address=free_address() + shift)

    def test_an_offset_that_is_no_page_is_refused_beside_an_address(self, make, free_address):
        mappable = make()
        for offset in (1, PAGE - 1, PAGE + 1):
            telling = rf"with an address, offset must be a multiple of the page size, {PAGE:,} bytes, got {offset:,}"
            with pytest.raises(ValueError, match=telling):
                MappedRegion(mappable, offset=offset, address=free_address())

    def test_an_address_that_no_process_has_is_refused(self, make):
        mappable = make()
        before = open_fds()
        for address in (0, -PAGE, 2**63, 2**64, 2**64 + PAGE, 2**64 - PAGE, 2**47 + 2**62):
            with pytest.raises((ValueError, RegionAddressError)):
                MappedRegion(mappable, address=address)
        assert open_fds() == before

    def test_an_address_is_an_integer(self, make):
        mappable = make()
        for address in (1.5, "4096"):
            with pytest.raises(TypeError):
                MappedRegion(mappable, address=address)

    def test_an_anonymous_region_can_have_an_address(self, free_address):
        address = free_address()
        with anonymous_shared_memory(10, address) as region:
            assert region.address == address
            with pytest.raises(RegionAddressError):
                anonymous_shared_memory(1, address)
        with pytest.raises(ValueError, match=f"page size, {PAGE:,} bytes"):
            anonymous_shared_memory(1, address + 1)


# An address where neither programs nor their libraries are placed, even with 39 bits.
LOW = 0x20_0000_0000

WALK = """
import ctypes, sys
from forkshm import MappedRegion, SharedMemoryObject
with SharedMemoryObject("open_only", sys.argv[1]) as shm:
    region = MappedRegion(shm, address=int(sys.argv[2]))
node = region.address
while node:
    value, node = (ctypes.c_uint64 * 2).from_address(node)
    print(value)
"""


def test_raw_addresses_are_valid_in_every_process_that_maps_at_the_same_address(run_script, tmp_path):
    maker = Maker("named object", tmp_path)
    with maker.cleanup:
        shm = maker(PAGE)
        with MappedRegion(shm, address=LOW + os.getpid() % 1000 * 16 * PAGE) as region:
            # A linked list of number and address of the next node.
            places = [region.address + place for place in (0, 512, 64, 4080)]
            for value, (place, following) in enumerate(zip(places, [*places[1:], 0], strict=True)):
                (ctypes.c_uint64 * 2).from_address(place)[:] = 100 + value, following
            assert run_script(WALK, shm.name, region.address).split() == ["100", "101", "102", "103"]


# -- flush ----------------------------------------------------------------------------


class TestFlush:
    # Boost 4.11: "region with unaligned offset 5: flush()" is true, and so are "flush(0)", "flush(4096, ...)". The
    # quirk "flush(1, 10)" fails there with EINVAL. Here every byte works.
    @pytest.mark.parametrize("offset", [0, 1, 5, PAGE - 1, PAGE, PAGE + 1], ids=in_pages)
    def test_any_part_of_any_region_can_be_flushed(self, make, offset):
        mappable = make()
        with MappedRegion(mappable, offset=offset) as region:
            region.buf[:] = b"\xff" * region.size
            region.flush()
            for start, size in [(0, None), (1, 10), (0, 0), (0, 1), (PAGE, None), (PAGE - 1, 2), (7, PAGE + 1)]:
                region.flush(start, size)
                region.flush(start, size, asynchronous=True)
        assert content_of(mappable) == bytes(offset) + b"\xff" * (SIZE - offset)

    @pytest.mark.parametrize("mode", list(Mode))
    def test_every_mode_can_be_flushed(self, make, mode):
        with MappedRegion(make(), mode) as region:
            region.flush()

    # Boost 4.11: flush "at end of region" is false. Here an empty range is valid; beyond the end there is none.
    def test_flush_is_limited_to_the_region(self, make):
        with MappedRegion(make(), offset=3, size=PAGE) as region:
            region.flush(PAGE)
            region.flush(PAGE, 0)
            region.flush(PAGE - 1, 1)
            for start, size in [(PAGE + 1, None), (PAGE, 1), (0, PAGE + 1), (-1, 1), (0, -1), (1, PAGE), (2**64, 0)]:
                with pytest.raises(ValueError, match="in the region's 4,096" if PAGE == 4096 else "in the region's"):
                    region.flush(start, size)

    def test_a_range_is_of_integers(self, make):
        with MappedRegion(make()) as region:
            for start, size in [(1.0, None), (0, 1.0), ("0", 1)]:
                with pytest.raises(TypeError):
                    region.flush(start, size)

    @pytest.mark.needs("fds_of_files")
    def test_flushed_bytes_are_on_disk_for_direct_reads(self, tmp_path):
        path = tmp_path / "data"
        path.write_bytes(bytes(4 * PAGE))
        try:
            direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
        try:
            with FileMapping(path) as file, MappedRegion(file, offset=5) as region, mmap.mmap(-1, 4 * PAGE) as aligned:
                region.buf[PAGE : PAGE + 3] = b"abc"
                region.flush(PAGE + 1, 1)
                assert os.preadv(direct, [aligned], 0) == 4 * PAGE
                assert aligned[PAGE + 5 : PAGE + 8] == b"abc"
        finally:
            os.close(direct)


# -- shrink_by ------------------------------------------------------------------------


class TestShrink:
    # Boost 4.11, quirk: "shrink_by(10) of a 100-byte region" returns false, yet the size is already 90. Here it works.
    def test_ten_of_a_hundred_bytes(self, make):
        with MappedRegion(make(content=pattern(SIZE)), size=100) as region:
            region.shrink_by(10)
            assert (region.size, bytes(region.buf)) == (90, pattern(90))

    @pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE + 1], ids=in_pages)
    @pytest.mark.parametrize("from_back", [True, False])
    def test_the_rest_keeps_its_bytes_and_its_place(self, make, offset, from_back):
        mappable = make()
        for nbytes in (0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1):
            os.pwrite(mappable.fileno(), pattern(SIZE), 0)
            with MappedRegion(mappable, offset=offset) as region:
                address, size = region.address, region.size
                region.shrink_by(nbytes, from_back)
                moved = 0 if from_back else nbytes
                assert (region.address, region.offset, region.size) == (address + moved, offset + moved, size - nbytes)
                assert bytes(region.buf) == pattern(SIZE)[offset + moved :][: size - nbytes]
                region.buf[0] = region.buf[-1] = 255
                content = content_of(mappable)
                assert content[region.offset] == content[region.offset + region.size - 1] == 255
                region.flush(1, 1)
                assert region.advise("normal")
            assert len(content_of(mappable)) == SIZE  # the object keeps its size

    @pytest.mark.parametrize("from_back", [True, False])
    def test_by_all_its_bytes_closes_the_region(self, make, from_back):
        region = MappedRegion(make(), offset=1)
        address = region.address
        region.shrink_by(region.size, from_back)
        assert region.closed
        assert region_at(address) is None
        with pytest.raises(RegionClosedError):
            region.shrink_by(0)

    def test_by_more_than_there_is_is_refused(self, make):
        with MappedRegion(make(content=pattern(SIZE))) as region:
            before = region.address, region.size
            for nbytes in (-1, SIZE + 1, 2**64):
                with pytest.raises(ValueError, match=f"by {nbytes:,} bytes"):
                    region.shrink_by(nbytes)
            assert (region.address, region.size) == before
            assert bytes(region.buf) == pattern(SIZE)

    @pytest.mark.parametrize("from_back", [True, False])
    def test_shrink_by_with_live_views_is_refused_and_changes_nothing(self, make, from_back):
        with MappedRegion(make(content=pattern(SIZE))) as region:
            before = region.address, region.offset, region.size
            with region.buf[5:] as view:
                for nbytes in (0, 1, PAGE, SIZE):
                    with pytest.raises(RegionBusyError, match="cannot shrink") as caught:
                        region.shrink_by(nbytes, from_back)
                    assert caught.value.exports == 1
                assert (region.address, region.offset, region.size) == before
                assert bytes(view) == pattern(SIZE)[5:]
                assert region_at(region.address + SIZE - 1) is region
            del view
            region.shrink_by(1)

    def test_a_shrunk_region_is_found_only_by_its_remaining_addresses(self, make):
        with MappedRegion(make()) as region:
            address = region.address
            region.shrink_by(PAGE + 1, from_back=False)
            region.shrink_by(PAGE)
            assert (region.address, region.size) == (address + PAGE + 1, PAGE + 4)
            for inside in (region.address, region.address + region.size - 1):
                assert region_at(inside) is region
            for outside in (address, address + PAGE, region.address - 1, region.address + region.size):
                assert region_at(outside) is None

    @pytest.mark.needs("parts_of_views")
    def test_pages_that_were_given_up_can_be_mapped_again(self, make, free_address):
        address = free_address()
        mappable = make(content=pattern(SIZE))
        with MappedRegion(mappable, address=address) as region:
            region.shrink_by(PAGE, from_back=False)
            region.shrink_by(PAGE + 5)
            assert (region.address, region.size) == (address + PAGE, PAGE)
            with (
                anonymous_shared_memory(PAGE, address) as front,
                MappedRegion(mappable, "read_only", 0, PAGE, address + 2 * PAGE) as back,
            ):
                front.buf[:] = b"\xff" * PAGE
                assert bytes(region.buf) == pattern(SIZE)[PAGE : 2 * PAGE]
                assert bytes(back.buf) == pattern(PAGE)
                assert [region_at(address + i * PAGE) for i in range(3)] == [front, region, back]
                region.close()
                assert (front.buf[-1], back.buf[0]) == (255, 0)

    def test_byte_by_byte_to_the_end(self, make):
        with MappedRegion(make(content=pattern(SIZE)), offset=PAGE - 20, size=40) as region:
            for left in range(39, 0, -1):
                region.shrink_by(1, from_back=left % 2 == 0)
                assert region.size == left
                assert bytes(region.buf) == pattern(SIZE)[region.offset : region.offset + left]
            region.shrink_by(1)
            assert region.closed

    def test_advice_keeps_copy_on_write_writes(self, make):
        with MappedRegion(make(content=pattern(SIZE)), "copy_on_write") as region:
            region.buf[PAGE + 3] = 255
            region.shrink_by(PAGE, from_back=False)
            assert (region.buf[3], region.buf[4]) == (255, pattern(SIZE)[PAGE + 4])

    def test_a_forked_child_shrinks_its_own(self, make, in_child):
        with MappedRegion(make(content=pattern(SIZE))) as region:
            assert in_child(lambda: region.shrink_by(PAGE)) == 0
            assert bytes(region.buf) == pattern(SIZE)


# -- advice ---------------------------------------------------------------------------


class TestAdvise:
    @pytest.mark.parametrize("mode", list(Mode))
    def test_advice_is_taken_or_not_and_no_byte_changes(self, make, mode):
        mappable = make(content=pattern(SIZE))
        with MappedRegion(mappable, mode, offset=1) as region:
            written = mode in ("read_write", "copy_on_write")
            for number, advice in enumerate(Advice):
                if written:
                    region.buf[PAGE + number] = 255
                before = bytes(region.buf)
                taken = region.advise(advice)
                assert type(taken) is bool
                assert region.advise(advice.value) is taken
                assert bytes(region.buf) == before
                if written:
                    region.buf[number] = 254
                    assert region.buf[number] == 254

    @pytest.mark.needs("advice")
    def test_linux_takes_the_advice_of_boost(self, make):
        with MappedRegion(make()) as region:
            for advice in ("normal", "sequential", "random", "willneed", "dontneed"):
                assert region.advise(advice) is True

    def test_dontneed_is_not_applied_to_copy_on_write_regions(self, make):
        with MappedRegion(make(), "copy_on_write") as region:
            region.buf[0] = 1
            assert region.advise(Advice.dontneed) is False
            assert region.buf[0] == 1

    def test_advice_that_does_not_exist_is_refused(self, make):
        with MappedRegion(make()) as region:
            for advice in ("", "never", 4, None):
                with pytest.raises(ValueError, match=f"advice must be one of 'normal', .*, got {advice!r}"):
                    region.advise(advice)


class TestPopulate:
    @pytest.mark.needs("populate")
    def test_populate_takes_all_the_memory_now(self, make):
        with MappedRegion(make(64 * PAGE)) as region:
            if not region.advise("populate"):
                pytest.skip("this kernel cannot populate a mapping (before Linux 5.14)")
        with MappedRegion(make(64 * PAGE), populate=True) as region:
            assert resident(region.address) == 64 * PAGE
            assert not any(region.buf)

    @pytest.mark.needs("populate")
    @pytest.mark.parametrize("mode", list(Mode))
    @pytest.mark.parametrize("offset", [0, PAGE + 1], ids=in_pages)
    def test_in_every_mode_and_no_byte_changes(self, make, mode, offset):
        content = pattern(64 * PAGE)
        mappable = make(64 * PAGE, content)
        with MappedRegion(mappable, mode, offset) as region:
            start, length = region._mapping.pages
            assert resident(start) == 0
            if not region.advise("populate"):
                pytest.skip("this kernel cannot populate a mapping (before Linux 5.14)")
            assert resident(start) == length
            assert bytes(region.buf) == content[offset:]

    @pytest.mark.needs("populate")
    @pytest.mark.parametrize("mode", ["read_only", "read_private"])
    def test_a_read_only_region_can_be_populated(self, make, mode):
        opened = make.for_reading(make(16 * PAGE))
        with MappedRegion(opened, mode, populate=True) as region:
            if not region.advise("populate"):
                pytest.skip("this kernel cannot populate a mapping (before Linux 5.14)")
            assert resident(region.address) == 16 * PAGE

    @pytest.mark.parametrize("mode", list(Mode))
    def test_no_mode_is_refused(self, make, mode):
        with MappedRegion(make(content=pattern(SIZE)), mode, populate=True, huge_pages=True) as region:
            assert bytes(region.buf) == pattern(SIZE)

    def test_huge_pages_are_a_wish(self, make):
        with MappedRegion(make(), offset=PAGE + 1, huge_pages=True) as region:
            region.buf[:] = b"\xff" * region.size

    @pytest.mark.needs("populate")
    def test_an_anonymous_region_is_populated(self):
        with anonymous_shared_memory(64 * PAGE) as lazy, anonymous_shared_memory(64 * PAGE, populate=True) as region:
            if not lazy.advise("populate"):
                pytest.skip("this kernel cannot populate a mapping (before Linux 5.14)")
            assert os.fstat(region.fileno()).st_blocks * 512 >= 64 * PAGE
        with anonymous_shared_memory(5 * 2**20 + 1, huge_pages=True) as region:
            region.buf[-1] = 1


def test_an_fd_is_mapped_and_stays_the_callers(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello world")
    fd = os.open(path, os.O_RDWR)
    try:
        with MappedRegion(fd, "read_write", offset=6) as region:
            assert bytes(region.buf) == b"world"
            assert region.fileno() != fd
            os.close(os.dup(fd))  # the fd is still open
        os.fstat(fd)
        region = MappedRegion(fd, "read_only")
    finally:
        os.close(fd)
    assert bytes(region.buf) == b"hello world"  # the region has an fd of its own


@pytest.mark.parametrize(("fd", "error"), [(-1, ValueError), (True, TypeError), (987_654, OSError)])
def test_invalid_fds_are_refused(fd, error):
    with pytest.raises(error):
        MappedRegion(fd)
