"""Memory without a name, shared with a forked child. There is no name to choose, and nothing to remove.

The child fills the memory with ones, and the parent sees them. Memory is freed when the last process that has it closes
it or ends, in any way: here the child kills itself, and neither the ones nor anything else is lost.

    pip install forkshm
    python examples/anonymous_memory.py
"""

from __future__ import annotations

import os
import signal
import sys

from forkshm import anonymous_shared_memory


def main() -> int:
    """Share 1,000 bytes with a child."""
    with anonymous_shared_memory(1000) as region:
        print(f"parent {os.getpid()}: {region.size:,} bytes at {region.address:#x}, all {region.buf[0]}", flush=True)
        child = os.fork()
        if child == 0:
            region.buf[:] = b"\1" * region.size
            os.kill(os.getpid(), signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ones = bytes(region.buf).count(1)
        if ones != region.size or os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            print(f"anonymous_memory: only {ones:,} of {region.size:,} bytes are 1", file=sys.stderr)
            return 1
        print(
            f"parent {os.getpid()}: child {child} wrote all {ones:,} bytes, was killed, and left them and nothing else"
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
