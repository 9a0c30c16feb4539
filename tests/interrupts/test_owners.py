"""What owns an fd or a name, interrupted at every point of being made or received: nothing is left behind."""

from __future__ import annotations

import atexit
import contextlib
import gc
import mmap
import os
import re
import signal
import socket
import sys
import weakref

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from points import Interrupt, Points

import forkshm
from forkshm import FileMapping, SharedMemoryObject, _multiprocess
from forkshm.shared_memory import ShareableList, SharedMemory

pytestmark = [
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FILE = open(__file__, "rb")
atexit.register(FILE.close)
NAME = f"forkshm-test-owners-{os.getpid()}"


def close(made):
    made.close()


def unlink(made):
    made.close()
    made.unlink()


def remove(opened):
    opened.close()
    SharedMemoryObject.remove(NAME)


def close_both(ends):
    for end in ends:
        end.close()


# How a thing is made, and how it is disposed of.
MADE = {
    "SharedMemoryObject": (lambda: SharedMemoryObject("create_only", NAME), remove),
    "SharedMemory, given name": (lambda: SharedMemory(NAME, create=True, size=10), unlink),
    "SharedMemory, generated name": (lambda: SharedMemory(create=True, size=10), unlink),
    "ShareableList, given name": (lambda: ShareableList([1, "a"], name=NAME).shm, unlink),
    "ShareableList, generated name": (lambda: ShareableList([1, "a"]).shm, unlink),
    "FileMapping": (lambda: FileMapping(__file__, "read_only"), close),
    "MappedRegion": (lambda: forkshm.anonymous_shared_memory(100), close),
    "Pipe": (forkshm.Pipe, close_both),
    "SimpleQueue": (forkshm.SimpleQueue, close),
    "Queue": (forkshm.Queue, close),
    "JoinableQueue": (forkshm.JoinableQueue, close),
    "Barrier": (lambda: forkshm.Barrier(2), lambda barrier: None),
}

# Files of the system that the thread that returns memory opens for a moment.
_READ_FOR_A_MOMENT = re.compile(r"/sys/|/proc/(meminfo|pressure|\d+/(cgroup|mountinfo))")


class Left:
    """What is there more than at first."""

    def __init__(self):
        self.fds = self._fds()

    def _fds(self):
        gc.collect()
        found = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the fd of the listing itself
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        return sorted(file for file in found if not _READ_FOR_A_MOMENT.match(file))

    def check(self, where):
        left = self._fds()
        for file in self.fds:
            left.remove(file)
        assert left == [], f"an fd is left after an interrupt at {where}"
        assert not SharedMemoryObject.remove(NAME), f"the name is left after an interrupt at {where}"


def at_every_point(action, dispose, prepare=contextlib.nullcontext):
    """Interrupt *action* at each of its points, one run each, with a new argument from *prepare*."""
    also = (socket, weakref)
    left, at, raised = None, 0, 0
    while True:
        # A real signal, which the POSIX backend defers inside functions of several steps.
        points = Points(max(at, 0), lambda: signal.raise_signal(signal.SIGUSR1), also=also)
        with prepare() as argument:
            arguments = () if argument is None else (argument,)
            try:
                with points:
                    made = action(*arguments)
            except Interrupt:
                raised += 1
            else:
                dispose(made)
                del made
            del argument, arguments
        if at == 0 and left is None:
            left = Left()  # after the first run, which imports and allocates what later runs use
            continue
        left.check(points.where)
        if at > 0 and points.where is None:
            break
        at += 1
    assert raised


@pytest.fixture
def _interrupts(monkeypatch):
    monkeypatch.setattr(_multiprocess.shared_memory, "_make_filename", lambda: "/" + NAME)
    # Python ignores an interrupt that comes inside a finalizer.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGUSR1, _raise)
    yield
    signal.signal(signal.SIGUSR1, before)


def _raise(*_):
    raise Interrupt


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("name", MADE)
def test_an_interrupt_while_it_is_made_leaves_nothing(name):
    at_every_point(*MADE[name])


def _sent(make, dispose):
    @contextlib.contextmanager
    def prepare():
        made = make()
        here, there = forkshm.Pipe()
        with here, there:
            here.send(made)
            dispose(made)
            yield there

    return prepare


RECEIVED = {
    **{name: thing for name, thing in MADE.items() if name != "Pipe" and "generated" not in name},
    "Connection": (lambda: forkshm.Pipe()[0], close),
    "socket": (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), close),
    "Lock": (forkshm.Lock, lambda lock: None),
    "mmap.mmap": (lambda: mmap.mmap(FILE.fileno(), 0, access=mmap.ACCESS_READ), close),
    "np.memmap": (lambda: np.memmap(__file__, mode="r"), lambda array: None),
    "SharedArray": (lambda: forkshm.zeros(3), lambda array: None),
}


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("name", RECEIVED)
def test_an_interrupt_while_it_is_received_leaves_nothing(name):
    make, dispose = RECEIVED[name]
    # The name is removed before the object arrives.
    forget = {unlink: close, remove: close}.get(dispose, dispose)
    at_every_point(forkshm.connection.Connection.recv, forget, _sent(make, dispose))
