"""Fixtures for the tests of arenas and leases."""

from __future__ import annotations

import contextlib
import gc
import os
import signal

import pytest

from forkshm.region._lifetime import guard, settle
from forkshm.region.blocks._arena import Arena
from forkshm.region.blocks._segment import drop_segment, forget_abandoned


@pytest.fixture
def fresh_arena():
    """Provide an arena for one test; its segments are removed afterwards."""
    forget_abandoned()
    arena = Arena()
    yield arena
    gc.collect()
    settle()
    with guard:
        for carved in arena._carved:
            assert not carved.segment.held, "a view of the arena outlives its test"
            drop_segment(carved.segment)


@pytest.fixture
def child_that_holds():
    """Start a child that runs a callable, keeps its result, and waits to be killed.

    The fixture is a function: pass the callable, and get the pid once it has run.
    """
    pids = []

    def start(action):
        read_end, write_end = os.pipe()
        try:
            pid = os.fork()
        except BaseException:  # fork is unavailable, so the test is skipped
            os.close(read_end)
            os.close(write_end)
            raise
        if pid == 0:
            with contextlib.suppress(BaseException):
                kept = action()
                os.write(write_end, b"!")
                while kept is not start:
                    signal.pause()
            os._exit(1)
        pids.append(pid)
        os.close(write_end)
        said = os.read(read_end, 1)
        os.close(read_end)
        assert said == b"!", "the child failed"
        return pid

    def end(pid, number=signal.SIGKILL):
        pids.remove(pid)
        os.kill(pid, number)
        os.waitpid(pid, 0)

    start.end = end
    yield start
    for pid in list(pids):
        end(pid)
