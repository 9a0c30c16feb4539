"""Signals that tests and their children send on Windows, and names that test modules need at import.

SIGKILL and SIGTERM end a process there as well, SIGSTOP stops another process, and SIGCONT continues it.
"""

from __future__ import annotations

import mmap
import os
import signal

NUMBERS = {"SIGKILL": 9, "SIGSTOP": 19, "SIGCONT": 18, "SIGUSR1": 10, "SIGUSR2": 12, "SIGALRM": 14}


def stand_in(refuse=None):
    """Define the names, and an os.kill that accepts them; *refuse* is called for a missing signal."""

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
    os.sysconf = _sysconf
    os.geteuid = os.getuid = lambda: 1000  # not root: tests skip what only root can do


def _sysconf(name):
    if name not in ("SC_PAGE_SIZE", "SC_PAGESIZE"):
        raise ValueError(f"unrecognized configuration name {name}")
    return mmap.ALLOCATIONGRANULARITY


def _refuse(what):
    raise NotImplementedError(what)
