"""@forkshm.parallel: a function that can still be called, and can also be mapped over workers.

Counts the names that the modules of the standard library define, and fills a histogram in shared memory: the workers
write to it, and nothing is sent back. One file is missing; only its call fails.

    pip install 'forkshm[numpy]'
    python examples/decorator.py
"""

from __future__ import annotations

import ast
import os
import pathlib
import sys

import numpy as np

import forkshm

SOURCES = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))


@forkshm.parallel(on_error="skip")
def definitions(path: pathlib.Path) -> tuple[str, int]:
    """Return how many functions and classes a file defines."""
    tree = ast.parse(path.read_bytes())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return path.name, sum(isinstance(node, kinds) for node in ast.walk(tree))


@forkshm.parallel
def byte_counts(path: pathlib.Path) -> np.ndarray:
    """Return how often each byte is in a file."""
    return np.bincount(np.frombuffer(path.read_bytes(), np.uint8), minlength=256)


def main() -> int:
    """Map both, and compare with calling them."""
    some = SOURCES[:60]
    answers = definitions.map([*some, pathlib.Path("no-such-file.py")])
    name, most = max(answers, key=lambda answer: answer[1])
    print(f"{len(answers)} of {len(some) + 1} files were read; {name} defines most: {most} functions and classes")

    table = forkshm.zeros((len(some), 256), int)
    byte_counts.map(some, out=table)
    print(f"{table.sum():,} bytes were counted by the workers, into an array that all of them see")

    if answers != [definitions(path) for path in some] or any(
        (byte_counts(path) != row).any() for path, row in zip(some, table, strict=True)
    ):
        print("decorator: the workers' answers are not those of plain calls", file=sys.stderr)
        return 1
    print("proved: the workers' answers are those of plain calls")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
