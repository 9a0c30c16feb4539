"""Remove unused named memory in /dev/shm, after listing it and asking.

Anonymous memory needs no cleaning: the kernel frees it when its last holder ends. A named object stays until it is
removed, which may be intended. The kernel does not record its creator, only its owner and the processes that have it
open or mapped now. The command therefore offers objects that this user owns and that no visible process uses.
Processes that cannot be inspected may still use them. Root can inspect all processes of this PID namespace; nobody can
see those of other containers that mount the same /dev/shm. Removing a name does not affect processes that already have
the memory open or mapped.

Examples:
  python -m forkshm clean --dry-run          list what nobody uses
  python -m forkshm clean                    list it, ask, and remove it
  python -m forkshm clean --yes "psm_*"      remove what multiprocessing.shared_memory left, without asking
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from typing import TYPE_CHECKING

from forkshm._commands._scan import SHM, age_of, scan
from forkshm._commands._table import nbytes, seconds, show

if TYPE_CHECKING:
    from forkshm._commands._scan import Memory

__all__ = ("add_arguments", "run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to *parser*."""
    parser.add_argument("pattern", nargs="?", default="*", help='pattern of names, such as "psm_*" (default: all)')
    parser.add_argument("--older", type=float, default=60.0, metavar="SECONDS", help="minimum age (default: 60)")
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument("--dry-run", action="store_true", help="list only")


def unused(memory: Memory, pattern: str, older: float) -> bool:
    """Return whether this user owns the memory and no visible process uses it."""
    assert sys.platform != "win32"  # looks into /proc
    age = age_of(memory)
    return (
        memory.kind == "named"
        and not memory.holders
        and memory.owner == os.geteuid()
        and fnmatch.fnmatchcase(memory.name, pattern)
        and age is not None
        and age >= older
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    found = scan()
    doomed = [memory for memory in found.memory if unused(memory, arguments.pattern, arguments.older)]
    if not doomed:
        print("you own no unused named memory")
        return 0
    show(
        ("name", ">size", ">resident", ">age"),
        [
            [memory.name, nbytes(memory.size), nbytes(memory.resident), seconds(age_of(memory) or 0.0)]
            for memory in doomed
        ],
    )
    if found.hidden:
        print(f"{found.hidden:,} processes could not be inspected and may use these objects")
    if arguments.dry_run:
        return 0
    if not arguments.yes:
        try:
            answer = input(f"remove {'it' if len(doomed) == 1 else f'these {len(doomed)}'}? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("removed nothing")
            return 1
    return _remove(doomed, arguments)


def _remove(doomed: list[Memory], arguments: argparse.Namespace) -> int:
    # The answer may have taken a while: keep objects that are now in use or were replaced by another of that name.
    still = {
        (memory.name, memory.made) for memory in scan().memory if unused(memory, arguments.pattern, arguments.older)
    }
    failed = 0
    for memory in doomed:
        if (memory.name, memory.made) not in still:
            print(f"{memory.name}: skipped, because it is now in use or gone")
            continue
        try:
            os.unlink(f"{SHM}/{memory.name}")
        except FileNotFoundError:
            continue
        except OSError as error:
            failed += 1
            print(f"{memory.name}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        else:
            print(f"removed {memory.name}, {nbytes(memory.size)}")
    return 1 if failed else 0
