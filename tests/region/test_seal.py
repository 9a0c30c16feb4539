"""seal(): memory that is read-only because the kernel enforces it, against every attempt to write."""

from __future__ import annotations

import contextlib
import ctypes  # noqa: TID251 - the attacker calls C
import errno
import faulthandler
import fcntl
import mmap
import os
import pathlib
import pickle
import signal
import subprocess

import pytest

import forkshm
from forkshm import MappedRegion, SharedMemoryObject, UnsupportedError, anonymous_shared_memory
from forkshm.backend import kernel
from forkshm.errors import RegionClosedError, RegionCreateError

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 2 * PAGE + 5
CONTENT = bytes(position % 251 for position in range(SIZE))

# <asm-generic/mman.h>, <linux/falloc.h>, <linux/fcntl.h>
MADV_REMOVE = 9
MAP_FIXED = 0x10
KEEP_SIZE_AND_PUNCH_HOLE = 3
F_ADD_SEALS = 1033

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def checked(answer):
    if answer in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def by_fd(fd):
    """The ways to change an object through its fd."""

    def map_it(**how):
        with mmap.mmap(fd, SIZE, **how) as mapped:
            mapped[0] = 255

    def send_to_it():
        with open("/dev/zero", "rb") as zeros:
            os.lseek(fd, 0, os.SEEK_SET)
            os.sendfile(fd, zeros.fileno(), 0, 10)

    def copy_to_it():
        other = os.memfd_create("other")
        try:
            os.write(other, b"\xff" * 10)
            assert os.copy_file_range(other, fd, 10, 0, 0) == 10
        finally:
            os.close(other)

    def map_and_protect():
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
            with memoryview(mapped) as view:
                address = kernel.address_of(view)
            checked(libc.mprotect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE))

    yield "write", lambda: (os.lseek(fd, 0, os.SEEK_SET), os.write(fd, b"\xff"))
    yield "pwrite", lambda: os.pwrite(fd, b"\xff", 0)
    yield "pwrite at the end", lambda: os.pwrite(fd, b"\xff", SIZE)
    yield "writev", lambda: os.pwritev(fd, [b"\xff"], 1)
    yield "sendfile", send_to_it
    yield "copy_file_range", copy_to_it
    yield "ftruncate to less", lambda: os.ftruncate(fd, 1)
    yield "ftruncate to more", lambda: os.ftruncate(fd, SIZE + PAGE)
    yield "posix_fallocate", lambda: os.posix_fallocate(fd, 0, SIZE + PAGE)
    yield "punch a hole", lambda: checked(libc.fallocate(fd, KEEP_SIZE_AND_PUNCH_HOLE, 0, PAGE))
    yield "mmap", map_it
    yield "mmap for writing only", lambda: map_it(prot=mmap.PROT_WRITE)
    yield "mmap and mprotect", map_and_protect
    yield "another seal", lambda: fcntl.fcntl(fd, F_ADD_SEALS, 1)


def attempts(region, parent):
    """Try to write to a sealed region by every route; return the outcomes, by route."""
    fd, address = region.fileno(), region.address
    write = mmap.PROT_READ | mmap.PROT_WRITE
    page = address - address % PAGE

    def store():
        region.buf[0] = 255

    def write_own_memory():
        own = os.open("/proc/self/mem", os.O_RDWR)
        try:
            os.pwrite(own, b"\xff", address)
        finally:
            os.close(own)

    routes = [
        ("store", store),
        ("MappedRegion", lambda: MappedRegion(region, "read_write").close()),
        ("mprotect", lambda: checked(libc.mprotect(page, SIZE, write))),
        ("mprotect of a page", lambda: checked(libc.mprotect(page, PAGE, mmap.PROT_WRITE))),
        ("MADV_REMOVE", lambda: checked(libc.madvise(page, PAGE, MADV_REMOVE))),
        ("MAP_FIXED", lambda: checked(libc.mmap(page, PAGE, write, mmap.MAP_SHARED | MAP_FIXED, fd, 0))),
        ("/proc/self/mem", write_own_memory),
        *((f"fd: {name}", action) for name, action in by_fd(fd)),
    ]
    outcome = {}
    with contextlib.ExitStack() as opened:
        for path in (f"/proc/self/fd/{fd}", f"/proc/{parent}/fd/"):
            if path.endswith("/"):  # the creator's fds: the one for the same object
                path += next(
                    name
                    for name in os.listdir(path)
                    if os.path.exists(path + name) and os.path.samestat(os.stat(path + name), os.fstat(fd))
                )
            for flags in (os.O_RDWR, os.O_WRONLY):
                again = os.open(path, flags)
                opened.callback(os.close, again)
                routes += [(f"{path} {flags}: {name}", action) for name, action in by_fd(again)]
            routes.append((f"{path} O_TRUNC", lambda path=path: os.close(os.open(path, os.O_RDWR | os.O_TRUNC))))
        for name, action in routes:
            try:
                action()
            except TypeError:
                outcome[name] = "read-only buffer"
            except OSError as error:
                outcome[name] = errno.errorcode[error.errno]
            else:
                outcome[name] = "done"
    return outcome


