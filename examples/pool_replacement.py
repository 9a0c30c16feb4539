"""The smallest possible change: one import line.

Runs pool_before.py, an ordinary program that passes a table of 10 MB to each task of a `multiprocessing.Pool`, and
pool_after.py, the same program with a different import line. Compares what they print.

    pip install 'forkshm[numpy]'
    python examples/pool_replacement.py
"""

from __future__ import annotations

import difflib
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def run(name: str) -> tuple[list[str], float]:
    """Return the answers that a program prints, and the seconds that it reports."""
    done = subprocess.run([sys.executable, HERE / name, *sys.argv[1:]], stdout=subprocess.PIPE, text=True, check=True)
    *answers, last = done.stdout.splitlines()
    return answers, float(last.rpartition(" ")[2])


def main() -> int:
    """Show the difference, run both, and compare."""
    before, after = ((HERE / name).read_text().splitlines() for name in ("pool_before.py", "pool_after.py"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    print("the difference between the programs:", *changes, sep="\n    ")
    answers, slow = run("pool_before.py")
    same, fast = run("pool_after.py")
    print(*answers, sep="\n")
    print(f"multiprocessing {slow:.3f} s, forkshm {fast:.3f} s: {slow / fast:.1f} times as fast")
    if len(changes) != 2 or answers != same:
        print("pool_replacement: the programs differ in more than a line, or in their answers", file=sys.stderr)
        return 1
    print("proved: one line was changed, and the answers are the same")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
