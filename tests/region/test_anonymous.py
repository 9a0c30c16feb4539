"""anonymous_shared_memory(): memory without a name."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource

import pytest
from system import in_pages, is_mapped, open_fds

import forkshm
from forkshm import MappedRegion, Mode, NotPicklableError, anonymous_shared_memory
from forkshm.errors import RegionBusyError, RegionClosedError, RegionCreateError

PAGE = os.sysconf("SC_PAGE_SIZE")
GIB = 2**30


# -- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 2**20 + 1], ids=in_pages)
def test_a_region_has_exactly_the_size_asked_for_and_is_zero_filled(size):
    with anonymous_shared_memory(size) as region:
        assert region.size == len(region) == len(region.buf) == region.buf.nbytes == size
        assert bytes(region.buf) == bytes(size)
        assert region.address % PAGE == 0
        assert region.offset == 0
        assert region.mode is Mode.read_write


def test_the_last_byte_can_be_written_and_the_one_behind_cannot():
    with anonymous_shared_memory(PAGE + 1) as region:
        region.buf[PAGE] = 7
        assert region.buf[-1] == 7
        with pytest.raises(IndexError):
            region.buf[PAGE + 1] = 7


def test_more_than_4_gib_take_memory_only_where_they_are_written():
    with anonymous_shared_memory(5 * GIB + 3) as region:
        region.buf[0] = 1
        region.buf[4 * GIB + 1] = 2
        region.buf[-1] = 3
        assert len(region.buf) == 5 * GIB + 3
        assert bytes(region.buf[4 * GIB : 4 * GIB + 3]) == b"\0\2\0"
        assert region.buf[5 * GIB + 2] == 3
        assert os.fstat(region.fileno()).st_blocks * 512 <= 64 * 2**20


def test_a_bool_and_a_numpy_integer_are_integers():
    numpy = pytest.importorskip("numpy")
    with anonymous_shared_memory(numpy.int64(PAGE)) as region, anonymous_shared_memory(True) as one:
        assert (region.size, one.size) == (PAGE, 1)


@pytest.mark.parametrize(
    ("size", "kind", "telling"),
    [
        (0, ValueError, "at least 1 byte, got 0"),
        (-1, ValueError, "at least 1 byte, got -1"),
        (2**63, ValueError, f"at most .* got {2**63}"),
        (2**64 + 1, ValueError, f"got {2**64 + 1}"),
        (1.0, TypeError, "float"),
        ("4096", TypeError, "str"),
        (None, TypeError, "NoneType"),
    ],
)
def test_a_size_that_is_none_is_refused_and_nothing_is_left_open(size, kind, telling):
    before = open_fds()
    with pytest.raises(kind, match=telling):
        anonymous_shared_memory(size)
    assert open_fds() == before


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
def test_more_than_the_address_space_is_refused_by_the_kernel_and_nothing_is_left_open(size):
    before = open_fds()
    with pytest.raises(RegionCreateError, match=f"{size:,} bytes") as caught:
        anonymous_shared_memory(size)
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.size == size
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, OSError)
    assert "ulimit -v" in str(caught.value)
    assert open_fds() == before


def test_an_exhausted_address_space_is_said_with_errno_and_remedy(in_child):
    def ask():
        used = int(open("/proc/self/statm").read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, resource.RLIM_INFINITY))
        before = open_fds()
        with pytest.raises(RegionCreateError, match="ulimit -v") as caught:
            anonymous_shared_memory(GIB)
        assert (caught.value.errno, caught.value.size) == (errno.ENOMEM, GIB)
        assert open_fds() == before
        with anonymous_shared_memory(PAGE) as small:
            small.buf[0] = 1

    assert in_child(ask) == 0


def fill_table_of_files():
    """Set the soft and the hard limit to 100, and open files until no more can be opened."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    fillers = []
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            fillers.append(os.dup(0))
    return fillers


def test_an_exhausted_table_of_files_is_said_with_errno_and_remedy(in_child):
    def ask():
        fillers = fill_table_of_files()
        with pytest.raises(RegionCreateError, match="ulimit -n") as caught:
            anonymous_shared_memory(PAGE)
        assert caught.value.errno == errno.EMFILE
        os.close(fillers.pop())
        anonymous_shared_memory(PAGE).close()

    assert in_child(ask) == 0


# -- sharing --------------------------------------------------------------------------


def test_a_forked_child_and_its_parent_see_each_others_writes(in_child):
    with anonymous_shared_memory(2 * PAGE) as region:
        region.buf[:5] = b"hello"

        def answer():
            assert bytes(region.buf[:5]) == b"hello"
            region.buf[PAGE : PAGE + 5] = b"world"

        assert in_child(answer) == 0
        assert bytes(region.buf[PAGE : PAGE + 5]) == b"world"


def test_a_child_that_closes_the_region_leaves_the_parents_alone(in_child):
    with anonymous_shared_memory(PAGE) as region:

        def close():
            region.close()
            assert region.closed

        assert in_child(close) == 0
        assert not region.closed
        region.buf[0] = 1


@pytest.mark.needs("seals")
def test_the_memory_cannot_be_shrunk_under_the_feet_of_its_readers():
    with anonymous_shared_memory(2 * PAGE) as region:
        for size in (0, PAGE, 2 * PAGE - 1):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fileno(), size)
        assert os.fstat(region.fileno()).st_size == 2 * PAGE


def test_a_region_has_no_name_anywhere():
    with anonymous_shared_memory(PAGE) as region:
        assert os.fstat(region.fileno()).st_nlink == 0
        assert os.readlink(f"/proc/self/fd/{region.fileno()}").endswith("(deleted)")


