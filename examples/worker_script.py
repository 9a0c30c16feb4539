"""A worker script: the most common words of Python's own library, counted by several processes.

    python -m forkshm run -n 4 examples/worker_script.py      four workers
    python examples/worker_script.py                          it also runs alone

A worker that has finished a file takes the next one. The lines of each file are counted in an array that all workers
share by its name, and the words in a counter of each worker's own. The counters are added up at the end.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import sys

import forkshm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300, help="how many files, the first by name")
    options = parser.parse_args()
    me = forkshm.worker()

    sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[: options.files]
    lines = me.array("lines", len(sources), "int64")
    words: collections.Counter[str] = collections.Counter()
    mine = 0
    for index in me.range(len(sources), schedule="dynamic"):
        text = sources[index].read_text(errors="replace")
        lines[index] = text.count("\n")
        words.update(re.findall(r"[a-z]+", text))
        mine += 1
    words = me.reduce(words)
    shares = me.reduce([mine])

    if me.rank == 0:
        print(
            f"{len(sources)} files in {me.size} workers, {'each took some' if min(shares) else 'not all were needed'}"
        )
        common = ", ".join(f"{word} {count:,}" for word, count in words.most_common(5))
        print(f"{int(lines.sum()):,} lines, {words.total():,} words: {common}")
        expected = sum(path.read_text(errors="replace").count("\n") for path in sources)
        if expected != lines.sum() or sum(shares) != len(sources):
            print(f"worker_script: a serial count gives {expected:,} lines", file=sys.stderr)
            return 1
        print("lines equal to a serial count: yes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
