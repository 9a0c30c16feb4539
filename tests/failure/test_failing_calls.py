"""Failing system calls: some of the points by default, all of them nightly. See failing_calls.py."""

import os
import subprocess
import sys

import pytest
import started

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not started.CAN_FORK, reason="about the calls of POSIX systems")]

PROGRAM = os.path.join(os.path.dirname(__file__), "failing_calls.py")
SCENARIOS = [
    "PoolMap",
    "PoolAsync",
    "PoolStart",
    "PoolTerminate",
    "Replace",
    "QueueOfArrays",
    "PipeOfArrays",
    "Regions",
    "Locks",
    "Process",
    "Fork",
    "ManagerOfArrays",
    "ExecutorCalls",
]


def check(scenario, every):
    done = subprocess.run(
        [sys.executable, PROGRAM, scenario, "--every", str(every)], capture_output=True, text=True, check=False
    )
    print(done.stdout[-10_000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert ", 0 bad" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_some_calls_may_fail(scenario):
    check(scenario, 9)


@pytest.mark.nightly
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_call_may_fail(scenario):
    check(scenario, 1)
