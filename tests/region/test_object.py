"""SharedMemoryObject: names, modes, sizes, owners, and lifetime."""

from __future__ import annotations

import errno
import os
import pickle
import secrets
import signal
import stat
import subprocess
import sys
import threading

import pytest
from room import needs_room_in_shm
from system import SHM, in_pages, open_fds, path_of_named

from forkshm import Creation, MappedRegion, Mode, RegionError, RegionNotFoundError, SharedMemoryObject, remove_on_exit
from forkshm.backend import kernel
from forkshm.errors import RegionAccessError, RegionClosedError, RegionCreateError, RegionExistsError

PAGE = os.sysconf("SC_PAGE_SIZE")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
NOBODY = 65534


def unused_name():
    return f"forkshm-test-{os.getpid()}-{secrets.token_hex(8)}"


@pytest.fixture
def name():
    """Provide an unused name, which is unused again afterwards."""
    made = unused_name()
    yield made
    path = path_of_named(made)
    if os.path.isdir(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


def create(name, *args, size=None, **options):
    shm = SharedMemoryObject("create_only", name, *args, **options)
    if size is not None:
        shm.truncate(size)
    return shm


def blocks(shm):
    return os.fstat(shm.fileno()).st_blocks * 512


# -- creating and opening -------------------------------------------------------------


def test_a_new_object_has_a_name_a_mode_no_bytes_and_no_other_readers(name):
    with SharedMemoryObject(Creation.create_only, name) as shm:
        assert (shm.name, shm.mode, shm.size, shm.closed) == (name, Mode.read_write, 0, False)
        status = os.stat(f"{SHM}/{name}")
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert (os.fstat(shm.fileno()).st_ino, status.st_uid) == (status.st_ino, os.geteuid())
        assert not os.get_inheritable(shm.fileno())


# Boost 4.11: "create twice": already_exists_error. "open missing": not_found_error.
def test_existing_and_missing_objects_raise_different_errors(name):
    before = open_fds()
    with pytest.raises(RegionNotFoundError, match=r"no object of that name exists\. Create it with open_or") as missing:
        SharedMemoryObject("open_only", name)
    with create(name):
        with pytest.raises(RegionExistsError, match="open_or_create") as there:
            create(name)
    assert (missing.value.errno, there.value.errno) == (errno.ENOENT, errno.EEXIST)
    assert isinstance(missing.value, FileNotFoundError)
    assert isinstance(there.value, FileExistsError)
    assert repr(name) in str(missing.value)
    assert repr(name) in str(there.value)
    assert open_fds() == before
    again = pickle.loads(pickle.dumps(there.value))
    assert (type(again), again.errno, str(again)) == (RegionExistsError, errno.EEXIST, str(there.value))


@pytest.mark.parametrize("creation", ["open_or_create", "open_only"])
def test_an_existing_object_is_opened_with_its_bytes(name, creation):
    with create(name, size=10) as shm, MappedRegion(shm) as region:
        region.buf[:] = b"0123456789"
        with SharedMemoryObject(creation, name) as again, MappedRegion(again) as other:
            assert (again.size, bytes(other.buf)) == (10, b"0123456789")
            other.buf[0] = 65
        assert region.buf[0] == 65


def test_open_or_create_creates_with_the_permissions(name):
    with SharedMemoryObject("open_or_create", name, permissions=0o640) as shm:
        assert shm.size == 0
        assert stat.S_IMODE(os.fstat(shm.fileno()).st_mode) == 0o640
        with SharedMemoryObject("open_or_create", name, permissions=0o666) as again:
            assert stat.S_IMODE(os.fstat(again.fileno()).st_mode) == 0o640


@pytest.mark.parametrize("permissions", [0o600, 0o644, 0o666, 0o777, 0o000])
def test_the_requested_permissions_ignore_the_umask(name, permissions):
    old = os.umask(0o077)
    try:
        with create(name, permissions=permissions) as shm:
            assert stat.S_IMODE(os.fstat(shm.fileno()).st_mode) == permissions
    finally:
        os.umask(old)


@pytest.mark.parametrize("permissions", [-1, 0o1000, 0o4755, 2**40])
def test_permissions_that_are_none_are_refused_and_nothing_is_created(name, permissions):
    with pytest.raises(ValueError, match="between 0 and 0o777"):
        create(name, permissions=permissions)
    assert not SharedMemoryObject.remove(name)


@pytest.mark.parametrize("creation", ["", "create", None, 0])
def test_a_tag_that_is_none_is_refused(name, creation):
    known = "'create_only', 'open_or_create', 'open_only'"
    with pytest.raises(ValueError, match=f"one of {known}, got {creation!r}. The name comes second"):
        SharedMemoryObject(creation, name)


# Boost 4.11: "shm object opened with copy_on_write": mode_error.
@pytest.mark.parametrize("mode", ["copy_on_write", "read_private"])
def test_a_mode_of_mappings_is_refused_and_nothing_is_created(name, mode):
    with pytest.raises(ValueError, match=f"read_only or read_write, got {mode}, which only MappedRegion takes"):
        create(name, mode)
    assert not SharedMemoryObject.remove(name)


# -- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "telling"),
    [
        ("", "must not be ''"),
        (".", r"must not be '\.'"),
        ("..", r"must not be '\.\.'"),
        ("/leading", "must not contain a slash .* leading slash .* is added for you"),
        ("a/b", "must not contain a slash"),
        ("../etc/passwd", "must not contain a slash"),
        ("a\0b", "NUL"),
        ("x" * 256, "at most 255 bytes"),
        ("\N{SNOWMAN}" * 86, "has 258"),
    ],
)
def test_an_invalid_name_is_refused_everywhere_with_the_reason(bad, telling):
    for use in (create, SharedMemoryObject.remove, remove_on_exit):
        with pytest.raises(ValueError, match=telling):
            use(bad)


