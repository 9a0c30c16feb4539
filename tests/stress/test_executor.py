"""Threads use one executor in every way, workers are killed, and no thread waits forever."""

import pathlib
import subprocess
import sys

import pytest

from forkshm.backend import IS_FREE_THREADED

pytestmark = pytest.mark.slow

PROGRAM = pathlib.Path(__file__).with_name("executor.py")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [4, 16])
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.nightly)])
def test_everything_that_is_asked_of_an_executor_comes(seconds, threads):
    # Without the GIL, a child that is forked while other threads run may wait for a lock of the interpreter forever.
    method = "forkserver" if IS_FREE_THREADED else "fork"
    command = [sys.executable, str(PROGRAM), "--seconds", str(seconds), "--threads", str(threads), "--method", method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 110)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "rounds" in done.stdout
