"""Functions of several steps that no signal handler interrupts."""

from __future__ import annotations

import _thread
import operator
import os
import signal
import sys
import threading
import time

import pytest

if sys.platform == "win32":
    pytest.skip("needs the posix backend", allow_module_level=True)

from forkshm import _interrupts
from forkshm.backend.posix import _whole
from forkshm.backend.posix._whole import _deferral, surely, whole

LONG = 20
TIMES = 300


class Stop(Exception):
    """The exception of the handler, which cannot be created without its arguments."""

    def __init__(self, number, what):
        super().__init__(number, what)


@pytest.fixture
def armed():
    """Raise `Stop` from the handler of SIGALRM while this list is not empty."""
    armed = []

    def handle(*_):
        if armed:
            armed.clear()
            raise Stop(7, "stop")

    before = signal.signal(signal.SIGALRM, handle)
    yield armed
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [whole, surely])
def test_a_call_takes_effect_and_is_recorded_or_does_neither(kind, armed):
    begun, ended, noted = [], [], []

    @kind
    def steps(number):
        begun.append(number)
        for _ in range(10):
            len(begun)
        ended.append(number)
        return number

    handler = signal.getsignal(signal.SIGALRM)
    stopped = called = 0
    arguments = set()
    deadline = time.monotonic() + LONG
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.00037)
    while stopped < TIMES and time.monotonic() < deadline:
        called += 1
        try:
            armed.append(True)
            noted.extend(map(steps, (called,)))
            armed.clear()
        except Stop as error:
            arguments.add(error.args)
            stopped += 1
        armed.clear()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert stopped == TIMES
    assert arguments == {(7, "stop")}
    assert begun == ended == noted
    assert signal.getsignal(signal.SIGALRM) is handler
    assert not _deferral.is_on


def test_handlers_that_do_not_raise_run_after_the_function():
    order = []

    @whole
    def inner():
        os.kill(os.getpid(), signal.SIGUSR1)
        len(order)
        order.append("inner")

    @whole
    def outer():
        inner()
        order.append("outer")

    before = signal.signal(signal.SIGUSR1, lambda *_: order.append("handler"))
    try:
        outer()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert order == ["inner", "outer", "handler"]


def test_an_exception_of_the_function_is_raised():
    @whole
    def refuse():
        raise OSError(24, "refused")

    with pytest.raises(OSError, match="refused"):
        refuse()
    assert not _deferral.is_on


def test_other_threads_do_not_defer_signals():
    @whole
    def steps():
        return _deferral.is_on

    got = []
    thread = threading.Thread(target=lambda: got.append(steps()))
    thread.start()
    thread.join()
    assert got == [False]
    assert steps() is True


def test_a_forked_child_defers_signals_of_its_own():
    @whole
    def steps():
        return _deferral.is_on

    codes = []

    def fork():
        pid = os.fork()
        if not pid:
            os._exit(0 if steps() else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    fork()
    assert codes == [0, 0]


@pytest.fixture
def _interrupts_raise():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_raise")
@pytest.mark.parametrize("times", range(50))
def test_a_prompt_function_begins_although_a_signal_waits(times):
    def plain():
        nonlocal began
        began = True

    prompt = _interrupts.promptly(lambda: began_of.__setitem__(0, True))
    began_of = [False]
    done = []
    sure = surely(lambda: done.append(1))
    with pytest.raises(KeyboardInterrupt):
        list(map(operator.call, (_thread.interrupt_main, sure)))
    assert done == [1]
    for function in (plain, prompt):
        began = False
        with pytest.raises(KeyboardInterrupt):
            # The signal arrives and the function is called, without a check for signals in between.
            list(map(operator.call, (_thread.interrupt_main, function)))
        assert not began
    assert began_of == [True]


def test_here_has_the_identifiers_of_this_thread():
    assert _interrupts.here.ident == threading.get_ident()
    assert _interrupts.here.native_id == threading.get_native_id()


@pytest.mark.parametrize("kind", [whole, surely])
def test_a_late_exception_is_raised_once_when_finalizers_run_on_its_way(kind):
    caught, calls = [], []

    class Owner:
        @kind
        def close(self):
            calls.append(self)

        def __del__(self):
            self.close()

    def interrupted():
        _whole._late[_whole._Later] = Stop(7, "stop")
        operator.attrgetter("raising")(_deferral)
        len(calls)

    try:
        # The owner is finalized before the exception is caught.
        (Owner(), interrupted())
    except BaseException as error:
        caught.append(error)
    try:
        for _ in range(100):
            len(calls)
    except BaseException as error:
        caught.append(error)
    assert [type(error) for error in caught] == [Stop]
    assert len(calls) == 1