@pytest.mark.parametrize("bad", [None, b"bytes", 7])
def test_a_name_is_a_str(bad):
    for use in (create, SharedMemoryObject.remove, remove_on_exit):
        with pytest.raises(TypeError, match="must be a str"):
            use(bad)


@pytest.mark.parametrize(
    "tail", ["", " with spaces", "\N{SNOWMAN} \u00e9", "\n", "...", "%s", "x" * 255, "\u00e9" * 127]
)
def test_other_names_are_allowed_up_to_255_bytes(name, tail):
    whole = os.fsdecode(os.fsencode(name + tail)[:255] if len(tail) == 255 else os.fsencode(name + tail))
    if len(tail) == 127:
        whole = name + "\u00e9" * ((255 - len(name)) // 2) + "x" * ((255 - len(name)) % 2)
        assert len(os.fsencode(whole)) == 255
    try:
        with create(whole, size=1) as shm, SharedMemoryObject("open_only", whole) as again:
            assert shm.name == again.name == whole
            assert whole in os.listdir(SHM)
    finally:
        assert SharedMemoryObject.remove(whole)


# -- objects that must not be opened --------------------------------------------------


CREATIONS = ("open_only", "open_or_create")


@pytest.mark.needs("symbolic_links")
@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_symbolic_link_is_refused_and_its_target_is_unchanged(name, tmp_path, target):
    path = tmp_path / target
    if target == "there":
        path.write_bytes(b"secret")
    os.symlink(path, f"{SHM}/{name}")
    before = open_fds()
    for creation in CREATIONS:
        for mode in ("read_write", "read_only"):
            with pytest.raises(RegionAccessError, match="symbolic link") as caught:
                SharedMemoryObject(creation, name, mode)
            assert caught.value.errno == errno.ELOOP
    with pytest.raises(RegionExistsError):
        create(name)
    assert open_fds() == before
    assert path.exists() == (target == "there")
    assert SharedMemoryObject.remove(name)  # the link, not its target
    assert path.exists() == (target == "there")


@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_a_fifo_is_refused_without_waiting_for_its_other_end(name, mode):
    os.mkfifo(f"{SHM}/{name}")
    before = open_fds()
    for creation in CREATIONS:
        with pytest.raises(RegionAccessError, match="the name is not a memory object"):
            SharedMemoryObject(creation, name, mode)
    assert open_fds() == before


@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_a_directory_is_refused_and_not_removed(name, mode):
    os.mkdir(path_of_named(name))
    before = open_fds()
    for creation in CREATIONS:
        with pytest.raises((RegionAccessError, RegionCreateError)):
            SharedMemoryObject(creation, name, mode)
    assert open_fds() == before
    with pytest.raises(RegionAccessError, match="cannot remove"):
        SharedMemoryObject.remove(name)
    assert os.path.isdir(path_of_named(name))


@pytest.mark.needs("unix_sockets")
def test_a_socket_is_refused(name):
    import socket

    with socket.socket(socket.AF_UNIX) as there:
        there.bind(f"{SHM}/{name}")
        with pytest.raises(RegionError):
            SharedMemoryObject("open_only", name)


@AS_ROOT
@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_an_object_of_another_user_is_refused_unless_asked_for(name, mode):
    create(name, size=10, permissions=0o666).close()
    os.chown(f"{SHM}/{name}", NOBODY, NOBODY)
    before = open_fds()
    for creation in CREATIONS:
        with pytest.raises(RegionAccessError, match=f"belongs to user {NOBODY}, and you are 0.*any_owner") as caught:
            SharedMemoryObject(creation, name, mode)
        assert caught.value.errno == errno.EPERM
    assert open_fds() == before
    with SharedMemoryObject("open_only", name, mode, any_owner=True) as shm, MappedRegion(shm, mode) as region:
        assert region.size == 10


@AS_ROOT
def test_missing_permission_raises(name, in_child):
    create(name, size=10, permissions=0o600).close()
    readable = unused_name()
    create(readable, size=10, permissions=0o644).close()

    def stranger():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for mode in ("read_write", "read_only"):
            with pytest.raises(RegionAccessError, match=f"as {mode}: its permissions forbid it") as caught:
                SharedMemoryObject("open_only", name, mode, any_owner=True)
            assert caught.value.errno == errno.EACCES
        with pytest.raises(RegionAccessError, match="belongs to user 0"):
            SharedMemoryObject("open_only", readable, "read_only")
        with pytest.raises(RegionAccessError, match="permissions forbid it"):
            SharedMemoryObject("open_only", readable, any_owner=True)
        with SharedMemoryObject("open_only", readable, "read_only", any_owner=True) as shm:
            MappedRegion(shm, "read_only").close()
        with pytest.raises(RegionAccessError, match="another user"):
            SharedMemoryObject.remove(name)
        with remove_on_exit(name):
            pass  # the kernel forbids this

    try:
        assert in_child(stranger) == 0
    finally:
        assert SharedMemoryObject.remove(readable)


# -- size -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2**20 + 1], ids=in_pages)
def test_truncate_sets_the_size_and_takes_the_memory(name, size):
    needs_room_in_shm(size)
    with create(name) as shm:
        shm.truncate(size)
        assert shm.size == size
        assert blocks(shm) >= size
        if size:
            with MappedRegion(shm) as region:
                assert bytes(region.buf) == bytes(size)
                region.buf[-1] = 1


def test_growing_keeps_the_bytes_and_shrinking_loses_them(name):
    with create(name) as shm:
        for size in (10, 10, PAGE + 1, 3 * PAGE, PAGE - 1, 5, 0, 7):
            before = os.pread(shm.fileno(), 4 * PAGE, 0)
            shm.truncate(size)
            assert os.pread(shm.fileno(), 4 * PAGE, 0) == (before + bytes(size))[:size]
            os.pwrite(shm.fileno(), b"\xff" * size, 0)


@pytest.mark.parametrize("size", [64 * PAGE, 64 * PAGE + 1, 32 * PAGE], ids=["whole", "more", "half"])
def test_holes_that_others_left_are_reserved_too(name, size):
    """Boost and the standard library size, or once sized, an object without reserving its memory."""
    with create(name) as shm:
        os.ftruncate(shm.fileno(), 64 * PAGE)
        assert blocks(shm) == 0
        shm.truncate(size)
        assert blocks(shm) >= size


def test_a_new_size_is_seen_by_every_opening_and_by_regions_mapped_later(name):
    with create(name, size=10) as shm, SharedMemoryObject("open_only", name, "read_only") as again:
        with MappedRegion(again, "read_only") as early:
            shm.truncate(PAGE + 1)
            assert (again.size, early.size) == (PAGE + 1, 10)
        with MappedRegion(again, "read_only") as late:
            assert late.size == PAGE + 1


# Boost 4.11: "truncate of a read_only object": system_error, native 9. Here it is refused without a kernel call.
def test_a_read_only_object_cannot_be_truncated(name):
    with create(name, size=10), SharedMemoryObject("open_only", name, "read_only") as shm:
        with pytest.raises(RegionAccessError, match="opened read_only") as caught:
            shm.truncate(5)
        assert caught.value.errno == errno.EACCES
        assert shm.size == 10


@pytest.mark.parametrize("size", [-1, 2**63, 2**64])
def test_a_size_that_no_object_has_is_refused(name, size):
    with create(name, size=5) as shm:
        with pytest.raises(ValueError, match=f"between 0 and .* got {size}"):
            shm.truncate(size)
        assert shm.size == 5


@pytest.mark.parametrize("size", [1.0, "1", None])
def test_a_size_is_an_integer(name, size):
    with create(name) as shm, pytest.raises(TypeError):
        shm.truncate(size)


@pytest.mark.parametrize("size", [2**63 - 1, 2**62])
def test_more_than_the_system_has_is_refused_by_the_kernel(name, size):
    with create(name, size=5) as shm:
        with pytest.raises(RegionCreateError, match=f"{size:,} bytes") as caught:
            shm.truncate(size)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)
        assert (caught.value.size, shm.size) == (size, 5)


