"""What owns an fd, a mapping or a name, interrupted at points of being made, sent, received or closed.

Nothing is left behind once the objects are gone. Points inside the standard library's modules that make or close the
fds count as well.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import mmap
import os
import re
import selectors
import signal
import socket
import sys
import tempfile
import threading
import weakref

import numpy as np
import pytest
from capability_skips import has

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from points import Interrupt, Points

import forkshm
from forkshm import FileMapping, SharedMemoryObject, _multiprocess
from forkshm.backend import IS_FREE_THREADED, kernel
from forkshm.channel import PrivateFd, manager, pair
from forkshm.descriptor import describe
from forkshm.pool._worker import Assignment
from forkshm.region import OwnedFd, regions_mapped
from forkshm.region.blocks import arena, forget_abandoned
from forkshm.shared_memory import ShareableList, SharedMemory

# Set in a process that runs these tests alone.
ALONE = "FORKSHM_TEST_OWNERS"

pytestmark = [
    pytest.mark.skipif(
        IS_FREE_THREADED and ALONE not in os.environ, reason="test_points.py runs it in a process of its own"
    ),
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FILE = open(__file__, "rb")
atexit.register(FILE.close)
MAPPED = np.memmap(__file__, mode="r")
REGION = forkshm.anonymous_shared_memory(100)
# Modules whose functions count as well.
ALSO = (contextlib, selectors, socket, tempfile, threading, weakref)
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


def end_and_close(ends):
    ends[0].end()
    close_both(ends)


def drop(made):
    """Only forget it."""


def at_an_address():
    """Return a region at an address that was free a moment ago."""
    with forkshm.anonymous_shared_memory(100) as region:
        address = region.address
    return forkshm.MappedRegion(REGION, address=address)


def near_the_fd_limit():
    """Return a region that shares a memory object with others."""
    kernel.is_scarce = lambda fd: True
    try:
        return forkshm.anonymous_shared_memory(100)
    finally:
        del kernel.is_scarce


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
    "channel that is ended": (pair, end_and_close),
    "SimpleQueue": (forkshm.SimpleQueue, close),
    "Queue": (forkshm.Queue, close),
    "JoinableQueue": (forkshm.JoinableQueue, close),
    "Barrier": (lambda: forkshm.Barrier(2), drop),
    "OwnedFd": (lambda: OwnedFd(kernel.duplicate(0)), close),
    "PrivateFd": (lambda: PrivateFd(kernel.duplicate(0)), close),
    "Listener": (manager.Listener, close),
    "MappedRegion of another": (lambda: forkshm.MappedRegion(REGION), close),
    "MappedRegion near the fd limit": (near_the_fd_limit, close),
    "MappedRegion at an address": (at_an_address, close),
}
if has("foreign_channels"):
    MADE["region of a descriptor"] = describe(REGION).attach, drop

# Files of the system that the thread that returns memory opens for a moment.
_READ_FOR_A_MOMENT = re.compile(r"/sys/|/proc/(meminfo|pressure|\d+/(cgroup|mountinfo))")


class Left:
    """What is there more than at first."""

    def __init__(self):
        self.fds = self._fds()

    def _fds(self):
        gc.collect()
        regions_mapped()  # an interrupted finalizer continues with the next call into that layer
        forget_abandoned()
        arena.trim(sys.maxsize)  # the POSIX backend closes the pipe of a block when it looks at the block
        with open("/proc/self/maps") as maps:
            found = [line.split(None, 5)[5] for line in maps if "forkshm-region" in line or NAME in line]
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the fd of the listing itself
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        return sorted(file for file in found if not _READ_FOR_A_MOMENT.match(file))

    def check(self, where):
        left = self._fds()
        for file in self.fds:
            if file in left:  # memory of an array may have been given back since
                left.remove(file)
        assert left == [], f"an fd or a mapping is left after an interrupt at {where}"
        assert not SharedMemoryObject.remove(NAME), f"the name is left after an interrupt at {where}"


@pytest.fixture(params=[pytest.param(7, id="sampled"), pytest.param(1, id="whole", marks=pytest.mark.nightly)])
def step(request):
    """Provide the distance between the points that are tried."""
    return request.param


def at_every_point(step, action, dispose, prepare=contextlib.nullcontext):
    """Interrupt *action* at its points, one run each, with a new argument from *prepare*."""
    left, at, raised = None, 0, 0
    while True:
        # A real signal, which the POSIX backend defers inside functions of several steps.
        points = Points(max(at, 0), lambda: signal.raise_signal(signal.SIGUSR1), also=ALSO)
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
        at += step if at else 1
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
def test_an_interrupt_while_it_is_made_leaves_nothing(step, name):
    at_every_point(step, *MADE[name])


def _open(make):
    @contextlib.contextmanager
    def prepare():
        yield make()
        SharedMemoryObject.remove(NAME)

    return prepare


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("name", [name for name, (_, dispose) in MADE.items() if dispose is not drop])
def test_an_interrupt_while_it_is_closed_leaves_nothing(step, name):
    make, dispose = MADE[name]
    at_every_point(step, dispose, drop, _open(make))


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


def lifeline():
    """Return what the process of a manager is given."""
    made = manager._Lifeline()
    made.fd = kernel.duplicate(0)
    return made


def assignment():
    """Return what a worker is given."""
    tasks, results = forkshm.channel.pair()[::-1]
    values = dict.fromkeys(field.name for field in dataclasses.fields(Assignment))
    ends = {"tasks": tasks, "results": results, "lifeline": lifeline(), "wakeup": lifeline()}
    return Assignment(**{**values, **ends})


# Owners of system resources that are never sent, and further mappings of `REGION`, which arrive as `REGION`.
_NOT_SENT = {
    "Pipe",
    "channel that is ended",
    "OwnedFd",
    "PrivateFd",
    "Listener",
    *(name for name in MADE if name.startswith(("MappedRegion ", "region "))),
}

RECEIVED = {
    **{name: thing for name, thing in MADE.items() if name not in _NOT_SENT and "generated" not in name},
    "Connection": (lambda: forkshm.Pipe()[0], close),
    "socket": (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), close),
    "Lock": (forkshm.Lock, drop),
    "np.memmap": (lambda: np.memmap(__file__, mode="r"), drop),
    "SharedArray": (lambda: forkshm.zeros(3), drop),
    "more fds than fit beside a message": (lambda: [forkshm.zeros(3) for _ in range(kernel.DIRECT_FDS + 3)], drop),
    "Assignment": (assignment, drop),
    "lifeline": (lifeline, drop),
}
if has("mapped_files"):
    RECEIVED["mmap.mmap"] = lambda: mmap.mmap(FILE.fileno(), 0, access=mmap.ACCESS_READ), close


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("name", RECEIVED)
def test_an_interrupt_while_it_is_received_leaves_nothing(step, name):
    make, dispose = RECEIVED[name]
    # The name is removed before the object arrives.
    forget = {unlink: close, remove: close}.get(dispose, dispose)
    at_every_point(step, forkshm.connection.Connection.recv, forget, _sent(make, dispose))


SENT = {
    "memmap": MAPPED,
    "part of a memmap": MAPPED[100:200],
    "MappedRegion": REGION,
    "SharedArray": forkshm.zeros(3),
    "array": np.ones(50_000),
}


@contextlib.contextmanager
def _pipe():
    here, there = forkshm.Pipe()
    with here, there:
        yield here


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("thing", SENT.values(), ids=SENT)
def test_an_interrupt_while_it_is_sent_leaves_nothing(step, thing):
    at_every_point(step, lambda here: here.send(thing), drop, _pipe)


# -- two processes, here two threads --------------------------------------------------


@contextlib.contextmanager
def _caller():
    """Yield a listener that another thread calls."""
    callers = []

    def call():
        with contextlib.suppress(OSError):  # it was refused, or accepted and closed again
            callers.append(manager.Client(listener.address))

    listener = manager.Listener()
    thread = threading.Thread(target=call)
    thread.start()
    yield listener
    listener.close()
    thread.join()
    for caller in callers:
        caller.close()


@pytest.mark.usefixtures("_interrupts")
def test_an_interrupt_while_a_caller_is_accepted_leaves_nothing(step):
    at_every_point(step, manager.Listener.accept, close, _caller)


def test_a_pipe_is_closed_although_finalizers_of_python_are_interrupted(monkeypatch):
    def interrupted(*_):
        raise Interrupt

    ends = forkshm.Pipe()
    fds = [end.fileno() for end in ends]
    monkeypatch.setattr(sys, "unraisablehook", bool)
    monkeypatch.setattr(forkshm.connection.Connection, "__del__", interrupted)
    monkeypatch.setattr(weakref.finalize, "__call__", interrupted)
    del ends
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
def test_an_interrupted_semaphore_has_all_its_permits(kind):
    semaphore = getattr(forkshm, kind)(2)
    with semaphore:
        pass
    at, is_reached = 0, True
    while is_reached:
        at += 1
        points = Points(at, lambda: signal.raise_signal(signal.SIGUSR1))
        try:
            with points, semaphore:
                pass
        except Interrupt:
            pass
        assert semaphore.get_value() == 2, points.where
        is_reached = points.where is not None
    assert at > 20


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("name", ["address_of", "copy"])
def test_an_interrupt_while_a_buffer_is_used_releases_it(name):
    target = bytearray(10)
    there = kernel.address_of(target)
    use = {"address_of": kernel.address_of, "copy": lambda source: kernel.copy(there, source, 5)}[name]
    at, where = 0, ""
    while where is not None:
        at += 1
        memory = bytearray(10)
        points = Points(at, lambda: signal.raise_signal(signal.SIGUSR1))
        with contextlib.suppress(Interrupt), points:
            use(memoryview(memory).toreadonly())
        memory.append(0)  # BufferError if a buffer of it is in use
        where = points.where
    assert at > 2
