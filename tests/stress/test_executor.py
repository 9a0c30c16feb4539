"""Four threads use one executor in every way, workers are killed, and no thread waits forever."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = pathlib.Path(__file__).with_name("executor.py")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.nightly)])
def test_everything_that_is_asked_of_an_executor_comes(seconds):
    command = [sys.executable, str(PROGRAM), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 110)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "rounds" in done.stdout
