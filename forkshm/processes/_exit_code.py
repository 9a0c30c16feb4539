"""Exit codes of processes that have ended."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from forkshm import _multiprocess
from forkshm.backend import kernel

__all__ = ("exit_code",)

# Time that the fork server may take to report how one of its processes ended.
_SERVER_MILLISECONDS = 5000

# On Windows, a process ended by a signal exits with this code plus the signal's number.
_ENDED_BY = 0x10000
_SIGNALS = 65
_PAUSE = 0.0005
# Time that another thread, which reaped a child, may take to store the exit code.
_OTHER_THREAD_SECONDS = 0.1


def exit_code(ended: _multiprocess.process.BaseProcess, timeout: float = 0.0) -> int | None:
    """Reap an ended process, and return its exit code; None if other code reaped it first.

    Any code in this process that calls ``os.wait()``, or ignores SIGCHLD, takes exit codes away. Without this function,
    ``join()`` would then wait for a process forever.

    Args:
        ended: The process.
        timeout: Seconds until the kernel has the exit code, on systems that report the end of a process before.
    """
    popen: Any = getattr(ended, "_popen", None)
    if popen is None:  # an interrupted call has already closed the process
        _multiprocess.process._children.discard(ended)  # type: ignore[attr-defined]
        return None
    if sys.platform != "win32" and popen.method == "forkserver":
        # The fork server, as its parent, reports the code, unless the server was stopped.
        status = kernel.poller()
        status.register(popen.sentinel, kernel.READABLE)
        status.poll(_SERVER_MILLISECONDS)
    code = ended.exitcode
    until = time.monotonic() + timeout
    while code is None and timeout and time.monotonic() < until and _is_there(ended.pid):
        time.sleep(_PAUSE)
        code = ended.exitcode
    deadline = time.monotonic() + _OTHER_THREAD_SECONDS
    while code is None and threading.active_count() > 1 and time.monotonic() < deadline:
        # Another thread, for example in active_children(), may have reaped it and not yet stored the code.
        time.sleep(0.001)
        code = ended.exitcode
    if getattr(popen, "status_is_lost", False):
        code = None
    elif code is None:
        popen.returncode = 255  # otherwise close() would fail
    elif 0 < code - _ENDED_BY < _SIGNALS:  # see the Windows backend; the code of a crash is larger
        code = _ENDED_BY - code
    try:
        ended.close()
    except AttributeError:  # a signal handler has closed it meanwhile
        if not getattr(ended, "_closed", False):
            raise
    _multiprocess.process._children.discard(ended)  # type: ignore[attr-defined]
    return code


def _is_there(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True
