"""The operations of the Linux backend, tested with the real kernel."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import signal
import weakref

import pytest

from forkshm.backend import Access, Capabilities, _capabilities, _choose, _syscalls, capabilities, kernel
from forkshm.backend._capabilities import probe
from forkshm.errors import UnsupportedError

PAGE = kernel.page_size


@pytest.fixture
def memory():
    fd = kernel.create_memory(4 * PAGE, "region-test")
    yield fd
    os.close(fd)


def view(address, size):
    return memoryview(kernel.buffer_at(address, size)).cast("B")


# -- capabilities ---------------------------------------------------------------------


NEEDED = {
    backend: [field.name for field in dataclasses.fields(Capabilities) if field.metadata["needed"] == backend]
    for backend in ("linux", "posix")
}


def all_but(*missing):
    """Return the errors of a system without these capabilities."""
    return lambda backend: Capabilities(**{name: name not in missing for name in NEEDED[backend]})


def test_all_capabilities_are_found_here():
    assert capabilities.missing() == []
    assert probe("posix").missing("posix") == []


@pytest.mark.parametrize("name", NEEDED["linux"])
def test_a_missing_capability_is_named(name, monkeypatch):
    monkeypatch.setenv("FORKSHM_BACKEND", "linux")
    assert dataclasses.replace(capabilities, **{name: False}).missing() == [name]
    with pytest.raises(UnsupportedError, match=f"this system lacks {name}. forkshm needs Linux 5.3") as caught:
        _choose(all_but(name))
    assert caught.value.capability == name


def test_a_system_without_a_backend_names_the_missing_capabilities(monkeypatch):
    monkeypatch.delenv("FORKSHM_BACKEND", raising=False)
    with pytest.raises(UnsupportedError, match="this system lacks pidfd"):
        _choose(all_but("pidfd", "shm_open"))


def test_a_missing_capability_is_named_with_the_reason_of_the_kernel(monkeypatch):
    """Programs in containers may find /dev/shm read-only, or not at all."""

    def refuse(*_):
        raise OSError(errno.EROFS, "refused")

    monkeypatch.setenv("FORKSHM_BACKEND", "posix")
    monkeypatch.setattr(_syscalls, "shm_open", refuse)
    with pytest.raises(UnsupportedError, match=r"lacks shm_open \(Read-only file system\).*needs a .*/dev/shm"):
        _choose(probe)
    _capabilities.refusals.clear()


def test_a_system_without_linux_features_gets_the_posix_backend(run_script):
    script = """
