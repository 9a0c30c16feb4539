"""``python -m forkshm``: one subcommand for each module of `forkshm._commands`."""

from __future__ import annotations

import argparse
import importlib
import sys

#: The subcommands, and what they are for.
COMMANDS = {
    "run": "run a script in several ranked processes",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m forkshm", description="Shared memory between Python processes.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"forkshm._commands.{name}")
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