def check(outcome):
    assert len(outcome) > 60
    refused = {"read-only buffer", "EPERM", "EACCES", "EIO"}
    assert not {name: what for name, what in outcome.items() if what not in refused}


@pytest.fixture
def region():
    """Provide a sealed region that contains CONTENT."""
    with anonymous_shared_memory(SIZE) as made:
        made.buf[:] = CONTENT
        made.seal()
        yield made
        assert bytes(made.buf) == CONTENT
        assert os.fstat(made.fileno()).st_size == SIZE


def test_without_a_seal_the_routes_lead_to_the_memory(in_child):
    """Without this, the tests below would prove nothing."""
    parent = os.getpid()

    def attack():
        outcome = attempts(region, parent)
        ways = [name.rpartition(": ")[2] for name, what in outcome.items() if what == "done"]
        assert {name.rpartition(": ")[2] for name in outcome} - set(ways) <= {
            "ftruncate to less",  # sealed from the start
            f"/proc/self/fd/{region.fileno()} O_TRUNC",
            f"/proc/{parent}/fd/{region.fileno()} O_TRUNC",
        }
        assert ways.count("write") == 5

    with anonymous_shared_memory(SIZE) as region:
        assert in_child(attack) == 0
        assert os.fstat(region.fileno()).st_size == SIZE + PAGE


# -- processes that try to write --------------------------------------------------------


def test_a_forked_child_is_refused_by_every_route(region, in_child):
    parent = os.getpid()

    def attack():
        assert (region.mode, region.sealed, region.buf.readonly) == ("read_only", True, True)
        assert bytes(region.buf) == CONTENT
        check(attempts(region, parent))
        assert bytes(region.buf) == CONTENT

    assert in_child(attack) == 0
    assert region.mode == "read_write"


def test_a_grandchild_is_refused(region, in_child):
    parent = os.getpid()
    assert in_child(lambda: in_child(lambda: check(attempts(region, parent)))) == 0


ATTACK = """
import sys
sys.path.insert(0, sys.argv[1])
import pickle, test_seal
region = pickle.loads(bytes.fromhex(sys.argv[2])).attach()
assert region.mode == "read_only", region
test_seal.check(test_seal.attempts(region, int(sys.argv[3])))
assert bytes(region.buf) == test_seal.CONTENT
print("held")
"""


def test_another_program_is_refused_by_every_route(region, run_script):
    from forkshm.descriptor._region import describe

    descriptor = pickle.dumps(describe(region)).hex()
    assert run_script(ATTACK, pathlib.Path(__file__).parent, descriptor, os.getpid()) == "held\n"


def look_and_attack(region, parent):
    return region.mode, region.buf.readonly, bytes(region.buf), attempts(region, parent)


def test_a_worker_started_before_is_refused_by_every_route(pool):
    with anonymous_shared_memory(SIZE) as region:
        region.buf[:] = CONTENT
        region.seal()
        for _ in range(2):
            mode, readonly, content, outcome = pool.apply(look_and_attack, (region, os.getpid()))
            assert (mode, readonly, content) == ("read_only", True, CONTENT)
            check(outcome)
        assert bytes(region.buf) == CONTENT


def test_a_worker_with_a_writable_mapping_gets_later_ones_read_only(pool):
    def write(region):
        region.buf[0] = 1
        return os.getpid()

    with anonymous_shared_memory(SIZE) as region:
        assert pool.apply(write, (region,)) > 0
        region.seal()
        with pytest.raises(TypeError, match="read-only"):
            pool.apply(write, (region,))
        assert pool.apply(lambda region: region.mode, (region,)) == "read_only"


# -- views made before ----------------------------------------------------------------


def write_through(view):
    faulthandler.disable()  # otherwise it prints all stacks
    view[0] = 255


def test_a_child_that_writes_through_an_inherited_view_dies_of_sigsegv(region, in_child):
    with region.buf as view, region.buf[PAGE:] as tail:
        for inherited in (view, tail):
            assert in_child(lambda inherited=inherited: write_through(inherited)) == -signal.SIGSEGV
        assert in_child(lambda: 0 if bytes(view) == CONTENT else 1) == 0


