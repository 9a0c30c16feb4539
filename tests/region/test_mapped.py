"""MappedRegion over objects that have an fd."""

from __future__ import annotations

import errno
import gc
import os
import resource
import tempfile

import pytest
from system import in_pages, open_fds

from forkshm import MappedRegion, Mode, anonymous_shared_memory
from forkshm.errors import RegionCreateError

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def file():
    """Provide a file of two pages and three bytes: each byte is the low byte of its position."""
    with tempfile.TemporaryFile() as made:
        made.write(bytes(position % 256 for position in range(2 * PAGE + 3)))
        made.flush()
        yield made


def content(file):
    return os.pread(file.fileno(), 4 * PAGE, 0)


# -- modes ----------------------------------------------------------------------------


def test_by_default_the_whole_object_is_mapped_read_write(file):
    with MappedRegion(file) as region:
        assert (region.mode, region.offset, region.size) == (Mode.read_write, 0, 2 * PAGE + 3)
        assert bytes(region.buf) == content(file)


def test_writes_in_read_write_reach_the_file_and_other_mappings(file):
    with MappedRegion(file) as region, MappedRegion(file, "read_only") as other:
        region.buf[1:4] = b"abc"
        assert content(file)[:5] == b"\0abc\4"
        assert bytes(other.buf[:5]) == b"\0abc\4"


def test_writes_in_copy_on_write_stay_in_the_region(file):
    before = content(file)
    with MappedRegion(file, Mode.copy_on_write) as region:
        region.buf[:3] = b"xyz"
        assert bytes(region.buf[:4]) == b"xyz\3"
        assert content(file) == before


@pytest.mark.parametrize("mode", ["read_only", "read_private"])
def test_a_read_only_region_is_readable(file, mode):
    with MappedRegion(file, mode) as region:
        assert region.mode is Mode(mode)
        assert bytes(region.buf) == content(file)


@pytest.mark.parametrize("mode", ["read_only", "read_private"])
def test_writing_to_a_read_only_region_raises_and_does_not_kill(run_script, mode):
    script = f"""
import tempfile
import forkshm
with tempfile.TemporaryFile() as file:
    file.write(b"abc"); file.flush()
    region = forkshm.MappedRegion(file, {mode!r})
    try:
        region.buf[0] = 1
    except TypeError as error:
        print("refused", error)
"""
    assert "refused" in run_script(script)


def test_views_of_a_read_only_region_are_read_only(file):
    with MappedRegion(file, "read_only") as region:
        assert region.buf.readonly


@pytest.mark.parametrize("mode", list(Mode))
def test_a_mode_equals_its_name(file, mode):
    with MappedRegion(file, mode.value) as region:
        assert region.mode is mode
        assert region.mode == mode.value == str(mode)


@pytest.mark.parametrize("mode", ["rw", "", 3, None])
def test_an_unknown_mode_is_refused_with_all_names(file, mode):
    with pytest.raises(ValueError, match=f"mode must be one of 'read_only', .*, got {mode!r}"):
        MappedRegion(file, mode)


def test_a_name_is_refused_with_the_call_that_opens_it():
    with pytest.raises(TypeError, match=r"cannot map 'name': .*SharedMemoryObject\('open_only', name\)"):
        MappedRegion("name")


def test_an_fd_for_reading_cannot_be_mapped_for_writing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with path.open("rb") as file:
        before = open_fds()
        with pytest.raises(RegionCreateError, match=r"does not allow a read_write mapping\. Open it for r") as caught:
            MappedRegion(file, "read_write")
        assert caught.value.errno == errno.EACCES
        assert caught.value.size == 3
        assert open_fds() == before
        for mode in ("read_only", "copy_on_write", "read_private"):
            with MappedRegion(file, mode) as region:
                assert bytes(region.buf) == b"abc"


