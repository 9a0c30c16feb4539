"""A file that is written and read like memory, by two programs.

This program creates a file, maps it, fills it with ones, and flushes it. Then another Python process maps the same file
for reading and counts the ones. It also sees one byte of the second half, mapped separately, become 2, without any
read, write or copy.

    pip install forkshm
    python examples/file_mapping.py
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

from forkshm import FileMapping, MappedRegion
from forkshm.region import read_only, read_write

SIZE = 10_000


def read(path: str) -> int:
    """Count the ones in the other program, now and after it has received a line."""
    with FileMapping(path, read_only) as file, MappedRegion(file, read_only) as region:
        print(bytes(region.buf).count(1), flush=True)
        sys.stdin.readline()
        print(bytes(region.buf).count(1), region.buf[SIZE // 2], flush=True)
    return 0


def main() -> int:
    """Write."""
    if len(sys.argv) == 2:
        return read(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file.bin"
        path.write_bytes(bytes(SIZE))
        with FileMapping(path, read_write) as file:
            with MappedRegion(file, read_write) as region:
                region.buf[:] = b"\1" * region.size
                region.flush()
            reader = [sys.executable, __file__, str(path)]
            with (
                subprocess.Popen(reader, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
                MappedRegion(file, read_write, offset=SIZE // 2) as half,
            ):
                first = other.stdout.readline().split() if other.stdout else []
                half.buf[0] = 2
                half.flush(0, 1)
                second = other.communicate("look again\n")[0].split()
        in_file = path.read_bytes()
    expected = b"\1" * (SIZE // 2) + b"\2" + b"\1" * (SIZE // 2 - 1)
    if (first, second, in_file) != ([str(SIZE)], [str(SIZE - 1), "2"], expected):
        print(f"file_mapping: the other program saw {first}, then {second}", file=sys.stderr)
        return 1
    print(f"the other program saw {SIZE:,} ones, then byte {SIZE // 2:,} become 2, and so did the file")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