def test_a_child_that_writes_through_an_inherited_array_dies_of_sigsegv(region, in_child):
    numpy = pytest.importorskip("numpy")
    inherited = [numpy.frombuffer(region.buf, "u1")]
    assert in_child(lambda: write_through(inherited[0])) == -signal.SIGSEGV
    inherited.clear()


def test_a_child_that_writes_to_the_address_dies_of_sigsegv(region, in_child):
    def write():
        faulthandler.disable()
        ctypes.memset(region.address + SIZE - 1, 1, 1)

    assert in_child(write) == -signal.SIGSEGV


def test_all_mappings_of_a_sealed_object_are_sealed(in_child, pool):
    with anonymous_shared_memory(SIZE) as region, MappedRegion(region, offset=1, size=PAGE) as other:
        region.buf[:] = CONTENT
        assert not other.sealed
        region.seal()
        assert other.sealed
        with other.buf as view:
            assert in_child(lambda: write_through(view)) == -signal.SIGSEGV
        assert in_child(lambda: 0 if (other.mode, other.buf.readonly) == ("read_only", True) else 1) == 0
        assert pool.apply(lambda other: (other.mode, other.buf.readonly), (other,)) == ("read_only", True)
        assert bytes(region.buf) == CONTENT
        other.buf[0] = 255  # the creator can still write, through either mapping
        assert region.buf[1] == 255


def test_a_shrunk_region_stays_sealed(region, in_child):
    with MappedRegion(region, "read_only") as whole:
        part = anonymous_shared_memory(4 * PAGE)
        part.seal()
        part.shrink_by(PAGE + 7, from_back=False)
        part.shrink_by(PAGE)
        with part.buf as view:
            assert in_child(lambda view=view: write_through(view)) == -signal.SIGSEGV
            view[0] = 1
        del view
        assert in_child(lambda: 0 if part.buf[0] == 1 else 1) == 0
        part.close()
        assert bytes(whole.buf) == CONTENT


# -- processes that continue --------------------------------------------------------------


def test_the_creator_can_still_write_and_others_see_the_writes(in_child, pool, wait_until):
    with anonymous_shared_memory(SIZE) as region:
        region.seal()
        region.buf[0] = 1

        def watch():
            assert region.buf[0] == 1
            os.write(said[1], b"!")
            wait_until(lambda: region.buf[SIZE - 1] == 2)

        said = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                watch()
                os._exit(0)
            finally:
                os._exit(1)
        os.read(said[0], 1)
        for fd in said:
            os.close(fd)
        region.buf[SIZE - 1] = 2
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert pool.apply(lambda region: (region.buf[0], region.buf[SIZE - 1]), (region,)) == (1, 2)
        region.flush()
        assert region.advise("dontneed")
        assert (region.buf[0], region.mode, region.sealed) == (1, "read_write", True)


def test_reading_and_private_copies_are_allowed(region, in_child):
    def use():
        for mode in ("read_only", "read_private"):
            with MappedRegion(region, mode) as mine:
                assert bytes(mine.buf) == CONTENT
        with MappedRegion(region, "copy_on_write") as mine:
            mine.buf[0] = 255
            assert (mine.buf[0], region.buf[0]) == (255, CONTENT[0])

    assert in_child(use) == 0
    use()


def test_a_second_writable_mapping_is_refused_to_the_creator_too(region):
    with pytest.raises(RegionCreateError, match="sealed against a read_write mapping") as caught:
        MappedRegion(region)
    assert caught.value.errno == errno.EPERM


def test_sealing_twice_is_allowed_also_in_a_child(region, in_child):
    region.seal()
    assert in_child(region.seal) == 0


def test_a_child_forked_before_the_seal_keeps_its_mapping_and_gets_no_other(in_child):
    """The limit that the documentation names."""
    with anonymous_shared_memory(SIZE) as region:
        go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.read(go[0], 1)
                region.buf[0] = 1
                with pytest.raises(RegionCreateError):
                    MappedRegion(region)
                with pytest.raises(PermissionError):
                    os.pwrite(region.fileno(), b"x", 0)
                os._exit(0)
            finally:
                os._exit(1)
        region.seal()
        os.write(go[1], b"!")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for fd in go:
            os.close(fd)
        assert region.buf[0] == 1


