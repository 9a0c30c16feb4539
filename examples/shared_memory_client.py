"""The client of Boost.Interprocess' first example: open shared memory by name, check every byte, remove it.

If the object does not exist, the server is started first. It has ended by the time the object is opened here: a named
object remains after its creator has ended.

    pip install forkshm
    python examples/shared_memory_client.py
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

from forkshm import MappedRegion, RegionNotFoundError, SharedMemoryObject
from forkshm.region import open_only, read_only

SERVER = pathlib.Path(__file__).with_name("shared_memory_server.py")


def open_object(name: str) -> SharedMemoryObject:
    """Open the object; start the server if it does not exist."""
    try:
        return SharedMemoryObject(open_only, name, read_only)
    except RegionNotFoundError:
        print(f"client: there is no shared memory object {name!r}: starting the server", flush=True)
        subprocess.run([sys.executable, SERVER, "--leave", "--name", name], check=True)
        return SharedMemoryObject(open_only, name, read_only)


def main() -> int:
    """Check what the server wrote."""
    parser = argparse.ArgumentParser(description="Open shared memory, and check that it is full of ones.")
    parser.add_argument("--name", default="forkshm-example", help="of the object (%(default)s)")
    name = parser.parse_args().name

    with open_object(name) as shm, MappedRegion(shm, read_only) as region:
        size = region.size
        wrong = size - bytes(region.buf).count(1)
    removed = SharedMemoryObject.remove(name)
    if wrong or not removed:
        print(f"client: {wrong:,} of {size:,} bytes are not 1; removed: {removed}", file=sys.stderr)
        return 1
    print(f"client: all {size:,} bytes that another program wrote are 1, and {name!r} is removed")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
