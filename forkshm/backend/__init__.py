"""Layer 0 of 6. What this kernel can do.

Hands on ``kernel``: one object with the few operations that everything above is built
from. The contract is `Backend`; the reader sees it before any operating system. The
choice is made once, at import, and is deliberately not a plugin point.
"""

import os
import sys

from forkshm.backend._capabilities import Capabilities, probe
from forkshm.backend._interface import Access, Advice, Backend, Identity, Locks, MessageSocket
from forkshm.errors import UnsupportedError

__all__ = (
    "Access",
    "Advice",
    "Backend",
    "Capabilities",
    "Identity",
    "Locks",
    "MessageSocket",
    "capabilities",
    "kernel",
    "locks",
)


def _choose(found: Capabilities) -> Backend:
    if sys.platform == "win32":
        from forkshm.backend._windows import WindowsBackend

        return WindowsBackend()
    wanted = os.environ.get("FORKSHM_BACKEND", "")
    if wanted not in ("", "linux"):
        raise UnsupportedError(f"FORKSHM_BACKEND is {wanted!r}, and must be linux, or not set", capability=wanted)
    missing = found.missing()
    if missing:
        raise UnsupportedError(
            f"forkshm needs {', '.join(missing)} and this system has not: Linux 5.3 or newer is required",
            capability=missing[0],
        )
    from forkshm.backend._linux import LinuxBackend

    return LinuxBackend()


#: What was found on this machine, by trying.
capabilities: Capabilities = probe()
#: The backend of this process.
kernel: Backend = _choose(capabilities)
#: Its locks in shared memory.
locks: Locks = kernel.locks