FULL = """
import ctypes, errno, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000):
    print("skip: unshare(2):", os.strerror(ctypes.get_errno())); sys.exit()
for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        print("skip:", error); sys.exit()
    if done.returncode:
        print("skip:", done.stderr.strip()); sys.exit()

from forkshm import MappedRegion, SharedMemoryObject, anonymous_shared_memory
from forkshm.errors import RegionCreateError

with SharedMemoryObject("create_only", "object") as shm:
    shm.truncate(600_000)
    region = MappedRegion(shm)
    region.buf[:] = bytes([7]) * 600_000
    for size in (2 * 2**20, 2**20 + 1, 100 * 2**20):
        try:
            shm.truncate(size)
        except RegionCreateError as error:
            assert isinstance(error, OSError)
            assert error.errno == errno.ENOSPC, error
            assert "/dev/shm" in str(error) and "anonymous_shared_memory" in str(error), error
        else:
            raise AssertionError(size)
        assert (shm.size, os.stat("/dev/shm/object").st_size) == (600_000, 600_000)
        assert os.statvfs("/dev/shm").f_bavail * 4096 >= 400_000  # what was tried was given back
    assert set(region.buf) == {7}
    shm.truncate(1_000_000)
    whole = MappedRegion(shm)
    whole.buf[:] = bytes([8]) * 1_000_000  # all of it is there: no SIGBUS
    assert region.buf[-1] == 8

# A hole made without reserving: the same truncate to a larger size finds that it is not there.
with SharedMemoryObject("create_only", "hole") as shm:
    os.ftruncate(shm.fileno(), 500_000)
    try:
        shm.truncate(500_001)
    except RegionCreateError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("the hole was not reserved")
    assert shm.size == 500_000

with anonymous_shared_memory(8 * 2**20) as region:
    region.buf[:] = bytes([9]) * region.size
    assert region.buf[-1] == 9
print("done")
"""


