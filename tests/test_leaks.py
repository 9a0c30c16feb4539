"""FORKSHM_LEAKS=1: objects held at exit are reported with the place where they were created."""

from __future__ import annotations

import os

import pytest

import forkshm
from forkshm.testing import check_leaks

PROGRAM = """
import os, sys
import numpy as np
import forkshm

def make(count):
    return [forkshm.zeros(1000) for _ in range(count)]

kept = make(3)  # line 9 is where
gone = make(5)
del gone
closed = forkshm.anonymous_shared_memory(77)
closed.close()
"""


@pytest.fixture
def leaks_of(run_script, monkeypatch):
    def run(source, on="1"):
        monkeypatch.setenv("FORKSHM_LEAKS", on)
        return run_script(PROGRAM + source, check=False)

    return run


def test_objects_held_at_exit_are_reported_with_their_place(leaks_of):
    done = leaks_of("")
    assert done.returncode == 0
    assert "3 regions, 24,000 bytes" in done.stderr
    assert "script.py:7 in " in done.stderr
    assert "5 regions" not in done.stderr
    assert "77 bytes" not in done.stderr


def test_copies_channels_and_open_objects_count_too(leaks_of):
    name = f"forkshm-test-{os.getpid()}-leaks"
    err = leaks_of(f"""
if __name__ == "__main__":
    pool = forkshm.Pool(1)
    array = pool.apply(np.ones, (100_000,))
    dropped = pool.apply(np.ones, (200_000,))
    del dropped
    pool.close()
    pool.join()
    one, other = forkshm.Pipe()
    other.close()
    memory = forkshm.SharedMemoryObject("create_only", "{name}")
    forkshm.SharedMemoryObject.remove("{name}")
""").stderr
    assert "1 received block" in err
    assert "made at script.py" in err or f"{os.sep}script.py:" in err
    assert "1 open SharedMemoryObject" in err
    assert "channel end" in err
    assert "1,6" not in err.split("received block")[1].splitlines()[0]


def test_a_program_that_gives_everything_back_says_nothing(leaks_of):
    assert (
        leaks_of("""
del kept
if __name__ == "__main__":
    with forkshm.Pool(1) as pool:
        array = pool.apply(np.ones, (100_000,))
    del array
""").stderr
        == ""
    )


@pytest.mark.parametrize("value", ["", "0"])
def test_leak_reports_are_off_by_default(leaks_of, value):
    assert leaks_of("", on=value).stderr == ""


@pytest.mark.needs("fork")
def test_inherited_objects_are_not_reported_by_a_child(leaks_of):
    done = leaks_of("""
import atexit
if (pid := os.fork()) == 0:
    mine = forkshm.anonymous_shared_memory(5)
    sys.exit(0)
os.waitpid(pid, 0)
del kept
""")
    assert done.stderr.count("held at its end") == 1
    assert "1 region, 5 bytes" in done.stderr


def test_only_names_with_the_id_of_this_process_count_as_leaks():
    names = [f"forkshm-test-{os.getpid()}-leaks", f"forkshm-test-1{os.getpid()}1-leaks"]
    try:
        with pytest.raises(AssertionError, match=rf"named \['{names[0]}'\]"), check_leaks(timeout=0):
            for name in names:
                forkshm.SharedMemoryObject("create_only", name).close()
    finally:
        for name in names:
            forkshm.SharedMemoryObject.remove(name)
