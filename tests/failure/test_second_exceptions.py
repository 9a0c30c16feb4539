"""A signal handler raises again while an interrupted start or close is undone: no process and no fd is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import forkshm
from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.shared_memory import SharedMemory

pytestmark = pytest.mark.needs("fork")


class Interrupt(BaseException):
    """An exception of a signal handler."""


def sleep(rank):
    """Run as a ranked worker."""
    time.sleep(60)


def raises_after(call):
    """Return *call*, changed so that it raises when it is done."""

    def raising(*given, **options):
        call(*given, **options)
        raise Interrupt

    return raising


def raises_once(call, arguments):
    """Return *call*, changed so that its first call raises; *arguments* gets those of each call."""

    def raising(*given):
        arguments.append(given)
        if len(arguments) == 1:
            raise Interrupt
        return call(*given)

    return raising


def test_a_process_whose_start_is_interrupted_twice_is_reaped(monkeypatch):
    killed, opened = [], []
    monkeypatch.setattr(kernel, "open_process", raises_once(kernel.open_process, opened))
    monkeypatch.setattr(os, "kill", raises_once(os.kill, killed))
    with pytest.raises(Interrupt):
        forkshm.get_context("fork").Process(target=time.sleep, args=(60,)).start()
    monkeypatch.undo()
    (pid, _), *_ = killed
    try:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


@pytest.mark.parametrize("step", ["is_regular", "identify", "resize"])
def test_a_name_whose_creation_is_interrupted_twice_is_removed(step, monkeypatch):
    name, unlinked = f"forkshm-test-{os.getpid()}", []
    monkeypatch.setattr(kernel, step, raises_after(getattr(kernel, step)))
    monkeypatch.setattr(kernel, "unlink_named", raises_once(kernel.unlink_named, unlinked))
    with pytest.raises(Interrupt):
        SharedMemory(name, create=True, size=10)
    monkeypatch.undo()
    assert not forkshm.SharedMemoryObject.remove(name)


AT_EXIT = """
import atexit, signal
from forkshm.shared_memory import SharedMemory

def interrupt(*_):
    raise KeyboardInterrupt

if __name__ == "__main__":
    for number in range(50):
        SharedMemory(f"{NAME}-{number}", create=True, size=10)
    signal.signal(signal.SIGALRM, interrupt)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.0002)
"""


def test_interrupts_at_the_end_of_a_program_leave_no_names(tmp_path):
    name = f"forkshm-test-{os.getpid()}"
    program = tmp_path / "program.py"
    program.write_text(f"NAME = {name!r}\n{AT_EXIT}")
    subprocess.run([sys.executable, program], check=False, capture_output=True)
    assert not any(forkshm.SharedMemoryObject.remove(f"{name}-{number}") for number in range(50))


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_an_interrupted_close_is_completed_by_the_next(method, monkeypatch):
    process = forkshm.get_context(method).Process(target=int)
    process.start()
    process.join()
    fd = process.sentinel
    file = kernel.file_of(fd)
    finalizer = _multiprocess.util.Finalize
    call, calls = finalizer.__call__, []

    def interrupted(self, *given):
        if not calls:
            calls.append(self)
            # The handler runs after this step, and before the finalizer calls its function.
            _multiprocess.util._finalizer_registry.pop(self._key)
            raise Interrupt
        return call(self, *given)

    monkeypatch.setattr(finalizer, "__call__", interrupted)
    with pytest.raises(Interrupt):
        process.close()
    process.close()
    assert not kernel.refers_to(fd, file)


def test_processes_of_a_launch_are_reaped_although_a_handler_raises_twice(monkeypatch):
    launched = forkshm.launch(sleep, workers=2, join=False)
    pids = list(launched.pids.values())
    signalled = []
    # Kills both workers. The first call is interrupted, and what it leaves is done by the second.
    monkeypatch.setattr(kernel, "signal_process", raises_once(kernel.signal_process, signalled))
    with pytest.raises(Interrupt):
        launched.terminate()
    monkeypatch.undo()
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_an_executor_whose_first_call_is_interrupted_twice_does_not_wait_for_it(monkeypatch):
    executor = forkshm.Executor(1)
    dispatcher = executor._work.pool()._dispatcher  # whose workers are not started yet
    monkeypatch.setattr(dispatcher, "submit", raises_after(dispatcher.submit))
    monkeypatch.setattr(dispatcher, "cancel", raises_once(dispatcher.cancel, []))
    with pytest.raises(Interrupt):
        executor.submit(abs, -1)
    monkeypatch.undo()
    assert dispatcher.is_idle(), "shutdown would wait forever"
    executor.shutdown()