@pytest.mark.needs("shm_open")
@pytest.mark.needs("memfd")
def test_a_full_dev_shm_is_an_error_when_the_size_is_set_and_never_a_sigbus(run_script):
    said = run_script(FULL)
    if said.startswith("skip"):
        pytest.skip(f"no mount namespace of our own: {said[6:].strip()}")
    assert said == "done\n"


def test_signals_do_not_disturb_truncate(name):
    """The bug of boostorg/interprocess#152: EINTR."""
    needs_room_in_shm(8 * 2**20)
    hits = []
    old = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        with create(name) as shm:
            while len(hits) < 3:
                shm.truncate(8 * 2**20)
                shm.truncate(0)
            shm.truncate(4 * 2**20)
            assert (shm.size, blocks(shm) >= shm.size) == (4 * 2**20, True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# -- lifetime -------------------------------------------------------------------------


def test_a_closed_object_cannot_be_used_and_closing_twice_is_allowed(name):
    shm = create(name, size=5)
    fd = shm.fileno()
    shm.close()
    shm.close()
    assert (shm.closed, shm.name, shm.mode) == (True, name, "read_write")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for use in (lambda: shm.size, shm.fileno, lambda: shm.truncate(1), shm.__enter__, lambda: MappedRegion(shm)):
        with pytest.raises(RegionClosedError, match=f"{name}.* closed in this process"):
            use()
    assert "closed" in repr(shm)


def test_an_object_that_is_let_go_closes_its_fd_and_keeps_its_name(name):
    before = open_fds()
    shm = create(name)
    assert len(open_fds()) == len(before) + 1
    assert repr(shm) == f"<SharedMemoryObject '{name}' read_write>"
    del shm
    assert open_fds() == before
    assert SharedMemoryObject.remove(name)


# Boost 4.11: "remove second time": false.
def test_remove_returns_whether_the_object_existed_and_mappings_stay(name):
    shm = create(name, size=PAGE)
    region = MappedRegion(shm)
    region.buf[:3] = b"old"
    assert SharedMemoryObject.remove(name) is True
    assert SharedMemoryObject.remove(name) is False
    with pytest.raises(RegionNotFoundError):
        SharedMemoryObject("open_only", name)
    # The name is free: another object can have it, and does not share memory with the first.
    with create(name, size=3) as another, MappedRegion(another) as other:
        other.buf[:] = b"new"
        assert (bytes(region.buf[:3]), shm.size) == (b"old", PAGE)
        with MappedRegion(shm, "read_only") as again:
            assert bytes(again.buf[:3]) == b"old"
    region.close()
    shm.close()


def test_an_object_survives_its_creator(name, run_script):
    run_script(
        "import sys, forkshm\n"
        "shm = forkshm.SharedMemoryObject('create_only', sys.argv[1])\n"
        "shm.truncate(3)\n"
        "forkshm.MappedRegion(shm).buf[:] = b'abc'\n",
        name,
    )
    with SharedMemoryObject("open_only", name) as shm, MappedRegion(shm) as region:
        assert bytes(region.buf) == b"abc"


def test_a_forked_child_has_the_object_and_closes_its_own(name, in_child):
    with create(name) as shm:

        def use():
            shm.truncate(10)
            MappedRegion(shm).buf[:] = b"from child"
            shm.close()

        assert in_child(use) == 0
        with MappedRegion(shm) as region:
            assert bytes(region.buf) == b"from child"


TRACKED = """
import os, sys
from forkshm import MappedRegion, SharedMemoryObject, anonymous_shared_memory
name, how = sys.argv[1:]
shm = SharedMemoryObject("create_only", name)
shm.truncate(10)
region = MappedRegion(shm)
region.buf[0] = 1
again = SharedMemoryObject("open_or_create", name)
anonymous = anonymous_shared_memory(10)
if os.fork() == 0:
    again.close()
    sys.exit()
os.wait()
tracker = sys.modules.get("multiprocessing.resource_tracker")
assert tracker is None or tracker._resource_tracker._fd is None, "a tracker was started"
with open(f"/proc/self/task/{os.getpid()}/children") as children:
    assert not children.read(), "there is a child"
if how == "leave":
    sys.exit()
if how == "abort":
    os._exit(0)
SharedMemoryObject.remove(name)
"""


@pytest.mark.needs("fork")
@pytest.mark.parametrize("how", ["leave", "abort", "remove"])
def test_no_resource_tracker_is_started_and_no_leak_is_reported(name, how, run_script):
    done = run_script(TRACKED, name, how, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.path.exists(path_of_named(name)) == (how != "remove")


CYCLES = """
import os, random, signal, sys
from forkshm import MappedRegion, SharedMemoryObject, anonymous_shared_memory

prefix, cycles = sys.argv[1], int(sys.argv[2])
rng = random.Random(7)

def shared_kib():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))

def live(number):
    anonymous = anonymous_shared_memory(2**20)
    anonymous.buf[:] = bytes([1]) * 2**20
    shm = SharedMemoryObject("create_only", f"{prefix}-{number}")
    shm.truncate(4096)
    region = MappedRegion(shm)
    region.buf[:6] = number.to_bytes(6, "little")
    if number % 3 == 0:
        gone = SharedMemoryObject("create_only", f"{prefix}-{number}-gone")
        gone.truncate(3 * 2**18)
        SharedMemoryObject.remove(gone.name)

fds, before = os.listdir("/proc/self/fd"), shared_kib()
whole = cut = 0
for number in range(cycles):
    pid = os.fork()
    if pid == 0:
        try:
            if number % 2:  # killed by itself when all is there
                live(number)
                os.kill(os.getpid(), signal.SIGKILL)
            while True:  # killed by the parent, at any moment
                live(number)
                SharedMemoryObject.remove(f"{prefix}-{number}")
        finally:
            os._exit(1)
    if number % 2 == 0:
        for _ in range(rng.randrange(3000)):
            pass
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (number, status)
    left = [name for name in (f"{prefix}-{number}", f"{prefix}-{number}-gone") if os.path.exists("/dev/shm/" + name)]
    if number % 2:
        assert left == [f"{prefix}-{number}"], left
        with SharedMemoryObject("open_only", left[0], "read_only") as shm, MappedRegion(shm, "read_only") as region:
            assert bytes(region.buf[:6]) == number.to_bytes(6, "little")
        whole += 1
    for name in left:  # a creator that was killed leaves what has a name
        assert SharedMemoryObject.remove(name)
        assert not SharedMemoryObject.remove(name)
assert os.listdir("/proc/self/fd") == fds
assert not [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]
grown = shared_kib() - before
assert grown < cycles * 1024 // 2, f"{grown} KiB of shared memory were left"
print(whole)
"""


@pytest.mark.needs("fork")
@pytest.mark.slow
def test_a_thousand_killed_processes_leave_only_named_objects(run_script):
    assert run_script(CYCLES, unused_name(), 1000) == "500\n"


# -- races ----------------------------------------------------------------------------


def test_eight_processes_that_open_or_create_get_one_object(name):
    ready, go = os.pipe(), os.pipe()
    answers = os.pipe()
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                os.write(ready[1], b"!")
                os.close(go[1])
                os.read(go[0], 1)
                for number in range(20):
                    with SharedMemoryObject("open_or_create", f"{name}-{number}") as shm:
                        status = os.fstat(shm.fileno())
                        os.write(answers[1], b"%d %d\n" % (number, status.st_ino))
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    got = 0
    while got < 8:
        got += len(os.read(ready[0], 8))
    os.close(go[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for fd in (*ready, go[0], answers[1]):
        os.close(fd)
    with open(answers[0]) as lines:
        seen = [tuple(map(int, line.split())) for line in lines]
    assert codes == [0] * 8
    assert len(seen) == 160
    for number in range(20):
        assert len({inode for which, inode in seen if which == number}) == 1
        assert SharedMemoryObject.remove(f"{name}-{number}")


def test_one_of_many_that_create_only_wins(name):
    won, lost = [], []
    barrier = threading.Barrier(8)

    def race():
        barrier.wait()
        try:
            won.append(create(name))
        except RegionExistsError:
            lost.append(1)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    won.pop().close()


def test_open_or_create_succeeds_while_another_process_removes_the_object(name):
    pid = os.fork()
    if pid == 0:
        while True:
            SharedMemoryObject.remove(name)
    try:
        for _ in range(500):
            with SharedMemoryObject("open_or_create", name) as shm:
                shm.truncate(10)
                with MappedRegion(shm) as region:
                    region.buf[9] = 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- remove_on_exit -------------------------------------------------------------------


def test_the_end_of_the_block_removes_also_when_something_goes_wrong(name):
    with remove_on_exit(name) as helper:
        assert helper.name == name
        create(name).close()
    assert not os.path.exists(path_of_named(name))
    with pytest.raises(LookupError), remove_on_exit(name):
        create(name).close()
        raise LookupError
    assert not os.path.exists(path_of_named(name))
    with remove_on_exit(name):
        pass  # there was no object


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit", "del keep"])
def test_the_end_of_the_program_removes(name, run_script, end):
    script = (
        "import sys, forkshm\n"
        "keep = forkshm.remove_on_exit(sys.argv[1])\n"
        "shm = forkshm.SharedMemoryObject('create_only', sys.argv[1])\n"
        f"{end}\n"
    )
    done = run_script(script, name, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(path_of_named(name))


def test_a_forked_child_does_not_remove(name, in_child):
    with remove_on_exit(name) as helper:
        create(name).close()
        assert in_child(lambda: helper.__exit__(None, None, None)) == 0
        assert os.path.exists(path_of_named(name))
    assert not os.path.exists(path_of_named(name))


@pytest.mark.needs("fork")
def test_a_child_of_a_pool_does_not_remove(name, run_script):
    script = """
import os, sys, forkshm
keep = forkshm.remove_on_exit(sys.argv[1])
shm = forkshm.SharedMemoryObject("create_only", sys.argv[1])
with forkshm.Pool(1) as pool:
    pool.apply(int)
if os.fork() == 0:
    sys.exit()  # with all that is done at exit
os.wait()
print(os.path.exists("/dev/shm/" + sys.argv[1]))
"""
    assert run_script(script, name) == "True\n"
    assert not os.path.exists(path_of_named(name))


# -- the standard library --------------------------------------------------------------


# Before Python 3.13, its tracker unlinks at exit the objects that a program only attached to (bpo-38119).
STDLIB = """
import sys
from multiprocessing import resource_tracker, shared_memory
options = {"track": False} if sys.version_info >= (3, 13) else {}
def attach(name, **more):
    memory = shared_memory.SharedMemory(name, **more, **options)
    if not options:
        resource_tracker.unregister(memory._name, "shared_memory")
    return memory
"""


@pytest.mark.needs("shm_open")
def test_the_standard_library_opens_ours(name, run_script):
    with create(name, size=PAGE + 1) as shm, MappedRegion(shm) as region:
        region.buf[:5] = b"hello"
        script = f"""{STDLIB}
memory = attach(sys.argv[1])
print(bytes(memory.buf[:5]).decode(), memory.size)
memory.buf[{PAGE}] = 7
memory.close()
"""
        assert run_script(script, name).split() == ["hello", str(PAGE + 1)]
        assert region.buf[PAGE] == 7
        assert SharedMemoryObject.remove(name)


@pytest.mark.needs("shm_open")
def test_we_open_that_of_the_standard_library(name, run_script):
    script = f"""{STDLIB}
memory = attach(sys.argv[1], create=True, size=100)
memory.buf[:5] = b"hello"
memory.close()
"""
    run_script(script, name)
    with SharedMemoryObject("open_only", name) as shm, MappedRegion(shm) as region:
        assert (shm.size, bytes(region.buf[:6])) == (100, b"hello\0")
        region.buf[0] = ord("J")
        more = f"{STDLIB}\nmemory = attach(sys.argv[1])\nprint(bytes(memory.buf[:5]).decode())\nmemory.close()\n"
        assert run_script(more, name) == "Jello\n"
    with pytest.raises(RegionExistsError):
        create(name)
    assert SharedMemoryObject.remove(name)


@pytest.mark.needs("shm_open")
def test_both_in_one_program_see_each_other_and_either_can_remove(name, run_script):
    script = """
import sys
from multiprocessing import shared_memory
from forkshm import MappedRegion, SharedMemoryObject
name = sys.argv[1]
theirs = shared_memory.SharedMemory(name, create=True, size=10)
with SharedMemoryObject("open_only", name) as ours, MappedRegion(ours) as region:
    region.buf[3] = 3
    assert theirs.buf[3] == 3
    theirs.buf[4] = 4
    assert region.buf[4] == 4
theirs.close()
theirs.unlink()
print(SharedMemoryObject.remove(name))
"""
    done = run_script(script, name, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


# -- Python's own functions --------------------------------------------------------------


def test_the_fd_is_not_inherited_by_other_programs(name):
    with create(name) as shm:
        look = f"from forkshm.backend import kernel; print(kernel.identify({shm.fileno()}))"
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, close_fds=False)
        # A Windows handle may have the number of a C library fd.
        assert done.stderr if os.name == "posix" else str(kernel.identify(shm.fileno())) not in done.stdout
