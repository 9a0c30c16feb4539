"""Layer 0 of 6. What this kernel can do.

Hands on ``kernel``: one object with the few operations that everything above is built
from. The contract is `Backend`; the reader sees it before any operating system. The
choice is made once, at import, and is deliberately not a plugin point.
"""

from forkshm.backend._capabilities import Capabilities, probe
from forkshm.backend._interface import Access, Advice, Backend, Identity
from forkshm.backend._linux import LinuxBackend
from forkshm.errors import UnsupportedError

__all__ = ("Access", "Advice", "Backend", "Capabilities", "Identity", "capabilities", "kernel")


def _choose(found: Capabilities) -> Backend:
    missing = found.missing()
    if missing:
        raise UnsupportedError(
            f"forkshm needs {', '.join(missing)} and this system has not: Linux 5.3 or newer is required",
            capability=missing[0],
        )
    return LinuxBackend()


#: What was found on this machine, by trying.
capabilities: Capabilities = probe()
#: The backend of this process.
kernel: Backend = _choose(capabilities)