def test_the_fd_is_not_inherited_by_other_programs():
    with anonymous_shared_memory(PAGE) as region:
        assert not os.get_inheritable(region.fileno())


def test_a_plain_pickle_of_a_region_is_refused():
    with anonymous_shared_memory(PAGE) as region:
        with pytest.raises(NotPicklableError, match="plain pickle cannot carry shared memory"):
            pickle.dumps(region)
        assert bytes(region.buf[:1]) == b"\0"


# -- views ----------------------------------------------------------------------------


def test_every_look_at_buf_is_a_new_writable_memoryview_of_bytes():
    with anonymous_shared_memory(3) as region:
        first, second = region.buf, region.buf
        assert first is not second
        assert (first.format, first.itemsize, first.ndim, first.readonly) == ("B", 1, 1, False)
        first[:] = b"abc"
        assert bytes(second) == b"abc"
        del first, second


def test_a_slice_keeps_the_memory_of_a_collected_region_until_it_ends():
    region = anonymous_shared_memory(PAGE)
    address = region.address
    part = region.buf[10:20]
    part[:] = b"0123456789"
    del region
    gc.collect()
    assert bytes(part) == b"0123456789"
    assert is_mapped(address)
    del part
    assert not is_mapped(address)


def test_a_region_that_is_let_go_is_unmapped_and_its_fd_closed():
    region = anonymous_shared_memory(PAGE)
    address, fd = region.address, region.fileno()
    del region
    assert not is_mapped(address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# -- close ----------------------------------------------------------------------------


def test_close_unmaps_and_closing_twice_is_allowed():
    region = anonymous_shared_memory(PAGE)
    address, fd = region.address, region.fileno()
    assert not region.closed
    region.close()
    region.close()
    assert region.closed
    assert not is_mapped(address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("use", [lambda r: r.buf, lambda r: r.address, lambda r: r.fileno(), lambda r: r.__enter__()])
def test_using_a_closed_region_raises(use):
    region = anonymous_shared_memory(1234)
    region.close()
    with pytest.raises(RegionClosedError, match=r"1,234 bytes.*closed in this process"):
        use(region)


def test_a_closed_region_still_knows_its_size_and_mode():
    region = anonymous_shared_memory(1234)
    region.close()
    assert (region.size, len(region), region.mode) == (1234, 1234, "read_write")


def test_close_with_living_views_counts_them_and_changes_nothing():
    region = anonymous_shared_memory(PAGE)
    first = region.buf
    second = region.buf
    with pytest.raises(RegionBusyError, match="2 views of it are alive") as caught:
        region.close()
    assert caught.value.exports == 2
    assert not region.closed
    region.buf[0] = 5
    assert (first[0], second[0]) == (5, 5)
    first.release()
    with pytest.raises(RegionBusyError, match="1 view of it is alive") as caught:
        region.close()
    assert caught.value.exports == 1
    second.release()
    region.close()
    assert region.closed


def test_an_array_over_the_buffer_counts_as_a_view():
    numpy = pytest.importorskip("numpy")
    region = anonymous_shared_memory(PAGE)
    array = numpy.ndarray((8,), numpy.uint8, buffer=region.buf)
    with pytest.raises(RegionBusyError):
        region.close()
    array[:] = 3
    assert region.buf[7] == 3
    del array
    region.close()


def test_a_busy_error_is_a_buffer_error_as_that_of_mmap():
    with anonymous_shared_memory(PAGE) as region:
        view = region.buf
        with pytest.raises(BufferError):
            region.close()
        del view


# -- context manager ------------------------------------------------------------------


def test_leaving_the_with_block_closes():
    with anonymous_shared_memory(PAGE) as region:
        assert isinstance(region, MappedRegion)
    assert region.closed


def test_leaving_the_with_block_with_a_view_alive_says_so():
    with pytest.raises(RegionBusyError):
        with anonymous_shared_memory(PAGE) as region:
            view = region.buf
    assert not region.closed
    del view
    region.close()


def test_leaving_the_with_block_does_not_hide_an_exception():
    class OursError(Exception):
        pass

    with pytest.raises(OursError):
        with anonymous_shared_memory(PAGE) as region:
            view = region.buf
            raise OursError
    del view


def test_a_region_closed_inside_its_with_block_is_left_in_peace():
    with anonymous_shared_memory(PAGE) as region:
        region.close()
    assert region.closed


# -- representation -------------------------------------------------------------------


def test_the_repr_names_size_mode_and_address_or_closed():
    with anonymous_shared_memory(12345) as region:
        assert repr(region) == f"<MappedRegion 12,345 bytes read_write at {region.address:#x}>"
    assert repr(region) == "<MappedRegion 12,345 bytes read_write closed>"


def test_many_regions_leave_nothing_behind():
    from forkshm.region import _table

    before = len(_table._new) + len(_table._starts), len(_table._new) + len(_table._by_start)
    regions = [anonymous_shared_memory(1 + 37 * number) for number in range(500)]
    for number, region in enumerate(regions):
        region.buf[-1] = number % 251
    assert [region.buf[-1] for region in regions] == [number % 251 for number in range(500)]
    for region in regions[::2]:
        region.close()
    del region, regions
    assert (len(_table._new) + len(_table._starts), len(_table._new) + len(_table._by_start)) == before


def test_a_reference_cycle_does_not_keep_the_memory():
    region = anonymous_shared_memory(PAGE)
    address = region.address
    cycle = [region]
    cycle.append(cycle)
    del region, cycle
    gc.collect()
    assert not is_mapped(address)


def test_the_package_exports_anonymous_shared_memory():
    assert forkshm.anonymous_shared_memory is anonymous_shared_memory
