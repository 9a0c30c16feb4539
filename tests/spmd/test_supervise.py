"""supervise(): long-lived workers that are replaced when they end."""

from __future__ import annotations

import ctypes  # noqa: TID251 - sends a signal without running its handler
import functools
import operator
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

import forkshm
from forkshm.spmd import Supervised

pytestmark = pytest.mark.slow

HEAD = """
import os, signal, sys, time
import forkshm
from forkshm.testing import check_leaks
from forkshm.spmd import _supervise

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""

RUN = """
try:
    with check_leaks():
        forkshm.supervise({call})
except forkshm.errors.CrashLoopError as error:
    say("crash loop:", error, "|", error.__cause__)
say("over")
"""

# Each worker reports its start, and that it was asked to stop.
SERVE = """
def serve(me):
    say("begin", me.rank, me.generation, os.getpid())
    me.wait()
    say("end", me.rank, me.generation, me.stopping)
"""


class Program:
    """A supervisor in a process of its own, whose lines are read as they arrive."""

    def __init__(self, body, call="serve, 2", head=HEAD):
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + body + RUN.format(call=call)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self, count):
        return [self.process.stdout.readline().rstrip("\n") for _ in range(count)]

    def send(self, number):
        self.process.send_signal(number)

    def rest(self):
        said, self.complained = self.process.communicate(timeout=60)
        return said.splitlines()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def started():
    with Program(SERVE) as program:
        lines = sorted(program.lines(2))
        program.pids = [int(line.split()[3]) for line in lines]
        assert [line.rpartition(" ")[0] for line in lines] == ["begin 0 0", "begin 1 0"]
        yield program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_drains_the_workers(started, number):
    started.send(number)
    assert sorted(started.rest()) == ["end 0 0 True", "end 1 0 True", "over"]
    assert started.process.returncode == 0
    assert started.complained == ""


def test_a_signal_that_arrives_just_before_a_wait_ends_it(monkeypatch):
    """Python runs a handler between bytecodes, so a signal that arrives in a C function waits for its end."""

    class Poll:
        def __init__(self):
            self.real = poll()
            self.register = self.real.register

        def poll(self, timeout):
            # Both calls are made in C. os.kill would run the handler, and kill(2) does not.
            kill = functools.partial(ctypes.CDLL(None).kill, os.getpid(), signal.SIGTERM)
            return list(map(operator.call, (kill, functools.partial(self.real.poll, timeout))))[1]

    poll = select.poll
    monkeypatch.setattr(select, "poll", Poll)
    me = Supervised(0, 1, 0)
    before = signal.signal(signal.SIGTERM, me._stop)
    try:
        began = time.monotonic()
        assert me.wait(60)
        assert time.monotonic() - began < 30
    finally:
        signal.signal(signal.SIGTERM, before)
    assert select.select([me.fileno()], [], [], 0)[0]
    assert signal.set_wakeup_fd(-1) == -1


def test_a_wait_restores_a_wakeup_fd_that_warns_when_it_is_full(monkeypatch):
    waiting = Supervised(0, 1, 0)
    warned = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: warned.append(unraisable.exc_value))
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        while True:
            try:
                os.write(write_end, b"." * 4096)
            except BlockingIOError:
                break
        signal.set_wakeup_fd(write_end)
        assert not waiting.wait(0)
        signal.raise_signal(signal.SIGUSR1)
    finally:
        assert signal.set_wakeup_fd(-1) == write_end
        signal.signal(signal.SIGUSR1, handler)
        os.close(read_end)
        os.close(write_end)
    assert [type(error) for error in warned] == [BlockingIOError]


def test_another_signal_does_not_end_a_wait():
    me = Supervised(0, 1, 0)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert not me.wait(0.2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [signal.SIGALRM]
    assert not select.select([me.fileno()], [], [], 0)[0]


def test_a_killed_worker_is_replaced(started):
    os.kill(started.pids[1], signal.SIGKILL)
    assert started.lines(1)[0].startswith("begin 1 1 ")
    started.send(signal.SIGTERM)
    assert sorted(started.rest()) == ["end 0 0 True", "end 1 1 True", "over"]
    assert f"worker 1 of 2 (pid {started.pids[1]}) was killed by SIGKILL while running serve()" in started.complained


def test_sighup_replaces_them_one_after_the_other(started):
    started.send(signal.SIGHUP)
    lines = [line.split()[:3] for line in started.lines(4)]
    assert lines[0] == ["end", "0", "0"]
    assert lines.index(["end", "1", "0"]) < lines.index(["begin", "1", "1"])
    assert ["begin", "0", "1"] in lines
    started.send(signal.SIGTERM)
    assert sorted(started.rest()) == ["end 0 1 True", "end 1 1 True", "over"]


def test_new_workers_have_the_changes_of_on_reload():
    body = """
