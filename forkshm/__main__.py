"""``python -m forkshm``: one subcommand for each module of `forkshm._commands` that is named here."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from typing import TYPE_CHECKING

from forkshm.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("COMMANDS", "main")

#: The subcommands, and what they do. Each is a module below `forkshm._commands` with
#: ``add_arguments(parser)`` and ``run(arguments) -> int``, which returns the exit code.
COMMANDS = {
    "run": "run a script in several ranked processes",
    "doctor": "list what this system offers, its limits, and what follows",
    "ls": "list the shared memory that is alive on this machine",
    "top": "list it again and again, the largest first",
    "clean": "list named memory that nobody uses, ask, and remove it",
}

_EXAMPLES = """\
examples:
  python -m forkshm run -n 4 script.py --size 10    four processes with ranks
  python -m forkshm doctor                          why is something missing or slow here?
  python -m forkshm ls                              who holds how much shared memory?
  python -m forkshm top                             the same while a program runs
  python -m forkshm clean                           remove what a killed program left

'python -m forkshm COMMAND --help' describes the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m forkshm",
        description="Shared memory between Python processes: run ranked scripts, and see what is there.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Python's version as well: it is what one is asked for next.
    version = f"forkshm {sys.modules['forkshm'].__version__} (Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"forkshm._commands.{name}")
        subparser = subparsers.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, command=name)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UnsupportedError as error:
        print(f"python -m forkshm {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, for example ``head``, has seen enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