from forkshm.backend import Capabilities, _capabilities
_capabilities._LINUX_PROBES = {}
from forkshm.backend import _choose
backend, found = _choose(_capabilities.probe)
print(backend.name, found.missing("posix"))
"""
    assert run_script(script) == "posix []\n"


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FORKSHM_BACKEND", "beos")
    with pytest.raises(UnsupportedError, match="FORKSHM_BACKEND is 'beos': it must be linux, posix, or not set"):
        _choose(probe)


# -- memory ---------------------------------------------------------------------------


def test_memory_is_zero_filled_nameless_and_not_inherited(memory):
    assert os.fstat(memory).st_size == 4 * PAGE
    assert os.pread(memory, 4 * PAGE, 0) == bytes(4 * PAGE)
    assert not os.get_inheritable(memory)
    assert os.readlink(f"/proc/self/fd/{memory}") == f"/memfd:forkshm-region-test-{os.getpid()} (deleted)"


def test_identity_tells_objects_apart_and_not_fds(memory):
    other = kernel.create_memory(PAGE, "other")
    again = kernel.reopen(memory)
    assert kernel.identify(memory) == kernel.identify(again) != kernel.identify(other)
    status = os.fstat(memory)
    assert kernel.identify(memory) == ((status.st_dev, status.st_ino), status.st_size)
    os.close(other)
    os.close(again)


@pytest.mark.parametrize("access", list(Access))
def test_a_mapping_shows_the_object_from_its_offset(memory, access):
    os.pwrite(memory, b"abc", PAGE)
    address = kernel.map(memory, 2 * PAGE, access, PAGE)
    assert bytes(view(address, 4)) == b"abc\0"
    kernel.unmap(address, 2 * PAGE)


@pytest.mark.parametrize(("access", "seen"), [(Access.SHARED, b"x"), (Access.PRIVATE, b"\0")])
def test_writes_are_seen_by_others_or_not(memory, access, seen):
    address = kernel.map(memory, PAGE, access)
    view(address, 1)[0] = ord("x")
    assert os.pread(memory, 1, 0) == seen
    kernel.unmap(address, PAGE)


def test_the_pages_of_a_private_mapping_that_were_written_are_told(memory):
    os.pwrite(memory, b"x" * PAGE, 2 * PAGE)
    address = kernel.map(memory, 4 * PAGE, Access.PRIVATE)
    seen = view(address, 4 * PAGE)
    assert kernel.own_pages(address, 4 * PAGE) == []
    assert bytes(seen[2 * PAGE :]) == b"x" * PAGE + bytes(PAGE)  # only read
    assert kernel.own_pages(address, 4 * PAGE) == []
    seen[PAGE] = seen[2 * PAGE + 5] = 1
    assert kernel.own_pages(address, 4 * PAGE) == [(address + PAGE, 2 * PAGE)]
    seen[0] = seen[4 * PAGE - 1] = 0  # written, though with the same values
    assert kernel.own_pages(address, 4 * PAGE) == [(address, 4 * PAGE)]
    assert kernel.own_pages(address + 3 * PAGE, PAGE) == [(address + 3 * PAGE, PAGE)]
    seen.release()
    kernel.unmap(address, 4 * PAGE)


def test_written_pages_are_found_anywhere_in_large_mappings():
    size = 2 * 2**15 * PAGE  # two reads of the kernel's table, and one more page
    memory = kernel.create_memory(size + PAGE, "region-test")
    address = kernel.map(memory, size + PAGE, Access.PRIVATE)
    seen = view(address, size + PAGE)
    for page in (2**15 - 1, 2**15, 2**16):
        seen[page * PAGE] = 1
    expected = [(address + (2**15 - 1) * PAGE, 2 * PAGE), (address + size, PAGE)]
    assert kernel.own_pages(address, size + PAGE) == expected
    seen.release()
    kernel.unmap(address, size + PAGE)
    os.close(memory)


def test_a_forked_child_finds_pages_written_by_child_and_parent(memory, in_child):
    address = kernel.map(memory, 4 * PAGE, Access.PRIVATE)
    seen = view(address, 4 * PAGE)
    seen[0] = 1

    def write():
        inherited = kernel.own_pages(address, 4 * PAGE)
        seen[2 * PAGE] = 1
        assert inherited == [(address, PAGE)]
        assert kernel.own_pages(address, 4 * PAGE) == [(address, PAGE), (address + 2 * PAGE, PAGE)]

    assert in_child(write) == 0
    assert kernel.own_pages(address, 4 * PAGE) == [(address, PAGE)]
    seen.release()
    kernel.unmap(address, 4 * PAGE)


def test_a_refused_mapping_keeps_the_errno(memory):
    with pytest.raises(OSError, match="mmap") as caught:
        kernel.map(memory, 2**62, Access.SHARED)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(OSError, match="mmap") as caught:
        kernel.map(memory, PAGE, Access.SHARED, 1)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="munmap"):
        kernel.unmap(1, PAGE)


def test_discarded_pages_are_zero_and_given_back(memory):
    address = kernel.map(memory, 4 * PAGE, Access.SHARED)
    view(address, 4 * PAGE)[:] = b"x" * (4 * PAGE)
    kernel.discard(address + PAGE, 2 * PAGE)
    content = bytes(view(address, 4 * PAGE))
    # The kernel may clear and keep parts of a huge page, but it gives back whole ones.
    kernel.discard(address, 4 * PAGE)
    kernel.unmap(address, 4 * PAGE)
    assert content == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
    assert os.fstat(memory).st_blocks == 0


def test_a_window_dies_with_its_last_view(memory):
    address = kernel.map(memory, PAGE, Access.SHARED)
    buffer_at = kernel.buffer_at(address, PAGE)
    died = weakref.ref(buffer_at)
    parts = [memoryview(buffer_at)[1:], memoryview(buffer_at).cast("B")[5:7].toreadonly()]
    del buffer_at
    gc.collect()
    assert died() is not None
    del parts[0]
    assert died() is not None
    parts.clear()
    assert died() is None
    kernel.unmap(address, PAGE)


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda data: memoryview(data)[:]])
def test_bytes_are_copied_to_an_address_from_any_buffer(memory, kind):
    address = kernel.map(memory, PAGE, Access.SHARED)
    source = kind(b"hello world")
    kernel.copy(address + 3, source, 5)
    assert bytes(view(address, 10)) == b"\0\0\0hello\0\0"
    with pytest.raises(ValueError, match="cannot copy 12 bytes: the source holds only 11"):
        kernel.copy(address, source, 12)
    with pytest.raises(TypeError):
        kernel.copy(address, "text", 1)
    kernel.unmap(address, PAGE)


def test_the_address_of_a_buffer_is_where_its_first_byte_is(memory):
    address = kernel.map(memory, PAGE, Access.SHARED)
    buffer_at = view(address, PAGE)
    assert kernel.address_of(buffer_at) == address
    assert kernel.address_of(buffer_at[7:9].toreadonly()) == address + 7
    kernel.unmap(address, PAGE)


# -- memory of other processes --------------------------------------------------------


def test_a_remote_fd_is_opened_if_it_is_the_named_object(memory):
    identity, _ = kernel.identify(memory)
    fd = kernel.open_remote(os.getpid(), memory, identity)
    assert kernel.identify(fd)[0] == identity
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_remote_fd_of_a_different_object_is_not_opened(memory):
    other = kernel.create_memory(PAGE, "other")
    identity, _ = kernel.identify(other)
    with pytest.raises(OSError, match="Stale") as caught:
        kernel.open_remote(os.getpid(), memory, identity)
    assert caught.value.errno == errno.ESTALE
    os.close(other)
    with pytest.raises(FileNotFoundError):
        kernel.open_remote(os.getpid(), 2**20, identity)


# -- leases ---------------------------------------------------------------------------


def test_a_lock_is_seen_by_other_descriptions_and_not_by_its_own(memory):
    one, other = kernel.reopen(memory), kernel.reopen(memory)
    kernel.lock_shared(one, 7)
    kernel.lock_shared(one, 7)
    assert kernel.is_held(other, 7)
    assert not kernel.is_held(one, 7)
    assert not kernel.is_held(other, 6)
    assert not kernel.is_held(other, 8)
    kernel.lock_shared(other, 7)
    kernel.unlock(one, 7)
    assert kernel.is_held(one, 7)
    assert not kernel.is_held(other, 7)
    os.close(other)
    assert not kernel.is_held(one, 7)
    os.close(one)


def test_a_lock_lives_as_long_as_any_fd_of_its_description(memory):
    one = kernel.reopen(memory)
    kernel.lock_shared(one, 2**62)
    twin = os.dup(one)
    os.close(one)
    assert kernel.is_held(memory, 2**62)
    os.close(twin)
    assert not kernel.is_held(memory, 2**62)


def test_closing_another_fd_of_the_file_does_not_let_go(memory):
    """A traditional POSIX lock would be released here."""
    one, other = kernel.reopen(memory), kernel.reopen(memory)
    kernel.lock_shared(one, 0)
    os.close(other)
    assert kernel.is_held(memory, 0)
    os.close(one)


# -- processes ------------------------------------------------------------------------


def test_the_start_time_of_a_process_is_constant():
    assert kernel.start_time(os.getpid()) == kernel.start_time(os.getpid()) > 0
    with pytest.raises(FileNotFoundError):
        kernel.start_time(2**22 + 1)


def test_the_start_time_is_found_behind_any_name(in_child):
    def look():
        expected = kernel.start_time(os.getpid())
        with open("/proc/self/comm", "w") as name:
            name.write(") 1 2 (3 )")
        assert kernel.start_time(os.getpid()) == expected

    assert in_child(look) == 0


def test_an_fd_of_a_process_is_readable_when_it_ends(wait_until):
    import select

    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    fd = kernel.open_process(pid)
    assert select.select([fd], [], [], 0)[0] == []
    os.kill(pid, signal.SIGKILL)
    assert select.select([fd], [], [])[0] == [fd]
    os.waitpid(pid, 0)
    os.close(fd)


@pytest.mark.parametrize("dies_first", [False, True])
def test_a_process_dies_with_the_other_end_of_its_lifeline(dies_first):
    lifeline, held = os.pipe()
    ready, say = os.pipe()
    if dies_first:
        os.close(held)
    pid = os.fork()
    if pid == 0:
        if not dies_first:
            os.close(held)
        kernel.die_with(lifeline)
        os.write(say, b"!")
        while True:
            signal.pause()
    os.close(say)
    if not dies_first:
        assert os.read(ready, 1) == b"!"
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.close(held)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.close(lifeline)
    os.close(ready)
