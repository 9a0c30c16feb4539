"""An fd is closed although a signal handler raises while Python looks what the fd refers to."""

from __future__ import annotations

import _thread
import itertools
import operator
import os
import signal
import sys

import pytest

import forkshm
from forkshm import SharedMemoryObject
from forkshm.backend import kernel
from forkshm.region import OwnedFd

pytestmark = pytest.mark.needs("fd_numbers")


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Interrupt(BaseException):
    """An exception like KeyboardInterrupt, which pytest does not treat specially."""


@pytest.fixture
def trip(monkeypatch):
    """Make a signal arrive in each of the next steps of iterators that close fds; its handler raises."""
    numbers = iter(())

    def trip(error, times):
        nonlocal numbers

        def handle(*_):
            raise error

        signal.signal(signal.SIGUSR1, handle)
        numbers = iter([signal.SIGUSR1] * times)

    closing = kernel.closing

    def closing_tripped(fd, file):
        # Only C functions, so that the handler runs at the next check of Python: in os.fstat. SIGURG has no handler.
        notes = map(_thread.interrupt_main, itertools.chain(numbers, itertools.repeat(signal.SIGURG)))
        return map(operator.itemgetter(1), zip(notes, closing(fd, file), strict=False))

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(kernel, "closing", closing_tripped)
    yield trip
    signal.signal(signal.SIGUSR1, before)


ERRORS = [Interrupt(), TimeoutError("the alarm")]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_fd_is_closed_although_a_handler_raises(trip, error, times, tmp_path):
    path = tmp_path / "file"
    path.touch()
    owner = OwnedFd(os.open(path, os.O_RDONLY))
    fd = owner.fd
    trip(error, times)
    owner.own()
    with pytest.raises(type(error)):
        owner.close()
    assert not is_open(fd)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_fd_of_named_memory_is_closed_although_a_handler_raises(trip, error, times):
    name = f"forkshm-test-closing-{os.getpid()}"
    trip(error, times)
    opened = SharedMemoryObject("create_only", name)
    SharedMemoryObject.remove(name)
    fd = opened.fileno()
    with pytest.raises(type(error)):
        opened.close()
    assert not is_open(fd)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_fd_of_a_region_is_closed_although_a_handler_raises(trip, error, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    trip(error, 1)
    region = forkshm.anonymous_shared_memory(100)
    fd = region.fileno()
    file = kernel.file_of(fd)
    region.close()
    forkshm.anonymous_shared_memory(100).close()  # completes what was interrupted
    assert not kernel.refers_to(fd, file)


def test_an_fd_that_belongs_to_another_file_stays_open(tmp_path):
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    closing = kernel.closing(fd, kernel.file_of(fd))
    other = os.open(tmp_path, os.O_RDONLY)
    os.dup2(other, fd)
    kernel.close_own(closing)
    assert is_open(fd)
    for one in (other, fd):
        os.close(one)
