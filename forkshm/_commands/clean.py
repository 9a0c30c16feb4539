"""Remove named memory in /dev/shm that nobody uses; shows it and asks first.

Memory without a name never needs this: the kernel frees it with its last holder. A named object stays until somebody
removes it, and that may be meant: nothing says who made one, only which user owns it, and who has it open or mapped
now. So what is offered is what this user owns and no process has. Processes that could not be looked into may have
it all the same; root sees all of this PID namespace, and nobody those of other containers that mount the same
/dev/shm. To remove a name takes nothing from those who have the memory already.
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
    """Say what the command takes."""
    parser.add_argument("pattern", nargs="?", default="*", help='names, as in a shell: "psm_*"; all by default')
    parser.add_argument("--older", type=float, default=60.0, metavar="SECONDS", help="leave what is younger (60)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="show only")


def unused(memory: Memory, pattern: str, older: float) -> bool:
    """Whether nobody who can be seen uses it, and it is this user's to remove."""
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
        print("no named memory of yours that nobody uses")
        return 0
    show(
        ("name", ">size", ">resident", ">age"),
        [
            [memory.name, nbytes(memory.size), nbytes(memory.resident), seconds(age_of(memory) or 0.0)]
            for memory in doomed
        ],
    )
    if found.hidden:
        print(f"{found.hidden:,} processes could not be looked into: one of them may use these")
    if arguments.dry_run:
        return 0
    if not arguments.yes:
        try:
            answer = input(f"remove {'it' if len(doomed) == 1 else f'these {len(doomed)}'}? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 1
    return _remove(doomed, arguments)


def _remove(doomed: list[Memory], arguments: argparse.Namespace) -> int:
    # The answer may have taken a while: what is used by now, or is another object, stays.
    still = {
        (memory.name, memory.made) for memory in scan().memory if unused(memory, arguments.pattern, arguments.older)
    }
    failed = 0
    for memory in doomed:
        if (memory.name, memory.made) not in still:
            print(f"{memory.name}: in use by now, or gone; left alone")
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
