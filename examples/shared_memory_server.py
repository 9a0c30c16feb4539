"""The server of Boost.Interprocess' first example: create shared memory by name, and fill it with ones.

A new object has 0 bytes. It is given a size, mapped, and written to like any memory. Then the client is started, which
opens the same object by its name and checks every byte. With --leave the client is not started, and the object stays
after this program has ended, until it is removed. Then run the client yourself.

    pip install forkshm
    python examples/shared_memory_server.py
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

from forkshm import MappedRegion, SharedMemoryObject
from forkshm.region import create_only, read_write

CLIENT = pathlib.Path(__file__).with_name("shared_memory_client.py")


def main() -> int:
    """Serve."""
    parser = argparse.ArgumentParser(description="Create shared memory, and fill it with ones.")
    parser.add_argument("--name", default="forkshm-example", help="of the object (%(default)s)")
    parser.add_argument("--size", type=int, default=1000, help="in bytes (%(default)s)")
    parser.add_argument("--leave", action="store_true", help="do not start the client")
    options = parser.parse_args()

    SharedMemoryObject.remove(options.name)  # removes the object of an earlier run
    with SharedMemoryObject(create_only, options.name, read_write) as shm:
        shm.truncate(options.size)
        with MappedRegion(shm, read_write) as region:
            region.buf[:] = b"\1" * region.size
    print(f"server: wrote {options.size:,} ones to shared memory object {options.name!r}, and closed it", flush=True)
    if options.leave:
        return 0
    return subprocess.run([sys.executable, CLIENT, "--name", options.name], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
