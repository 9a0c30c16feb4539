"""A record of the resources this process holds, and a check that it does not hold more afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import threading
import time
from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.pickler import forget_files, forget_received
from forkshm.region import regions_mapped
from forkshm.region.blocks import arena, segments_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("Holdings", "check_leaks", "holdings")


@dataclasses.dataclass(frozen=True)
class Holdings:
    """The resources that a process can leak."""

    fds: frozenset[tuple[int, str]]
    """Open fds, each with its number and a description, except those of the arena, which stays warm."""
    children: frozenset[int]
    """Process ids of children, including zombies."""
    threads: frozenset[tuple[int, str]]
    """Names of threads."""
    named: frozenset[str]
    """Names below /dev/shm with the id of this process as a part; names of other processes come and go."""
    mappings: int
    """Number of mapped memory objects of forkshm, except those of the arena."""
    blocks: int
    """Number of arena blocks with a holder."""


def _fds() -> frozenset[tuple[int, str]]:
    if kernel.name == "windows":
        arenas = {segment.fd for segment in segments_held.values()}
        return frozenset(item for item in kernel.handles() if item[0] not in arenas)
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the fd that listed the directory
        # The lock file is opened once and stays open.
        if "forkshm-arena" not in target and not target.startswith("/proc/") and not target.endswith(".locks"):
            found.add((int(name), target))
    return frozenset(found)


def _children() -> frozenset[int]:
    if kernel.name == "windows":
        return frozenset(child.pid or 0 for child in _multiprocess.process.active_children())
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        # A thread may end between the two checks.
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as children:
            found.update(int(pid) for pid in children.read().split())
    return frozenset(found)


def _named() -> frozenset[str]:
    # The pid is a part of its own: random names of other programs may contain its digits.
    ours = re.compile(rf"(?<![0-9A-Za-z]){os.getpid()}(?![0-9A-Za-z])")
    return frozenset(name for name in os.listdir(kernel.folder_of_named()) if ours.search(name))


# The mappings that were counted last, and the regions that there were then.
_counted: tuple[int, int] = (0, 0)


def _mappings() -> int:
    global _counted
    regions = mappings = regions_mapped()
    if kernel.name != "windows":
        with open("/proc/self/maps") as maps:
            mappings = sum(":forkshm-region" in line or "/forkshm-region" in line for line in maps)
    _counted = mappings, regions
    return mappings


def _mappings_before() -> int:
    # In a process with many libraries, reading the table of mappings takes milliseconds. Between two checks it changes
    # only with the regions.
    mappings, regions = _counted
    return mappings if regions == regions_mapped() else _mappings()


def holdings() -> Holdings:
    """Return what this process holds after a garbage collection."""
    return _holdings(_mappings)


def _holdings(count_mappings: Callable[[], int]) -> Holdings:
    gc.collect()
    forget_received()
    forget_files()
    blocks = arena.statistics().blocks  # this releases the returned blocks
    return Holdings(
        fds=_fds(),
        children=_children(),
        threads=frozenset((thread.ident or 0, thread.name) for thread in threading.enumerate()),
        named=_named(),
        mappings=count_mappings(),
        blocks=blocks,
    )


@contextlib.contextmanager
def check_leaks(timeout: float = 5.0) -> Iterator[None]:
    """Raise AssertionError if this process holds more after the block than before.

    Args:
        timeout: Seconds to wait for processes and threads that are ending.

    Raises:
        AssertionError: Resources are left; the message lists them.
    """
    before = _holdings(_mappings_before)
    yield
    deadline = time.monotonic() + timeout
    while left := _left(before, holdings()):
        if time.monotonic() > deadline:
            raise AssertionError("left behind: " + "; ".join(left))
        time.sleep(0.01)


def _left(before: Holdings, after: Holdings) -> list[str]:
    left = []
    for field in dataclasses.fields(Holdings):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(new, int):
            if new > old:
                left.append(f"{new - old} {field.name}")
        elif new - old:
            left.append(f"{field.name} {sorted(new - old)}")
    return left
