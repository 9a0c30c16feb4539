"""Finds libraries whose threads do not survive a fork: the child does not have the threads, and waits for them forever.

Such a library works in forked processes if the parent has only imported it. So this module looks for the threads
instead of the import. The kernel knows the names of threads; where it does not, no library is found.

The fork server is not used automatically. Its processes import the main module again, so they need the ``__main__``
guard, and lack the data that the program has computed. They begin after 0.2 to 2 seconds, forked ones after 15 to 30
ms. A program that works would become slower or fail. So forking stays the default, with a warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import sys
import threading
import time
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
# A thread of GNU OpenMP spins for about a millisecond before it sleeps: wait at most this many for threads that run.
_SPINS = 5
# Libraries that this process has already warned about.
_warned: set[str] = set()


def suspects() -> list[str]:
    """Return the names of used libraries that a forked process may wait for. Takes 0.1 ms, or nothing without them."""
    candidates = [library for library in LIBRARIES if any(module in sys.modules for module in library.modules)]
    if not candidates:
        return []
    try:
        threads = _unknown_threads()
        own = _comm(os.getpid())
        found = []
        for library in candidates:
            if library.threads is not None:
                is_used = any(re.fullmatch(library.threads, name) for name in threads.values())
            else:
                is_used = _uses_gnu_openmp([thread for thread, name in threads.items() if name == own])
            if is_used:
                found.append(library.name)
    except OSError:  # no /proc
        return []
    return found


def _comm(thread: int) -> str:
    with open(f"/proc/self/task/{thread}/comm") as file:
        return file.read().strip()


def _unknown_threads() -> dict[int, str]:
    """Return the names of the threads that Python did not start, by their numbers."""
    known = {thread.native_id for thread in threading.enumerate()} | {os.getpid()}
    names = {}
    for entry in os.listdir("/proc/self/task"):
        if int(entry) not in known:
            with contextlib.suppress(OSError):  # the thread has ended
                names[int(entry)] = _comm(int(entry))
    return names


def _sleeps_at(thread: int) -> int | None:
    """Return the address of the code in which a thread sleeps, 0 if it has ended, None if it runs."""
    try:
        with open(f"/proc/self/task/{thread}/syscall") as file:
            words = file.read().split()
    except OSError:
        return 0
    return int(words[-1], 16) if len(words) > 1 else None


def _uses_gnu_openmp(unknown: list[int]) -> bool:
    """Return whether GNU OpenMP has any of these threads: on x86-64, one that sleeps in its code.

    Elsewhere, and if threads do not sleep, they are counted: are they more than those of OpenBLAS, which survive forks,
    and those of the `_thread` module, which Python does not list?
    """
    if not unknown:
        return False
    with open("/proc/self/maps") as file:
        mappings = [line.split() for line in file if "/" in line]
    libraries = {words[-1].rpartition("/")[2] for words in mappings}
    code = [words[0].split("-") for words in mappings if words[-1].rpartition("/")[2].startswith("libgomp")]
    if not code:
        return False
    ranges = [range(int(start, 16), int(end, 16)) for start, end in code]
    for _ in range(_SPINS):
        places = [_sleeps_at(thread) for thread in unknown]
        if any(place in each for place in places if place is not None for each in ranges):
            return True
        if None not in places:
            if all(places) and platform.machine() == "x86_64":
                return False
            break
        time.sleep(0.001)
    of_blas = sum("openblas" in name for name in libraries) * ((os.cpu_count() or 1) - 1)
    if (threadpoolctl := sys.modules.get("threadpoolctl")) is not None:
        blas = threadpoolctl.threadpool_info()
        of_blas = sum(info["num_threads"] - 1 for info in blas if info["internal_api"] == "openblas")
    unlisted = max(0, len(sys._current_frames()) - threading.active_count())
    return len(unknown) > of_blas + unlisted


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
