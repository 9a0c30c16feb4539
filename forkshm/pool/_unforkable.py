"""Libraries that do not survive a fork once they were used: their threads are not forked, and the child waits for them.

Such a library works in forked processes as long as the parent only imported it. So this module looks
for the threads, not for the import. The kernel tells the names of threads. Where it does not, nothing is found.

Why the fork server is not used by itself where something is found: its processes import the main module anew, so they
need the ``__main__`` guard, have none of what the program has computed, and begin 0.2 to 2 seconds later, where forked
ones begin after 15 to 30 ms. A program that works would become slower or fail. So forking stays the default, and says
what may happen.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
import warnings
from typing import NamedTuple

from forkshm.errors import ForkshmWarning

__all__ = ("LIBRARIES", "WAY_OUT", "Library", "installed", "suspects", "warn")

WAY_OUT = (
    'Use processes that are not forked from this one: forkshm.get_context("forkserver").Pool(...), or '
    'forkshm.set_start_method("forkserver"); the main module then needs an if __name__ == "__main__" guard'
)


class Library(NamedTuple):
    """A library whose threads do not survive a fork."""

    name: str
    modules: tuple[str, ...]
    """The modules that bring it."""
    threads: str | None
    """What its threads are called by the kernel; None if like the program."""


LIBRARIES = (
    Library("polars", ("polars",), r"polars-\d+"),
    Library("gRPC", ("grpc",), r"(grpc|event_engine|timer_manager|resolver-exec|default-execut).*"),
    Library("GNU OpenMP", ("sklearn", "xgboost", "lightgbm", "faiss", "numba"), None),
)
# Libraries for which this process has given a warning.
_warned: set[str] = set()


def suspects() -> list[str]:
    """Return the names of the libraries in use that a forked process may wait for; 0.1 ms, nothing without them."""
    candidates = [library for library in LIBRARIES if any(module in sys.modules for module in library.modules)]
    if not candidates:
        return []
    try:
        names = _names_of_threads()
        own = _comm(os.getpid())
        found = []
        for library in candidates:
            if library.threads is not None:
                is_used = any(re.fullmatch(library.threads, name) for name in names)
            else:
                is_used = _uses_gnu_openmp(names.count(own))
            if is_used:
                found.append(library.name)
    except OSError:  # no /proc
        return []
    return found


def _comm(thread: int) -> str:
    with open(f"/proc/self/task/{thread}/comm") as file:
        return file.read().strip()


def _names_of_threads() -> list[str]:
    """Return the names of the threads that Python knows nothing of."""
    known = {thread.native_id for thread in threading.enumerate()} | {os.getpid()}
    names = []
    for entry in os.listdir("/proc/self/task"):
        if int(entry) not in known:
            try:
                names.append(_comm(int(entry)))
            except OSError:  # it has ended
                continue
    return names


def _uses_gnu_openmp(unknown: int) -> bool:
    """Return whether it has threads: more are called like the program than OpenBLAS explains, which survives forks."""
    if not unknown:
        return False
    with open("/proc/self/maps") as file:
        libraries = {line.rpartition("/")[2].strip() for line in file if "/" in line}
    if not any(name.startswith("libgomp") for name in libraries):
        return False
    of_blas = sum("openblas" in name for name in libraries) * (os.cpu_count() or 1)
    if (threadpoolctl := sys.modules.get("threadpoolctl")) is not None:
        blas = threadpoolctl.threadpool_info()
        of_blas = sum(info["num_threads"] - 1 for info in blas if info["internal_api"] == "openblas")
    return unknown > of_blas


def warn(found: list[str]) -> None:
    """Warn of *found*, once in this process for each library, where forkshm was called."""
    new = [name for name in found if name not in _warned]
    if not new:
        return
    _warned.update(new)
    level, frame = 1, sys._getframe(0)
    package = os.path.dirname(os.path.dirname(__file__))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"this process has used {' and '.join(new)}, and forks workers: a worker that uses "
        f"{'it' if len(new) == 1 else 'one of them'} may wait forever, because threads are not forked. {WAY_OUT}",
        ForkshmWarning,
        stacklevel=level,
    )


def installed() -> list[tuple[str, str]]:
    """Return the libraries that are installed, each with the module that brings it."""
    found = []
    for library in LIBRARIES:
        for module in library.modules:
            if importlib.util.find_spec(module) is not None:
                found.append((library.name, module))
                break
    return found