def test_the_seal_outlives_the_creator(run_script):
    """The remaining processes have memory that none of them can write to."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            region = anonymous_shared_memory(SIZE)
            region.buf[:3] = b"abc"
            region.seal()
            os.write(write_end, f"{region.fileno()}".encode())
            signal.pause()
        finally:
            os._exit(1)
    fd = os.open(f"/proc/{pid}/fd/{int(os.read(read_end, 20))}", os.O_RDWR)
    os.close(read_end)
    os.close(write_end)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(fd, "r+b", buffering=0) as left:
        with MappedRegion(left, "read_only") as region:
            assert bytes(region.buf[:3]) == b"abc"
        for action in (lambda: left.write(b"x"), lambda: MappedRegion(left)):
            with pytest.raises(OSError) as caught:
                action()
            assert caught.value.errno == errno.EPERM


# -- memory that can be sealed ----------------------------------------------------------


def test_named_memory_cannot_be_sealed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    name = f"forkshm-test-{os.getpid()}-{os.urandom(8).hex()}"
    with (
        forkshm.remove_on_exit(name),
        forkshm.SharedMemoryObject("create_only", name) as shm,
        forkshm.FileMapping(path) as file,
    ):
        shm.truncate(3)
        for mappable in (shm, file):
            with MappedRegion(mappable) as region:
                with pytest.raises(UnsupportedError, match="Only anonymous memory without other seals") as caught:
                    region.seal()
                assert caught.value.capability == "seals"
                assert not region.sealed
                region.buf[0] = 1


@pytest.mark.parametrize(("flags", "allowed"), [(os.MFD_ALLOW_SEALING, True), (0, False)])
def test_a_foreign_memfd_that_allows_seals_can_be_sealed(in_child, flags, allowed):
    with open(os.memfd_create("forkshm-region-other", flags | os.MFD_CLOEXEC), "r+b", buffering=0) as file:
        file.truncate(PAGE)
        with MappedRegion(file) as region:
            if allowed:
                region.seal()
                assert in_child(lambda: write_through(region.buf.obj)) == -signal.SIGSEGV
            else:
                with pytest.raises(UnsupportedError):
                    region.seal()
            assert region.sealed is allowed


@pytest.mark.parametrize("mode", ["read_only", "copy_on_write", "read_private"])
def test_only_a_read_write_region_can_be_sealed(mode):
    with anonymous_shared_memory(10) as whole, MappedRegion(whole, mode) as region:
        with pytest.raises(ValueError, match="only a read_write region can be sealed"):
            region.seal()
        assert not region.sealed
        whole.buf[0] = 1


def test_a_closed_region_cannot_be_sealed():
    region = anonymous_shared_memory(10)
    region.close()
    with pytest.raises(RegionClosedError):
        region.seal()
    assert not region.sealed


def test_a_region_at_a_fixed_address_stays_there_in_the_child(in_child):
    with anonymous_shared_memory(2**30) as free:
        address = free.address + 2**29
    with anonymous_shared_memory(SIZE, address - address % PAGE) as region:
        region.buf[:] = CONTENT
        region.seal()
        assert in_child(lambda: 0 if ctypes.string_at(address - address % PAGE, SIZE) == CONTENT else 1) == 0
        with region.buf as view:
            assert in_child(lambda: write_through(view)) == -signal.SIGSEGV


FORKED = """
import os, sys, forkshm
region = forkshm.anonymous_shared_memory(4096)
region.seal()
view = region.buf
if sys.argv[1] == "closed":
    os.close(region.fileno())
else:
    os.dup2(os.open("/dev/null", os.O_RDWR), region.fileno())  # nothing that can be mapped
pid = os.fork()
if pid == 0:
    view[0] = 255
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert code == os.EX_OSERR, code
assert view[0] == 0
view[0] = 1
os._exit(0)
"""


@pytest.mark.parametrize(("what", "reason"), [("closed", "Bad file descriptor"), ("other", "No such device")])
def test_a_child_that_cannot_map_sealed_memory_ends_with_a_message(run_script, what, reason):
    done = run_script(FORKED, what, check=False)
    assert done.returncode == 0, done.stderr
    assert "ends: its parent sealed 4,096 bytes at 0x" in done.stderr
    assert f"they cannot be mapped again for reading ({reason})" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_started_program_inherits_no_fd_of_sealed_memory(region):
    done = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
    assert "forkshm-region" not in done.stdout


def test_named_objects_have_their_own_way_to_be_read_only():
    """A process with read permission only cannot map for writing; the owner always can."""
    name = f"forkshm-test-{os.getpid()}-{os.urandom(8).hex()}"
    with forkshm.remove_on_exit(name), SharedMemoryObject("create_only", name, permissions=0o400) as shm:
        shm.truncate(3)
        with MappedRegion(shm) as region, SharedMemoryObject("open_only", name, "read_only") as again:
            with pytest.raises(RegionCreateError, match="does not allow"):
                MappedRegion(again)
            region.buf[0] = 1
