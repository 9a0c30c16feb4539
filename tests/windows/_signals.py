"""Signals that tests send, on Windows, also from their children.

SIGKILL and SIGTERM end a process there as well, SIGSTOP stops another one, and SIGCONT lets it go on.
"""

from __future__ import annotations

import os
import signal

NUMBERS = {"SIGKILL": 9, "SIGSTOP": 19, "SIGCONT": 18, "SIGUSR1": 10, "SIGUSR2": 12, "SIGALRM": 14}


def stand_in(refuse=None):
    """Have the names, and an os.kill that takes them; *refuse* is called for a signal that there is not."""

    def kill(pid, number):
        from forkshm.backend import kernel

        stops = number in (signal.SIGSTOP, signal.SIGCONT) and pid != os.getpid()
        if number not in (signal.SIGKILL, signal.SIGTERM) and not stops:
            (refuse or _refuse)("signals")
        process = kernel.open_process(pid)
        try:
            kernel.signal_process(process, pid, number)
        finally:
            kernel.close(process)

    for name, number in NUMBERS.items():
        if not hasattr(signal, name):
            setattr(signal, name, number)
    os.kill = kill


def _refuse(what):
    raise NotImplementedError(what)
