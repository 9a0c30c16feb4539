"""The command line, ``python -m forkshm``, with a subcommand for each module named in `COMMANDS`."""

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

COMMANDS = {
    "run": "run a script in several ranked processes",
    "doctor": "list what this system supports, its limits, and the consequences",
    "ls": "list the live shared memory on this machine",
    "top": "list live shared memory repeatedly, the largest first",
    "clean": "list unused named memory, and remove it after asking",
}
"""The subcommands with their summaries.

Each is a module of `forkshm._commands` with ``add_arguments(parser)`` and ``run(arguments) -> int``, which returns the
exit code. Its docstring is its help, and ends with examples.
"""

_EXAMPLES = """\
examples:
  python -m forkshm run -n 4 script.py --size 10    four processes with ranks
  python -m forkshm doctor                          find out why something is missing or slow
  python -m forkshm ls                              show which processes hold shared memory
  python -m forkshm top                             monitor shared memory while a program runs
  python -m forkshm clean                           remove named memory left by killed programs

'python -m forkshm COMMAND --help' describes the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m forkshm",
        description="Run ranked scripts, and inspect the shared memory of this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Bug reports need Python's version as well.
    version = f"forkshm {sys.modules['forkshm'].__version__} (Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"forkshm._commands.{name}")
        # Without docstrings (python -OO) there is no text.
        description, _, examples = (module.__doc__ or "").partition("\nExamples:\n")
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
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
    except BrokenPipeError:  # the reader, for example ``head``, has closed the pipe
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
