"""How tests start processes: forked where possible, otherwise spawned, with their data in a message.

A conftest takes the fixtures ``in_child`` and ``run_script`` from here where fork is missing, if its tests are about
sending objects and not about inheriting them.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from system import open_fds

import forkshm
from forkshm._system import CAN_FORK
from forkshm.region import Semaphore

# For programs that tests start, because on experimental systems the import warns once: an option -W, after -W error.
IGNORE_EXPERIMENTS = "ignore:forkshm on :UserWarning"

# The exit code of a process that was ended by SIGKILL, as `subprocess` reports it.
KILLED = -9 if CAN_FORK else 0x10009


def methods(*names):
    """Return the start methods to test: spawn replaces a missing fork, unless it is already one of them."""
    if CAN_FORK or "spawn" in names:
        return list(names)
    return ["spawn" if name == "fork" else name for name in names]


def count_fds():
    """Return the number of fds, or handles, of this process."""
    return len(open_fds())


@contextlib.contextmanager
def interrupting(handler, seconds=0.05):
    """Call a signal handler in this thread, the main thread of the program, after some seconds."""
    number = signal.SIGALRM if CAN_FORK else signal.SIGINT
    before = signal.signal(number, handler)
    timer = None
    if CAN_FORK:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    else:
        timer = threading.Timer(seconds, _thread.interrupt_main)
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()
        signal.signal(number, before)


@pytest.fixture
def gate():
    """A gate that lets a given number of tasks through; tasks wait there, in any process."""
    return Semaphore(forkshm.anonymous_shared_memory(Semaphore.SIZE), value=0)


@pytest.fixture(autouse=True)
def _what_there_is(request):
    # For processes and programs of tests that get their start method, and their way to end, as parameters.
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("method") in ("fork", "forkserver"):
        pytest.skip("needs fork context: needs the start methods fork and forkserver, which Windows lacks")
    if params.get("how") in ("SIGSEGV", "SIGSTOP"):
        pytest.skip("needs signals: a process of Windows cannot send itself one")
    if params.get("how") == "MemoryError":
        pytest.skip("needs resource: needs limits on the memory of a process (setrlimit(2)): Windows has none")


@pytest.fixture
def in_child():
    """Run a callable in a child, and return the exit code."""

    def run(action):
        def act():
            sys.exit(int(action() or 0))

        process = forkshm.Process(target=act)
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail("the child did not end")
        code = process.exitcode
        process.close()
        return code

    return run


def run_program(program, args, *, check=True, timeout=60, **options):
    """Run a program in a fresh interpreter; return its output or, unchecked, the completed process."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *map(str, program), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        **options,
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    return done


@pytest.fixture
def run_script(tmp_path):
    """Run a program in a fresh interpreter, and return its output.

    The program is run with ``-c`` unless it has a main guard, because processes that it starts run a file again.
    """

    def run(source, *args, **options):
        if '__name__ == "__main__"' not in source:
            return run_program(["-c", source], args, **options)
        path = tmp_path / "script.py"
        path.write_text(source)
        return run_program([path], args, **options)

    return run
