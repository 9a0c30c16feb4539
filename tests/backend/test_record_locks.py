"""The lock file that processes share: removed while in use, taken by another user, or full."""

import errno
import os
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("about record locks", allow_module_level=True)

import forkshm
from forkshm import SyncError
from forkshm.backend import kernel
from forkshm.backend.posix import _record_locks as locks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Provide a folder of its own, and a process that has no lock file open."""
    files = locks._Files()
    monkeypatch.setattr(locks, "_folder", lambda: str(tmp_path))
    monkeypatch.setattr(locks, "_files", files)
    yield tmp_path
    for fd in files._fds.values():
        os.close(fd)


@pytest.fixture
def place():
    region = forkshm.anonymous_shared_memory(kernel.page_size)
    yield kernel.address_of(region.buf)
    region.close()


@pytest.fixture
def another_process(in_child, monkeypatch):
    """Run a function in a process that has no lock file open, as if it was not forked from this one."""

    def run(action):
        def act():
            for fd in locks._files._fds.values():
                os.close(fd)
            locks._files._fds.clear()
            return action()

        return in_child(act)

    return run


def refused(action):
    try:
        action()
    except SyncError:
        return 77
    return 0


def test_a_lock_in_a_removed_file_is_refused_to_new_processes(folder, place, another_process):
    assert locks.mutex_init(place) == 0
    assert locks.mutex_trylock(place) == 0
    for file in folder.iterdir():
        file.unlink()
    # A process with a lock file of its own would acquire the mutex as well.
    assert another_process(lambda: refused(lambda: locks.mutex_trylock(place))) == 77
    assert another_process(lambda: locks.mutex_init(place + 512) or refused(lambda: locks.mutex_trylock(place))) == 77
    assert locks.mutex_unlock(place) == 0


def test_processes_with_a_removed_file_open_keep_using_its_locks(folder, place, in_child):
    assert locks.mutex_init(place) == 0
    assert locks.mutex_trylock(place) == 0
    for file in folder.iterdir():
        file.unlink()
    assert in_child(lambda: locks.mutex_trylock(place)) == errno.EBUSY
    assert locks.mutex_unlock(place) == 0
    assert in_child(lambda: locks.mutex_trylock(place)) == 0


def test_new_locks_are_made_in_a_new_file(folder, place, another_process):
    assert locks.mutex_init(place) == 0
    for file in folder.iterdir():
        file.unlink()
    new = place + 512
    assert locks.mutex_init(new) == 0
    assert locks.mutex_trylock(new) == 0
    assert another_process(lambda: locks.mutex_trylock(new)) == errno.EBUSY
    assert locks.mutex_trylock(place) == locks.mutex_unlock(place) == locks.mutex_unlock(new) == 0
    assert another_process(lambda: locks.mutex_trylock(new)) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create files of other users")
@pytest.mark.parametrize("how", ["file", "link", "folder", "fifo"])
def test_others_may_have_taken_the_name(folder, place, another_process, how):
    name = folder / f"forkshm-{os.geteuid()}.locks"
    if how == "file":
        name.touch()
        os.chown(name, 12345, 12345)
    elif how == "link":
        name.symlink_to("/etc/passwd")
    elif how == "folder":
        name.mkdir()
    else:
        os.mkfifo(name)
    assert locks.mutex_init(place) == 0
    assert locks.mutex_trylock(place) == 0
    assert another_process(lambda: locks.mutex_trylock(place)) == errno.EBUSY
    # The first name is free again, and the next process takes it.
    if how == "folder":
        name.rmdir()
    else:
        name.unlink()
    assert another_process(lambda: locks.mutex_init(place + 512) or locks.mutex_trylock(place)) == errno.EBUSY
    assert locks.mutex_unlock(place) == 0


def test_when_there_is_no_place_for_a_file_the_error_says_so(folder, place):
    for name in locks._NAMES:
        (folder / name.format(user=os.geteuid())).mkdir()
    with pytest.raises(SyncError, match=r"forkshm-.*-15\.locks.*Remove files of that name"):
        locks.mutex_init(place)


def test_a_lock_that_cannot_be_released_at_once_is_released_later(folder, place, in_child, monkeypatch):
    """The kernel may have no room for the record of the remaining locks."""
    assert locks.mutex_init(place) == 0
    assert locks.mutex_trylock(place) == 0
    lockf, refusals = locks.fcntl.lockf, [errno.ENOLCK] * 3

    def refuse(fd, operation, *rest):
        if operation == locks.fcntl.LOCK_UN and refusals:
            raise OSError(refusals.pop(), "no locks")
        return lockf(fd, operation, *rest)

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    assert locks.mutex_unlock(place) == 0
    assert in_child(lambda: locks.mutex_trylock(place)) == 0
