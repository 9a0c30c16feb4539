"""FileMapping: opening, modes, lifetime. Mapping is tested in test_mapped_region.py."""

from __future__ import annotations

import ctypes  # noqa: TID251 - prctl(2)
import errno
import os
import pathlib
import tempfile

import pytest
from system import open_fds

from forkshm import FileMapping, MappedRegion, Mode, RegionNotFoundError
from forkshm.descriptor._region import describe
from forkshm.errors import RegionAccessError, RegionClosedError, RegionCreateError

PAGE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534


@pytest.fixture
def path(tmp_path):
    """Provide a file that contains hello."""
    made = tmp_path / "file"
    made.write_bytes(b"hello world")
    return made


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_file_is_opened_by_any_kind_of_path(path, kind):
    with FileMapping(kind(path)) as file:
        assert (file.name, file.mode, file.size, file.closed) == (str(path), Mode.read_write, 11, False)
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        assert not os.get_inheritable(file.fileno())
        assert repr(file) == f"<FileMapping {str(path)!r} read_write>"


def test_writes_are_in_the_file_when_the_region_is_gone(path):
    with FileMapping(path, "read_write") as file, MappedRegion(file, offset=6) as region:
        region.buf[:] = b"there"
    assert path.read_bytes() == b"hello there"


def test_read_only_reads_and_maps_no_other_way(path):
    with FileMapping(path, "read_only") as file:
        with MappedRegion(file, "read_only") as region:
            assert bytes(region.buf) == b"hello world"
            with pytest.raises(TypeError):
                region.buf[0] = 1
        with MappedRegion(file, "copy_on_write") as region:
            region.buf[0] = ord("j")
        with pytest.raises(RegionCreateError) as caught:
            MappedRegion(file, "read_write")
        assert caught.value.errno == errno.EACCES
    assert path.read_bytes() == b"hello world"


@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_the_file_must_exist(tmp_path, mode):
    with pytest.raises(RegionNotFoundError, match="it does not exist") as caught:
        FileMapping(tmp_path / "missing", mode)
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value, FileNotFoundError)
    assert "missing" in str(caught.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("mode", ["copy_on_write", "read_private", "rw"])
def test_a_mode_that_no_file_is_opened_with_is_refused(path, mode):
    with pytest.raises(ValueError, match=mode):
        FileMapping(path, mode)


@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_an_irregular_file_is_refused_without_waiting(tmp_path, mode):
    os.mkfifo(tmp_path / "fifo")
    before = open_fds()
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(RegionCreateError) as caught:
            FileMapping(path, mode)
        assert str(path) in str(caught.value)
        assert caught.value.errno in (errno.EISDIR, errno.ENODEV)
    assert open_fds() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_permissions_are_said_with_the_mode(in_child):
    def stranger():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with FileMapping(path, "read_only") as file, MappedRegion(file, "read_only") as region:
            assert bytes(region.buf) == b"hello world"
        with pytest.raises(RegionAccessError, match="as read_write: its permissions forbid it") as caught:
            FileMapping(path)
        assert caught.value.errno == errno.EACCES

    with tempfile.TemporaryDirectory() as folder:  # other users may not enter pytest's own
        os.chmod(folder, 0o755)
        path = pathlib.Path(folder) / "file"
        path.write_bytes(b"hello world")
        path.chmod(0o444)
        assert in_child(stranger) == 0


# Bug boostorg/interprocess#261: an empty file.
def test_an_empty_file_is_opened_and_cannot_be_mapped(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    with FileMapping(path) as file:
        assert file.size == 0
        with pytest.raises(ValueError, match="cannot map an object of 0 bytes"):
            MappedRegion(file)
        path.write_bytes(b"now")
        with MappedRegion(file) as region:
            assert bytes(region.buf) == b"now"


def test_a_file_that_grows_can_be_mapped_further(path):
    with FileMapping(path) as file, MappedRegion(file) as early:
        with open(path, "ab") as more:
            more.write(b"!" * PAGE)
        assert (file.size, early.size) == (11 + PAGE, 11)
        with MappedRegion(file) as late:
            late.buf[0] = ord("J")
            assert bytes(early.buf[:5]) == b"Jello"


@pytest.mark.needs("symbolic_links")
def test_a_symbolic_link_is_followed(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    with FileMapping(tmp_path / "link") as file:
        assert file.size == 11


def test_a_closed_file_cannot_be_used_and_closing_twice_is_allowed(path):
    file = FileMapping(path)
    region = MappedRegion(file)
    file.close()
    file.close()
    assert (file.closed, file.name, file.mode) == (True, str(path), "read_write")
    for use in (lambda: file.size, file.fileno, file.__enter__, lambda: MappedRegion(file)):
        with pytest.raises(RegionClosedError, match="closed in this process"):
            use()
    assert bytes(region.buf) == b"hello world"
    region.close()


def test_a_file_that_is_let_go_is_closed_and_stays(path):
    before = open_fds()
    file = FileMapping(path)
    assert len(open_fds()) == len(before) + 1
    del file
    assert open_fds() == before
    assert path.exists()


@pytest.mark.needs("cut_files")
def test_remove_returns_whether_it_removed_and_regions_stay(path, tmp_path):
    with FileMapping(path) as file, MappedRegion(file) as region:
        assert FileMapping.remove(path) is True
        assert not path.exists()
        assert FileMapping.remove(path) is False
        region.buf[0] = ord("J")
        assert bytes(region.buf[:5]) == b"Jello"
    assert FileMapping.remove(tmp_path) is False
    assert tmp_path.exists()


def test_two_programs_share_a_file(path, run_script):
    script = """
import sys, forkshm
with forkshm.FileMapping(sys.argv[1]) as file, forkshm.MappedRegion(file) as region:
    print(bytes(region.buf[:5]).decode())
    region.buf[:5] = b"HELLO"
"""
    with FileMapping(path) as file, MappedRegion(file) as region:
        region.buf[:5] = b"holla"
        assert run_script(script, path) == "holla\n"
        assert bytes(region.buf) == b"HELLO world"


def test_a_forked_child_shares_the_file(path, in_child):
    with FileMapping(path) as file, MappedRegion(file) as region:

        def write():
            with MappedRegion(file, offset=1, size=1) as mine:
                mine.buf[0] = ord("u")
            file.close()

        assert in_child(write) == 0
        assert bytes(region.buf) == b"hullo world"
        assert file.size == 11


@pytest.mark.needs("foreign_channels")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_file_that_one_may_only_read_is_reached_by_its_descriptor(in_child):
    def stranger():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE, which setuid(2) clears
        with FileMapping(path, "read_only") as file, MappedRegion(file, "read_only", offset=6) as region:
            descriptor = describe(region)

            def attach():
                region.close()
                again = descriptor.attach()
                assert (again.mode, bytes(again.buf)) == ("read_only", b"world")

            return in_child(attach)

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = pathlib.Path(folder) / "file"
        path.write_bytes(b"hello world")
        path.chmod(0o444)
        assert in_child(stranger) == 0
