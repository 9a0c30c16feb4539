"""Parts of the standard library that some systems lack, under one name on all systems."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = (
    "CAN_FORK",
    "SIGCONT",
    "SIGKILL",
    "SIGSTOP",
    "greened_by",
    "path_of",
    "reason_of",
    "register_at_fork",
    "why_refused",
)

CAN_FORK = hasattr(os, "fork")
"""Whether this system can fork processes."""

SIGKILL: int = getattr(signal, "SIGKILL", 9)
"""The signal that kills a process. Systems without signals use its number as well."""
SIGSTOP: int = getattr(signal, "SIGSTOP", 19)
"""The signals that stop and continue a process."""
SIGCONT: int = getattr(signal, "SIGCONT", 18)


def _never(
    *,
    before: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
    after_in_child: Callable[[], object] | None = None,
) -> None:
    """Do nothing: this system cannot fork."""


register_at_fork: Callable[..., None] = getattr(os, "register_at_fork", _never)
"""`os.register_at_fork`, or a function that does nothing on systems without fork."""


def why_refused(error: OSError) -> str:
    """Return why a process could not be started and what to do, after the kernel's message in parentheses."""
    reason = reason_of(error)
    said = error.strerror or str(error)
    return f"({said})" if reason is None else f"({said}): {reason}"


def reason_of(error: OSError) -> str | None:
    """Return why a process could not be started and what to do, or None if that is unknown."""
    if error.errno == errno.EAGAIN:
        return "the limit on processes is reached. End some, or raise it (ulimit -u; in a container its limit on pids)"
    if error.errno == errno.EMFILE:
        return "the limit on open files of this process is reached. Close some, or raise it (ulimit -n)"
    if error.errno == errno.ENFILE:
        return "the system's limit on open files is reached. Close some, or raise it (sysctl fs.file-max)"
    if error.errno == errno.ENOMEM:
        return "there is too little memory for another process. Start fewer, or raise the limit (ulimit -v)"
    if error.errno == errno.ENOENT and _has_no_directory():
        return "the current directory of this process was deleted. Call os.chdir() with one that exists"
    if error.errno == errno.ENOENT and not os.path.isdir(tempfile.gettempdir()):
        return (
            f"the directory for temporary files, {tempfile.gettempdir()}, does not exist. Set TMPDIR to one that does"
        )
    if "path too long" in str(error):
        return (
            f"the fork server's address, a file in {tempfile.gettempdir()}, is longer than the address of a socket "
            "may be. Set TMPDIR to a directory with a shorter name"
        )
    return None


def _has_no_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def path_of(kind: type) -> str:
    """Return the public path of a type, without modules whose names begin with an underscore."""
    module = kind.__module__
    if module in ("builtins", None):
        return kind.__qualname__
    if module.startswith("forkshm."):
        # The shortest path that leads to it. Nothing is imported for that.
        parts = module.split(".")
        for count in range(1, len(parts)):
            name = ".".join(parts[:count])
            if vars(sys.modules.get(name, kind)).get(kind.__name__) is kind:
                module = name
                break
    return f"{module}.{kind.__qualname__}"


def greened_by() -> str | None:
    """Return the name of the library that has replaced the blocking functions of this process, or None.

    With such a library, a thread that waits in the kernel stops all others, and its locks and pollers differ.
    """
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and (gevent.is_module_patched("select") or gevent.is_module_patched("threading")):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and (eventlet.is_monkey_patched("select") or eventlet.is_monkey_patched("thread")):
        return "eventlet"
    return None
