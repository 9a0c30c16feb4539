"""An exception of a signal handler during `put` is raised as such, and not reported as a pickling error."""

from __future__ import annotations

import os
import signal

import pytest

import forkshm

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")


class SignalsOnce:
    """An object that sends a signal to this process while it is pickled for the first time."""

    def __init__(self):
        self.has_signalled = False

    def __reduce__(self):
        if not self.has_signalled:
            self.has_signalled = True
            os.kill(os.getpid(), signal.SIGUSR1)
        return int, (7,)


class Refuses:
    def __reduce__(self):
        raise ValueError("never")


def test_the_exception_of_a_handler_leaves_put(capsys):
    def handler(*_):
        raise RuntimeError("of the handler")

    before = signal.signal(signal.SIGUSR1, handler)
    queue = forkshm.Queue()
    try:
        with pytest.raises(RuntimeError, match="of the handler"):
            queue.put(SignalsOnce())
        assert queue.qsize() == 0
        queue.put(Refuses())  # printed, as in multiprocessing
        assert "never" in capsys.readouterr().err
        queue.put(8)
        assert queue.get(timeout=10) == 8
    finally:
        signal.signal(signal.SIGUSR1, before)
        queue.close()
        queue.join_thread()
