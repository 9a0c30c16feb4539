"""Makes ``breakpoint()`` work in a process that forkshm started: the debugger uses the terminal.

The standard input of such a process is ``/dev/null``, where a debugger would quit at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from forkshm.errors import add_note

__all__ = ("explained_quit", "install")


def install() -> None:
    """Set ``sys.breakpointhook``, unless the program or ``PYTHONBREAKPOINT`` has chosen a debugger."""
    if sys.breakpointhook is sys.__breakpointhook__ and not os.environ.get("PYTHONBREAKPOINT"):
        sys.breakpointhook = _stop_here


def explained_quit(error: BaseException) -> BaseException:
    """Return the error of a task, with a note if a debugger has read the empty standard input and quit.

    From Python 3.14 on, `pdb.set_trace` exits there. The exit is replaced by `bdb.BdbQuit`, which older versions raise,
    so that the caller does not exit without a word.
    """
    bdb = sys.modules.get("bdb")
    if bdb is None or not isinstance(error, (bdb.BdbQuit, SystemExit)):
        return error
    for frame, _ in traceback.walk_tb(error.__traceback__):
        debugger = frame.f_locals.get("self")
        if isinstance(debugger, bdb.Bdb) and getattr(debugger, "stdin", None) is sys.stdin:
            if isinstance(error, SystemExit):
                error = bdb.BdbQuit().with_traceback(error.__traceback__)
            add_note(
                error,
                f"The debugger quit because the standard input of process {os.getpid()} is {os.devnull}. Call "
                "breakpoint(), which uses the terminal.",
            )
            return error
    return error


def _stop_here(*args: Any, **keywords: Any) -> None:
    """Stop in the caller of ``breakpoint()``, at the terminal of the session."""
    import pdb  # noqa: T100 - this is what breakpoint() calls

    try:
        source, target = open(_TERMINAL), open(_TERMINAL, "w")  # noqa: SIM115 - the debugger keeps them
    except OSError as error:
        raise RuntimeError(
            f"cannot stop at breakpoint() in process {os.getpid()}: its standard input is /dev/null, and {_TERMINAL} "
            f"cannot be opened ({error}). Call the function in the main process, or set PYTHONBREAKPOINT to a debugger "
            "that listens on a port, such as debugpy.breakpoint."
        ) from error
    debugger = pdb.Pdb(stdin=source, stdout=target)
    debugger.prompt = f"(Pdb {os.getpid()}) "
    debugger.set_trace(sys._getframe(1))


_TERMINAL = "CON" if sys.platform == "win32" else "/dev/tty"
