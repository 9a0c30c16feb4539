"""With ``FORKSHM_LEAKS=1``, reports what a process still holds when it ends, and where it was created.

A program need not release anything at its end, because the kernel does. But resources held until then were held all the
time, which is a leak in a program that runs for weeks. When off, this costs one comparison for each region and channel.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import weakref
from typing import TYPE_CHECKING, NamedTuple

from forkshm import _system
from forkshm._ledger import call_site

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("is_on", "made", "report", "unmade")

is_on = os.environ.get("FORKSHM_LEAKS", "") not in ("", "0")
"""Whether to record where objects are created."""

# Maximum number of places that a report lists for each kind of object.
_PLACES = 20


class _Thing(NamedTuple):
    kind: str
    nbytes: int
    where: str


# Live objects by id, from `made` to `unmade`. An object that is collected in between is omitted.
_things: dict[int, _Thing] = {}


def made(thing: object, kind: str, nbytes: int = 0) -> None:
    """Record that *thing* was created for the caller; call it only if `is_on`."""
    _things[id(thing)] = _Thing(kind, nbytes, call_site())
    with contextlib.suppress(TypeError):  # an object without weak references always calls `unmade`
        weakref.finalize(thing, _things.pop, id(thing), None).atexit = False


def unmade(thing: object) -> None:
    """Drop the record of an object that was released."""
    _things.pop(id(thing), None)


def report() -> list[str]:
    """Return lines about live objects: for each kind the number, and where they were created, most bytes first."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for thing in list(_things.values()):
        kinds.setdefault(thing.kind, {}).setdefault(thing.where, []).append(thing.nbytes)
    return [line for kind, places in sorted(kinds.items()) for line in _about(kind, places)]


def _about(kind: str, places: dict[str, list[int]]) -> Iterator[str]:
    def size(count: int, nbytes: int) -> str:
        return f"{count:,} {kind}{'' if count == 1 else 's'}" + (f", {nbytes:,} bytes" if nbytes else "")

    yield size(sum(map(len, places.values())), sum(map(sum, places.values())))
    ranked = sorted(places.items(), key=lambda item: (-sum(item[1]), -len(item[1]), item[0]))
    for where, sizes in ranked[:_PLACES]:
        yield f"  {size(len(sizes), sum(sizes))}, made at {where}"
    if len(ranked) > _PLACES:
        yield f"  and at {len(ranked) - _PLACES:,} more places"


def _at_exit() -> None:
    gc.collect()
    if lines := report():
        print(f"forkshm: process {os.getpid()} held at its end:", *lines, sep="\n  ", file=sys.stderr, flush=True)


if is_on:
    # Registered early, so it runs late: objects that the program's exit functions release are not reported.
    atexit.register(_at_exit)
    # Objects inherited from the parent were created by the parent.
    _system.register_at_fork(after_in_child=_things.clear)
