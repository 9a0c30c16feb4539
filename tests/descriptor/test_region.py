"""RegionDescriptor: names a region of another process, or raises with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import tempfile

import pytest
from system import open_fds

from forkshm import MappedRegion, Mode, anonymous_shared_memory
from forkshm.descriptor import RegionDescriptor, describe
from forkshm.errors import RegionClosedError, RegionGoneError

PAGE = os.sysconf("SC_PAGE_SIZE")

ATTACH = """
import pickle, sys
region = pickle.loads(bytes.fromhex(sys.argv[1])).attach()
print(region.size, region.offset, region.mode, bytes(region.buf[:5]).decode())
if not region.buf.readonly:
    region.buf[-5:] = b"world"
"""

ATTACH_WHAT_IS_GONE = """
import os, pickle, sys
from forkshm.errors import RegionGoneError
descriptor = pickle.loads(bytes.fromhex(sys.argv[1]))
before = os.listdir("/proc/self/fd")
try:
    descriptor.attach()
except RegionGoneError as error:
    assert os.listdir("/proc/self/fd") == before
    assert "forkshm-region" not in open("/proc/self/maps").read()
    print(error)
"""


def maps():
    with open("/proc/self/maps") as lines:
        return sum("forkshm-region" in line for line in lines)


@contextlib.contextmanager
def gone(telling):
    """Check that attaching fails with the reason, and leaves nothing mapped or open."""
    before = open_fds(), maps()
    with pytest.raises(RegionGoneError, match=telling) as caught:
        yield
    assert (open_fds(), maps()) == before
    assert str(caught.value).startswith("cannot attach the region of ")
    assert isinstance(caught.value, LookupError)


@pytest.fixture
def child_with_region():
    """Return the descriptor of a region that a child holds open, and a function that ends the child."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            region = anonymous_shared_memory(PAGE + 1)
            region.buf[:5] = b"hello"
            os.write(write_end, pickle.dumps(describe(region)))
            while region is not None:
                signal.pause()
        os._exit(1)
    os.close(write_end)
    descriptor = pickle.loads(os.read(read_end, 65536))
    os.close(read_end)
    ended = []

    def end(*, reap=True):
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            ended.append(True)
        if reap:
            os.waitpid(pid, 0)
            ended.append(True)

    yield descriptor, end
    if len(ended) < 2:
        end()


# -- while the memory is there --------------------------------------------------------


def test_another_program_reads_and_writes_the_described_region(run_script):
    with anonymous_shared_memory(PAGE + 10) as region:
        region.buf[:5] = b"hello"
        said = run_script(ATTACH, pickle.dumps(describe(region)).hex())
        assert said.split() == [str(PAGE + 10), "0", "read_write", "hello"]
        assert bytes(region.buf[-5:]) == b"world"


@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_a_part_of_a_file_keeps_its_offset_and_mode(run_script, mode):
    with tempfile.TemporaryFile() as file:
        file.write(bytes(PAGE + 7) + b"there it is")
        file.flush()
        with MappedRegion(file, mode, offset=PAGE + 7) as region:
            said = run_script(ATTACH, pickle.dumps(describe(region)).hex())
    assert said.split() == ["11", str(PAGE + 7), mode, "there"]


def test_a_region_of_a_child_is_mapped_here_and_outlives_the_child(child_with_region):
    descriptor, end = child_with_region
    with descriptor.attach() as region:
        assert region.size == PAGE + 1
        end()
        assert bytes(region.buf[:5]) == b"hello"
        region.buf[PAGE] = 1


def test_attaching_in_the_owning_process_returns_the_same_region():
    with anonymous_shared_memory(PAGE) as region:
        before = open_fds()
        assert describe(region).attach() is region
        assert open_fds() == before


def test_attaching_twice_maps_once(child_with_region):
    descriptor, _ = child_with_region
    with descriptor.attach() as region:
        assert descriptor.attach() is region


def test_a_descriptor_of_a_descriptor_leads_to_the_same_memory(child_with_region, run_script):
    descriptor, end = child_with_region
    with descriptor.attach() as region:
        end()
        assert run_script(ATTACH, pickle.dumps(describe(region)).hex()).endswith("hello\n")
        assert bytes(region.buf[-5:]) == b"world"


