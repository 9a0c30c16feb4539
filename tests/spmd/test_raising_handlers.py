"""Signal handlers that raise while teams, launches and supervisors start or end leave no process behind."""

from __future__ import annotations

import os
import signal
import sys

import pytest

import forkshm
from forkshm import WorkerDiedError
from forkshm.processes._popen_fork import Child
from forkshm.spmd import _monitor, _supervise

if sys.platform == "win32":
    pytest.skip("there is no fork", allow_module_level=True)


class Stop(Exception):
    """Raised by the handlers of these tests."""


# Few programs handle it.
NUMBER = getattr(signal, "SIGVTALRM", 0)

# The signals that the hooks below raise at a fork: once in the parent, and in each child.
_in_parent: list[int] = []
_in_child: list[int] = []


def _signal_parent():
    if _in_parent:
        signal.raise_signal(_in_parent.pop())


def _signal_child():
    for number in _in_child:
        os.kill(os.getpid(), number)


os.register_at_fork(after_in_parent=_signal_parent, after_in_child=_signal_child)


@pytest.fixture(params=[Stop, TimeoutError])
def stop(request):
    """Yield an exception that the handler of NUMBER raises."""

    def handle(*_):
        raise request.param("stop")

    before = signal.signal(NUMBER, handle)
    yield request.param
    signal.signal(NUMBER, before)


def team():
    with forkshm.team(3):
        pass


def launch():
    forkshm.launch(abs, workers=2, start_method="fork")


def supervisor():
    forkshm.supervise(lambda me: me.wait(), workers=2)


def process():
    forkshm.get_context("fork").Process(target=abs, args=(-1,)).start()


def no_child_is_left():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


@pytest.mark.parametrize("start", [team, launch, supervisor, process])
def test_a_handler_that_raises_at_a_fork_ends_the_start(start, stop):
    _in_parent.append(NUMBER)
    with pytest.raises(stop, match="stop"):
        start()
    assert no_child_is_left()


@pytest.mark.parametrize("start", [team, launch, supervisor, process])
def test_a_handler_that_raises_again_while_the_start_is_undone(start, stop, monkeypatch):
    def again(function):
        def signal_and_call(*arguments):
            signal.raise_signal(NUMBER)
            return function(*arguments)

        return signal_and_call

    for module in (_monitor, _supervise):
        monkeypatch.setattr(module, "wait_gone", again(module.wait_gone))
    monkeypatch.setattr(Child, "_end", again(Child._end))
    _in_parent.append(NUMBER)
    with pytest.raises(stop, match="stop"):
        start()
    assert no_child_is_left()


def test_a_supervisor_ends_its_workers_whatever_a_handler_raises(stop, monkeypatch):
    waits = []

    def wait_gone(sentinel, wait=_supervise.wait_gone):
        waits.append(sentinel)
        signal.raise_signal(NUMBER)
        wait(sentinel)

    def work(me):
        os.kill(os.getppid(), NUMBER)
        me.wait()

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(_supervise, "wait_gone", wait_gone)
    with pytest.raises(stop, match="stop"):
        forkshm.supervise(work, workers=3)
    assert waits
    assert no_child_is_left()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def in_pool():
    with forkshm.Pool(1) as pool:
        _in_child.clear()
        assert pool.apply(abs, (-1,)) == 1


@pytest.mark.parametrize("start", [team, launch, in_pool])
def test_a_worker_that_is_starting_has_no_handler_for_sigterm(start):
    calls, calls_in = os.pipe()
    before = signal.signal(signal.SIGTERM, lambda *_: os.write(calls_in, b"."))
    _in_child.append(signal.SIGTERM)
    try:
        if start is in_pool:
            start()
        else:
            with pytest.raises(WorkerDiedError) as raised:
                start()
            assert raised.value.exitcode == -signal.SIGTERM
    finally:
        _in_child.clear()
        signal.signal(signal.SIGTERM, before)
        os.close(calls_in)
        assert os.read(calls, 100) == b""
        os.close(calls)
