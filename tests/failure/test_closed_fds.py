"""A program that closes all its fds, and opens files of its own, keeps these files."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.needs("fd_numbers"),
    pytest.mark.slow,
]

PROGRAM = """
import os, sys, tempfile
import numpy as np
import forkshm

def add_one(array):
    return array + 1

if __name__ == "__main__":
    context = forkshm.get_context(sys.argv[1])
    with context.Pool(1) as pool:
        pool.map(add_one, [np.ones(200_000)])
    os.closerange(3, 1024)
    with tempfile.TemporaryDirectory() as folder:
        files = [open(f"{folder}/{number}", "w+b", buffering=0) for number in range(30)]
        for file in files:
            file.write(b"mine")
        for _ in range(3):
            with context.Pool(1) as pool:
                assert (pool.apply(add_one, (np.ones(200_000),)) == 2).all()
        for file in files:
            assert os.fstat(file.fileno()).st_ino == os.stat(file.name).st_ino, "a file was closed"
            file.seek(0)
            assert file.read() == b"mine", "a file was written to"
            file.close()
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_files_with_the_numbers_of_closed_fds_are_left_alone(run_script, method):
    assert run_script(PROGRAM, method) == "done\n"


RESTARTED = """
import forkshm
from multiprocess import forkserver

def start():
    with forkshm.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
    return forkserver._forkserver._forkserver_pid

if __name__ == "__main__":
    first = start()
    forkserver._forkserver._stop()
    second, third = start(), start()
    assert first != second == third, (first, second, third)
    print("done")
"""


@pytest.mark.needs("fork")
def test_a_fork_server_that_was_started_anew_stays(run_script):
    assert run_script(RESTARTED) == "done\n"


CHANNEL = """
import os, tempfile
import forkshm

here, there = forkshm.Pipe()
fds = here.fileno(), there.fileno()
for fd in fds:
    os.close(fd)
files = [tempfile.TemporaryFile() for _ in fds] if REUSED else []
for call in (lambda: here.send(1), there.recv):
    try:
        call()
    except forkshm.ChannelClosedError as error:
        print("other code in this process has closed" in str(error), flush=True)
os._exit(0)  # closes no file by its number
"""


@pytest.mark.parametrize("reused", [False, True], ids=["closed", "reused"])
def test_a_channel_says_that_other_code_has_closed_its_fd(run_script, reused):
    said = run_script(CHANNEL.replace("REUSED", str(reused)))
    assert said == "True\nTrue\n"
