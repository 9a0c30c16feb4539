"""List the live shared memory on this machine: forkshm's memory, and all named memory.

Only root can see the memory held by processes of other users.

Examples:
  python -m forkshm ls               all shared memory, and the processes that hold it
  python -m forkshm ls --pid 1234    what one process created or holds
  python -m forkshm ls --json        the same for programs
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from forkshm._commands._scan import age_of, began, command_of, scan
from forkshm._commands._table import nbytes, seconds, show

if TYPE_CHECKING:
    from forkshm._commands._scan import Memory, Scan

__all__ = ("add_arguments", "rows_of", "run", "summary_of")

COLUMNS = ("memory", "creator", "holders", ">size", ">resident", ">age")

# Maximum number of holders listed by pid; further ones are counted.
_NAMED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to *parser*."""
    parser.add_argument("--pid", type=int, help="list only memory that this process created or holds")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")


def creator_of(memory: Memory) -> str:
    """Return the creating process as text, as far as it is known."""
    if not memory.creator:
        return f"? (uid {memory.owner})" if memory.owner >= 0 else "?"
    # A process that began after the memory was created has reused its creator's pid.
    command = command_of(memory.creator) if began(memory.creator) <= memory.made + 1 or not memory.made else ""
    return f"{memory.creator} {command[:40]}" if command else f"{memory.creator} (ended)"


def rows_of(found: Scan, pid: int | None = None) -> list[list[str]]:
    """Return a row for each memory object."""
    rows = []
    for memory in chosen(found, pid):
        holders = sorted(memory.holders)
        named = " ".join(map(str, holders[:_NAMED])) or "nobody"
        age = age_of(memory)
        rows.append(
            [
                f"named {memory.name}" if memory.kind == "named" else memory.kind,
                creator_of(memory),
                named + (f" and {len(holders) - _NAMED} more" if len(holders) > _NAMED else ""),
                nbytes(memory.size),
                nbytes(memory.resident),
                "?" if age is None else seconds(age),
            ]
        )
    return rows


def chosen(found: Scan, pid: int | None) -> list[Memory]:
    """Return the memory that process *pid* created or holds, or all memory if *pid* is None."""
    return [memory for memory in found.memory if pid is None or pid in memory.holders or pid == memory.creator]


def summary_of(found: Scan, pid: int | None = None) -> str:
    """Return the summary line: number of objects, resident bytes, and uninspected processes."""
    memory = chosen(found, pid)
    resident = sum(one.resident or 0 for one in memory)
    line = f"{len(memory):,} memory objects, {nbytes(resident)} resident"
    if found.hidden:
        line += f"; {found.hidden:,} processes of other users could not be inspected (root can)"
    return line


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    found = scan()
    # Omit memory that only this command holds.
    found.memory = [memory for memory in found.memory if memory.holders != {os.getpid()} or memory.kind == "named"]
    if arguments.json:
        fields = [
            {
                "kind": memory.kind,
                "name": memory.name,
                "creator": memory.creator,
                "owner": memory.owner,
                "size": memory.size,
                "resident": memory.resident,
                "age": age_of(memory),
                "holders": sorted(memory.holders),
            }
            for memory in chosen(found, arguments.pid)
        ]
        print(json.dumps(fields, indent=1))
        return 0
    rows = rows_of(found, arguments.pid)
    if rows:
        show(COLUMNS, rows)
    print(summary_of(found, arguments.pid))
    return 0