def test_a_descriptor_is_small_pickles_and_compares_by_value():
    with anonymous_shared_memory(2**20) as region:
        descriptor = describe(region)
        stream = pickle.dumps(descriptor)
        assert len(stream) < 300
        assert pickle.loads(stream) == descriptor == describe(region)
        assert hash(descriptor) == hash(describe(region))
        with pytest.raises(dataclasses.FrozenInstanceError):
            descriptor.size = 1


def test_the_repr_of_a_descriptor_names_the_owner():
    with anonymous_shared_memory(PAGE) as region:
        descriptor = describe(region)
        status = os.fstat(region.fileno())
        assert isinstance(descriptor, RegionDescriptor)
        assert (descriptor.pid, descriptor.fd) == (os.getpid(), region.fileno())
        assert (descriptor.device, descriptor.inode) == (status.st_dev, status.st_ino)
        assert (descriptor.offset, descriptor.size, descriptor.mode) == (0, PAGE, Mode.read_write)


def test_a_closed_region_cannot_be_described():
    region = anonymous_shared_memory(PAGE)
    region.close()
    with pytest.raises(RegionClosedError):
        describe(region)


# -- when it is gone ------------------------------------------------------------------


def test_a_closed_region_is_gone():
    region = anonymous_shared_memory(1234)
    descriptor = describe(region)
    region.close()
    with gone(f"1,234 bytes that process {os.getpid()} had as fd {descriptor.fd}: it closed the region. Keep the"):
        descriptor.attach()


def test_another_program_is_told_that_the_region_was_closed(run_script):
    region = anonymous_shared_memory(1234)
    stream = pickle.dumps(describe(region)).hex()
    region.close()
    # Its fd number may have been reused for the pipes of that program.
    said = run_script(ATTACH_WHAT_IS_GONE, stream)
    assert "it closed the region" in said or "so the region was closed" in said


def test_a_region_of_an_ended_process_is_gone(child_with_region):
    descriptor, end = child_with_region
    end()
    with gone("that process ended"):
        descriptor.attach()


def test_a_region_of_a_process_that_ended_and_is_not_yet_waited_for_is_gone(child_with_region):
    descriptor, end = child_with_region
    end(reap=False)
    with gone("that process ended"):
        descriptor.attach()


@pytest.mark.needs("fd_numbers")
def test_an_fd_that_is_another_object_now_is_noticed():
    region, stranger = anonymous_shared_memory(PAGE), anonymous_shared_memory(PAGE)
    descriptor = describe(region)
    region.close()
    os.dup2(stranger.fileno(), descriptor.fd, inheritable=False)
    try:
        with gone("that fd is a different object now"):
            descriptor.attach()
    finally:
        os.close(descriptor.fd)
        stranger.close()


def test_an_fd_reused_for_a_pipe_is_detected_without_opening_the_pipe():
    region = anonymous_shared_memory(PAGE)
    descriptor = describe(region)
    region.close()
    read_end, write_end = os.pipe()
    if descriptor.fd not in (read_end, write_end):
        os.dup2(read_end, descriptor.fd, inheritable=False)
    for fd in {read_end, write_end} - {descriptor.fd}:
        os.close(fd)
    try:
        with gone("that fd is a different object now"):
            descriptor.attach()
    finally:
        os.close(descriptor.fd)


def test_a_pid_that_was_used_again_is_noticed():
    with anonymous_shared_memory(PAGE) as region:
        descriptor = describe(region)
        forged = dataclasses.replace(descriptor, start_time=descriptor.start_time - 1)
        with gone("its pid was used again"):
            forged.attach()


@pytest.mark.needs("cut_files")
def test_a_file_that_was_cut_since_is_noticed():
    with tempfile.TemporaryFile() as file:
        file.truncate(3 * PAGE)
        with MappedRegion(file) as region:
            descriptor = describe(region)
            file.truncate(PAGE)
            with gone("the object has only 4,096 bytes"):
                descriptor.attach()


def test_a_process_of_another_user_may_not_look(in_child):
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with anonymous_shared_memory(PAGE) as region:
        descriptor = describe(region)

        def attach():
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with pytest.raises(RegionGoneError, match="may not access that process"):
                descriptor.attach()

        assert in_child(attach) == 0