setting = "old"
def reload():
    global setting
    setting = "new"
def serve(me):
    say(setting)
    me.wait()
"""
    with Program(body, "serve, 1, on_reload=reload") as program:
        assert program.lines(1) == ["old"]
        program.send(signal.SIGHUP)
        assert program.lines(1) == ["new"]
        program.send(signal.SIGTERM)
        assert program.rest() == ["over"]


def test_a_reload_that_fails_drains_and_is_raised():
    with Program(SERVE, "serve, 1, on_reload=lambda: 1 / 0") as program:
        program.lines(1)
        program.send(signal.SIGHUP)
        assert program.rest() == ["end 0 0 True"]
        assert program.process.returncode == 1
        assert "ZeroDivisionError" in program.complained


def test_a_worker_that_returns_is_replaced_without_counting_as_a_crash():
    body = """
_supervise.BACKOFF_SECONDS = 0.001
_supervise.MOST_BACKOFF_SECONDS = 0.002
def serve(me):
    if me.generation == 20:
        say("enough")
        me.wait()
"""
    with Program(body, "serve, 1, max_crashes=3") as program:
        assert program.lines(1) == ["enough"]
        program.send(signal.SIGTERM)
        assert program.rest() == ["over"]
        assert program.complained == ""


@pytest.mark.parametrize(
    ("end", "how"),
    [("1 / 0", "exited with code 1"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"), ("sys.exit(4)", "code 4")],
)
def test_a_crash_loop_ends_in_an_error_and_drains_the_others(end, how):
    body = f"""
_supervise.BACKOFF_SECONDS = 0.001
ready, into = os.pipe()
def serve(me):
    if me.rank == 1:
        os.read(ready, 1)
        {end}
    os.write(into, b"...")
    me.wait()
    say("end", me.rank, me.generation, me.stopping)
"""
    with Program(body, "serve, 2, max_crashes=3") as program:
        rest = program.rest()
        assert rest[0] == "end 0 0 True"
        assert rest[1].startswith("crash loop: worker 1 failed 3 times in a row, the last time after ")
        assert how in rest[1].partition(" | ")[2]
        assert rest[2:] == ["over"]
        assert program.complained.count("ZeroDivisionError") == (3 if end == "1 / 0" else 0)


def test_pauses_double_and_end_with_a_steady_life():
    body = """
place = _supervise._Place(0)
supervisor = _supervise._Supervisor.__new__(_supervise._Supervisor)
pauses = []
for _ in range(12):
    supervisor._pause(place)
    pauses.append(place.pause)
say(*pauses)
def serve(me):
    me.wait()
forkshm.supervise = lambda *args: None
"""
    with Program(body, "serve, 1") as program:
        pauses = [float(pause) for pause in program.rest()[0].split()]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0]


def test_a_worker_that_does_not_stop_in_time_is_killed():
    body = """
def serve(me):
    say("begin")
    while True:
        signal.pause()
"""
    with Program(body, "serve, 1, drain_timeout=0.2") as program:
        assert program.lines(1) == ["begin"]
        program.send(signal.SIGTERM)
        assert program.rest() == ["over"]
        assert "did not stop in time" in program.complained


def test_a_second_sigterm_kills():
    body = """
def serve(me):
    say("begin")
    me.wait()
    say("told")
    while True:
        signal.pause()
"""
    with Program(body, "serve, 1, drain_timeout=600") as program:
        assert program.lines(1) == ["begin"]
        program.send(signal.SIGTERM)
        assert program.lines(1) == ["told"]
        program.send(signal.SIGTERM)
        assert program.rest() == ["over"]


def test_workers_end_with_the_supervisor(started):
    started.process.kill()
    assert started.process.stdout.read() == ""  # no process has the other end any more


def test_a_worker_waits_for_a_socket_and_the_end():
    body = """
import select, socket
near, far = socket.socketpair()
def serve(me):
    poll = select.poll()
    poll.register(far, select.POLLIN)
    poll.register(me, select.POLLIN)
    while not me.stopping:
        for fd, _ in poll.poll():
            if fd == far.fileno():
                say("got", far.recv(10).decode())
near.send(b"work")
"""
    with Program(body, "serve, 1") as program:
        assert program.lines(1) == ["got work"]
        program.send(signal.SIGTERM)
        assert program.rest() == ["over"]


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_crashes": 0}])
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        forkshm.supervise(print, **options)


def test_only_the_main_thread_supervises():
    raised = []

    def run():
        try:
            forkshm.supervise(print, 1)
        except ValueError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == ["supervise must be called in the main thread: no other thread gets signals"]
