"""SharedList and SharedDict: objects that many processes read, stored once for all of them.

Forked children read the lines of the standard library's modules, from a list of Python strings and from a SharedList.
Reading a string writes its reference count, so each child ends up with a copy of the plain list. The SharedList is
stored once for all readers.

    pip install forkshm
    python examples/shared_containers.py
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterable

import forkshm

CHILDREN = 8


def private_bytes() -> int:
    """Return the size of this process's private memory."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def grown_by_reading(lines: Iterable[str]) -> int:
    """Fork children that read all lines; return the bytes by which the largest of them grew."""
    grown = []
    for _ in range(CHILDREN):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            before = private_bytes()
            letters = 0
            for line in lines:
                letters += len(line)
            os.write(write_end, f"{private_bytes() - before}".encode())
            os._exit(0)
        grown.append(int(os.read(read_end, 100)))
        os.waitpid(child, 0)
        os.close(read_end)
        os.close(write_end)
    return max(grown)


def main() -> int:
    """Compare the memory that readers of both lists need."""
    sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    lines = [line for path in sources for line in path.read_text("utf-8", "replace").splitlines()]
    shared = forkshm.SharedList(lines)
    # Read here first, so that this process has the shared pages, too, and they do not count as a child's own.
    equal = shared == lines
    plain_bytes, shared_bytes = grown_by_reading(lines), grown_by_reading(shared)
    print(f"{len(lines):,} lines; each of {CHILDREN} children that read them grew")
    print(f"  by {plain_bytes / 1e6:6.1f} MB with a list")
    print(f"  by {shared_bytes / 1e6:6.1f} MB with a SharedList of {shared.nbytes / 1e6:.1f} MB, which is there once")

    first_lines = forkshm.SharedDict({path.name: path.read_text("utf-8", "replace")[:80] for path in sources})
    with forkshm.Pool(2) as pool:
        found = pool.apply(first_lines.__class__.__getitem__, (first_lines, "os.py"))
        copied = pool.statistics().bytes_copied
    if not equal or found != first_lines["os.py"] or copied or shared_bytes * 4 > plain_bytes:
        print("shared_containers: the shared memory is not what it should be", file=sys.stderr)
        return 1
    print("proved: equal to the plain list; a worker looked up a key, and no byte was copied")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
