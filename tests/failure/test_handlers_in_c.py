"""Signal handlers that other libraries have installed in C, and the flags of handlers, survive calls of forkshm."""

from __future__ import annotations

import ctypes  # noqa: TID251 - a handler of a library
import faulthandler
import os
import signal

import pytest
from capability_skips import has

import forkshm

pytestmark = pytest.mark.needs("actions_in_c")

_sigaction = ctypes.CDLL(None).sigaction if has("actions_in_c") else None


class _Action(ctypes.Structure):
    """``struct sigaction`` of glibc and musl. Only the first word of the mask is used."""

    _fields_ = (("function", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int))


def action_at(number):
    """Return the function of C and the flags."""
    room = ctypes.create_string_buffer(256)
    assert _sigaction(number, None, room) == 0
    action = _Action.from_buffer(room)
    return action.function, action.flags


@pytest.fixture
def usr1():
    """Install a handler of Python for SIGUSR1; yield a list of its calls."""
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(os.getpid()))
    yield calls
    signal.signal(signal.SIGUSR1, before)


def pool():
    with forkshm.Pool(1) as workers:
        assert workers.apply(abs, (-1,)) == 1


def process():
    child = forkshm.Process(target=abs, args=(-1,))
    child.start()
    child.join()
    assert child.exitcode == 0
    child.close()


def pipe():
    receiver, sender = forkshm.Pipe(duplex=False)
    with receiver, sender:
        sender.send("item")
        assert receiver.recv() == "item"


def supervised(me):
    os.kill(os.getppid(), signal.SIGTERM)
    me.wait()


def supervisor():
    forkshm.supervise(supervised, workers=1)


def launch():
    forkshm.launch(abs, workers=1, start_method="fork")


def team():
    with forkshm.team(2) as members:
        members.barrier()


USES = [pool, process, pipe, supervisor, launch, team]


@pytest.mark.parametrize("use", USES)
def test_the_flag_of_siginterrupt_is_kept(use, usr1):
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.siginterrupt(number, False)
    before = action_at(signal.SIGUSR1), action_at(signal.SIGINT)
    try:
        use()
        assert (action_at(signal.SIGUSR1), action_at(signal.SIGINT)) == before
    finally:
        signal.siginterrupt(signal.SIGINT, True)


@pytest.mark.parametrize("use", USES)
def test_faulthandler_stays_registered(use, usr1, tmp_path):
    with open(tmp_path / "traces", "w+") as traces:
        faulthandler.register(signal.SIGUSR1, traces, all_threads=False, chain=True)
        try:
            use()
            signal.raise_signal(signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)
        traces.seek(0)
        assert traces.read().count("most recent call first") == 1
    assert usr1 == [os.getpid()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("use", USES)
def test_a_handler_of_a_library_stays_installed(use, number):
    calls = []
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(calls.append)
    before = ctypes.create_string_buffer(256)
    assert _sigaction(number, None, before) == 0
    ctypes.CDLL(None).signal(ctypes.c_int(number), handler)
    try:
        during = action_at(number)
        use()
        assert action_at(number) == during
        signal.raise_signal(number)
    finally:
        _sigaction(number, before, None)
    assert calls == [number]


def test_a_forked_child_has_the_handler_of_a_library(usr1):
    flags = []

    def look(sender):
        sender.send(action_at(signal.SIGUSR1))

    signal.siginterrupt(signal.SIGUSR1, False)
    flags.append(action_at(signal.SIGUSR1))
    receiver, sender = forkshm.Pipe(duplex=False)
    with receiver, sender:
        child = forkshm.get_context("fork").Process(target=look, args=(sender,))
        child.start()
        flags.append(receiver.recv())
        child.join()
        child.close()
    assert flags[0] == flags[1]
