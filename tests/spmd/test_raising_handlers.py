"""Signal handlers that raise while teams, launches and supervisors start or end leave no process behind."""

from __future__ import annotations

import os
import signal

import pytest

import forkshm
from forkshm import WorkerDiedError
from forkshm.processes._popen_fork import Child
from forkshm.spmd import _monitor, _supervise

pytestmark = [pytest.mark.needs("signals"), pytest.mark.needs("proc")]


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


def children():
    """Return the pids of this process's children, also of those that nobody has reaped."""
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/children") as pids:
            found.update(pids.read().split())
    return found


@pytest.fixture
def no_more_children():
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize("start", [team, launch, supervisor, process])
@pytest.mark.usefixtures("no_more_children")
def test_a_handler_that_raises_at_a_fork_ends_the_start(start, stop):
    _in_parent.append(NUMBER)
    with pytest.raises(stop, match="stop"):
        start()


@pytest.mark.parametrize("start", [team, launch, supervisor, process])
@pytest.mark.usefixtures("no_more_children")
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


@pytest.mark.usefixtures("no_more_children")
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


def signal_itself(*_):
    signal.signal(NUMBER, lambda *_: None)
    signal.raise_signal(NUMBER)


def team_that_signals_itself():
    with forkshm.team(2) as members:
        if members.rank:
            signal_itself()


def launch_that_signals_itself():
    forkshm.launch(signal_itself, workers=1, start_method="fork")


def pool_that_signals_itself():
    with forkshm.get_context("fork").Pool(1) as pool:
        pool.apply(signal_itself)


@pytest.mark.parametrize("use", [team_that_signals_itself, launch_that_signals_itself, pool_that_signals_itself])
def test_a_signal_of_a_worker_does_not_reach_the_wakeup_fd_of_its_parent(use):
    wakeups, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup)
    try:
        use()
    finally:
        signal.set_wakeup_fd(before)
        os.close(wakeup)
    received = os.read(wakeups, 100)
    os.close(wakeups)
    assert NUMBER not in received
