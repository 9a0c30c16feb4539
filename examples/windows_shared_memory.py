"""Native shared memory of Windows, and an alternative for other systems.

The memory lives exactly as long as any process has it. On other systems `WindowsSharedMemory` raises an error. Memory
without a name has the same lifetime, and a pool's workers get it as an argument: this program then uses that.

    pip install forkshm
    python examples/windows_shared_memory.py
"""

from __future__ import annotations

import sys

import forkshm
from forkshm import MappedRegion, anonymous_shared_memory
from forkshm.region import WindowsSharedMemory, create_only, read_write

SIZE = 1000


def check(region: MappedRegion) -> int:
    """Count the ones, in another process."""
    return bytes(region.buf).count(1)


def make() -> MappedRegion:
    """Return native memory, or its equivalent on this system."""
    try:
        with WindowsSharedMemory(create_only, "shared_memory", read_write, SIZE) as shm:
            return MappedRegion(shm, read_write)
    except forkshm.UnsupportedError as error:
        print(f"not supported here: {error}")
        return anonymous_shared_memory(SIZE)


def main() -> int:
    """Fill the memory with ones, and have another process count them."""
    with forkshm.Pool(1) as pool, make() as region:
        region.buf[:] = b"\1" * region.size
        ones = pool.apply(check, (region,))
    if ones != SIZE:
        print(f"windows_shared_memory: {ones:,} of {SIZE:,} bytes are 1", file=sys.stderr)
        return 1
    print(f"another process found all {ones:,} bytes to be 1; the memory is gone with the last that had it")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
