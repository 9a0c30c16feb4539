"""Finds libraries whose threads do not survive a fork: the child does not have the threads, and waits for them forever.

Such a library works in forked processes if the parent has only imported it. So this module looks for the threads
instead of the import. The kernel knows the names of threads; where it does not, no library is found.

The fork server is not used automatically. Its processes import the main module again, so they need the ``__main__``
guard, and lack the data that the program has computed. They begin after 0.2 to 2 seconds, forked ones after 15 to 30
ms. A program that works would become slower or fail. So forking stays the default, with a warning.
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
    'forkshm.set_start_method("forkserver"). The main module then needs an if __name__ == "__main__" guard.'
)


class Library(NamedTuple):
    """A library whose threads do not survive a fork."""

    name: str
    modules: tuple[str, ...]
    """The modules that start its threads."""
    threads: str | None
    """The names of its threads, as a regular expression; None if they are named like the program."""


LIBRARIES = (
    Library("polars", ("polars",), r"polars-\d+"),
    Library("gRPC", ("grpc",), r"(grpc|event_engine|timer_manager|resolver-exec|default-execut).*"),
    Library("GNU OpenMP", ("sklearn", "xgboost", "lightgbm", "faiss", "numba"), None),
)
# Libraries that this process has already warned about.
_warned: set[str] = set()


def suspects() -> list[str]:
    """Return the names of used libraries that a forked process may wait for. Takes 0.1 ms, or nothing without them."""
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
    """Return the names of the threads that Python did not start."""
    known = {thread.native_id for thread in threading.enumerate()} | {os.getpid()}
    names = []
    for entry in os.listdir("/proc/self/task"):
        if int(entry) not in known:
            try:
                names.append(_comm(int(entry)))
            except OSError:  # the thread has ended
                continue
    return names


def _uses_gnu_openmp(unknown: int) -> bool:
    """Return whether GNU OpenMP has threads: more are named like the program than OpenBLAS's, which survive forks."""
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
    """Warn about *found*, once in this process for each library, at the line that called forkshm."""
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
    """Return the installed libraries, each with the module that starts its threads."""
    found = []
    for library in LIBRARIES:
        for module in library.modules:
            if importlib.util.find_spec(module) is not None:
                found.append((library.name, module))
                break
    return found