# -- offsets and sizes ----------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 2], ids=in_pages)
@pytest.mark.parametrize("mode", ["read_write", "copy_on_write"])
def test_an_offset_need_not_be_a_multiple_of_the_page(file, offset, mode):
    whole = content(file)
    with MappedRegion(file, mode, offset=offset) as region:
        assert (region.offset, region.size) == (offset, len(whole) - offset)
        assert bytes(region.buf) == whole[offset:]
        assert region.address % PAGE == offset % PAGE


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (PAGE - 1, 2), (5, PAGE), (2 * PAGE + 2, 1)], ids=in_pages)
def test_only_the_requested_part_is_mapped(file, offset, size):
    with MappedRegion(file, offset=offset, size=size) as region:
        assert bytes(region.buf) == content(file)[offset : offset + size]


@pytest.mark.parametrize(
    ("offset", "size", "telling"),
    [
        (2 * PAGE + 3, None, rf"offset must be within the object's {2 * PAGE + 3:,} bytes, got {2 * PAGE + 3:,}"),
        (-1, None, "got -1"),
        (2**63, None, "offset must be within"),
        (0, 2 * PAGE + 4, rf"size {2 * PAGE + 4:,} at offset 0 reaches past the end"),
        (PAGE, PAGE + 4, "reaches past the end"),
        (0, 0, "at least 1 byte, got 0"),
        (0, -5, "at least 1 byte, got -5"),
        (0, 2**63, "at most"),
    ],
    ids=["behind", "before", "no file", "longer", "from the middle", "nothing", "less", "huge"],
)
def test_a_range_outside_of_the_object_is_refused_with_the_values(file, offset, size, telling):
    before = open_fds()
    with pytest.raises(ValueError, match=telling):
        MappedRegion(file, offset=offset, size=size)
    assert open_fds() == before


@pytest.mark.parametrize(("offset", "size"), [(1.0, None), ("1", None), (0, 1.5), (0, "2")])
def test_offset_and_size_are_integers(file, offset, size):
    with pytest.raises(TypeError):
        MappedRegion(file, offset=offset, size=size)


@pytest.mark.parametrize("size", [None, 1])
def test_an_empty_object_cannot_be_mapped(size):
    with tempfile.TemporaryFile() as file, pytest.raises(ValueError, match=r"0 bytes|past the end"):
        MappedRegion(file, size=size)


def test_a_pipe_cannot_be_mapped():
    read_end, write_end = os.pipe()
    with (
        open(read_end, "rb") as reader,
        open(write_end, "wb"),
        pytest.raises((ValueError, RegionCreateError), match="0 bytes"),
    ):
        MappedRegion(reader)


# -- lifetime -------------------------------------------------------------------------


def test_the_region_keeps_an_fd_of_its_own():
    with tempfile.TemporaryFile() as file:
        file.write(b"abc")
        file.flush()
        region = MappedRegion(file)
        assert region.fileno() != file.fileno()
    region.buf[0] = ord("x")
    assert os.pread(region.fileno(), 3, 0) == b"xbc"
    region.close()


def test_a_region_can_be_mapped_from_a_region():
    with anonymous_shared_memory(2 * PAGE) as whole, MappedRegion(whole, offset=PAGE + 7, size=10) as part:
        part.buf[:] = b"0123456789"
        assert bytes(whole.buf[PAGE + 6 : PAGE + 18]) == b"\x000123456789\0"
        assert part.address != whole.address + PAGE + 7


def test_two_mappings_of_one_object_end_separately(file):
    first, second = MappedRegion(file), MappedRegion(file)
    assert first.address != second.address
    first.buf[0] = 77
    first.close()
    assert second.buf[0] == 77
    second.close()


def test_the_limit_on_files_is_said_with_errno_and_remedy(file, in_child):
    def ask():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(RegionCreateError, match="ulimit -n") as caught:
            MappedRegion(file)
        assert caught.value.errno == errno.EMFILE

    assert in_child(ask) == 0


def test_a_region_let_go_with_its_view_alive_comes_back_by_its_address(file):
    from forkshm.region._attach import region_at

    region = MappedRegion(file)
    address = region.address
    assert region_at(address) is region
    view = region.buf
    del region
    gc.collect()
    again = region_at(address + 1)
    assert (again.address, again.size) == (address, 2 * PAGE + 3)
    assert region_at(address) is again
    del view
    again.close()
    assert region_at(address) is None
