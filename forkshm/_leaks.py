"""With ``FORKSHM_LEAKS=1``: what a process still holds when it ends, and where it was made.

Nothing need be given back at the end of a program: the kernel does it. But what is held until then, held all the while,
and in a program that runs for weeks that is a leak. Off, this costs a look at a name for each region and channel.
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
"""Whether to remember where things are made."""

# Lines of a report for each kind of thing.
_PLACES = 20


class _Thing(NamedTuple):
    kind: str
    nbytes: int
    where: str


# By id, from `made` to `unmade`: what has ended in between is not in it.
_things: dict[int, _Thing] = {}


def made(thing: object, kind: str, nbytes: int = 0) -> None:
    """Remember that *thing* was made for the caller; call it while `is_on` only."""
    _things[id(thing)] = _Thing(kind, nbytes, call_site())
    with contextlib.suppress(TypeError):  # what has no weak references calls `unmade` whatever its end is
        weakref.finalize(thing, _things.pop, id(thing), None).atexit = False


def unmade(thing: object) -> None:
    """Forget it: it has been given back."""
    _things.pop(id(thing), None)


def report() -> list[str]:
    """Return lines about what is held: of each kind how many, and where they were made, the most bytes first."""
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
    # Among the first to be registered, so the last to run: what the program's own handlers give back is not held.
    atexit.register(_at_exit)
    # What a child has from its parent, the parent made.
    _system.register_at_fork(after_in_child=_things.clear)
