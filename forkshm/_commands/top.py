"""List the live shared memory on this machine repeatedly, the largest first, until Ctrl-C.

Examples:
  python -m forkshm top                   a list each second
  python -m forkshm top --pid 1234        what one process created or holds
  python -m forkshm top --count 1 | cat   one list, for example into a file
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from forkshm._commands import ls
from forkshm._commands._scan import scan
from forkshm._commands._table import render

__all__ = ("add_arguments", "run")

# ANSI sequences: move the cursor to the upper left, clear to the end of the line, clear to the end of the screen.
_HOME, _CLEAR_LINE, _CLEAR_REST = "\033[H", "\033[K", "\033[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to *parser*."""
    parser.add_argument("--pid", type=int, help="list only memory that this process created or holds")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="list interval (default: 1)")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="end after N lists")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.interval <= 0:
        print(f"--interval must be more than 0 seconds, got {arguments.interval}", file=sys.stderr)
        return 2
    live = sys.stdout.isatty()
    looks = 0
    while True:
        found = scan()
        found.memory.sort(key=lambda memory: -(memory.resident or 0))
        width, height = shutil.get_terminal_size()
        lines = [time.strftime("%H:%M:%S  ") + ls.summary_of(found, arguments.pid)]
        lines += render(ls.COLUMNS, ls.rows_of(found, arguments.pid)).splitlines()
        if live:
            seen = [line[: width - 1] + _CLEAR_LINE for line in lines[: height - 1]]
            sys.stdout.write(_HOME + "\n".join(seen) + _CLEAR_REST)
        else:
            sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        looks += 1
        if looks == arguments.count:
            return 0
        time.sleep(arguments.interval)
