"""Layer 0 of 6. The operations of this kernel.

Exports ``kernel``, an object with the few operations that all layers above are built from. Its contract is `Backend`.
The backend is chosen once, at import. It is deliberately not a plugin point: the environment variable
``FORKSHM_BACKEND`` is for tests.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from forkshm._help import publish
from forkshm.backend._capabilities import Capabilities, probe, refusals
from forkshm.backend._interface import UNKNOWN, Access, Advice, Backend, Identity, Locks, MessageSocket
from forkshm.backend._support import IS_FREE_THREADED, experiments
from forkshm.errors import UnsupportedError

__all__ = (
    "IS_FREE_THREADED",
    "UNKNOWN",
    "Access",
    "Advice",
    "Backend",
    "Capabilities",
    "Identity",
    "Locks",
    "MessageSocket",
    "capabilities",
    "experiments",
    "kernel",
    "locks",
    "native_locks",
)

# The backends that this system may have, the best first.
_BACKENDS = ("windows",) if os.name == "nt" else ("linux", "posix")


def _choose(find: Callable[[str], Capabilities]) -> tuple[Backend, Capabilities]:
    """Return the requested backend, or the first that this system supports, and the capabilities found."""
    wanted = os.environ.get("FORKSHM_BACKEND", "")
    if wanted not in ("", "linux", "posix"):
        raise UnsupportedError(
            f"the environment variable FORKSHM_BACKEND is {wanted!r}: it must be linux, posix, or not set",
            capability=wanted,
        )
    missing: list[str] = []
    for name in (wanted,) if wanted else _BACKENDS:
        found = find(name)
        missing = missing or found.missing(name)
        if found.missing(name):
            continue
        if sys.platform == "linux" and name == "linux":
            from forkshm.backend._linux import LinuxBackend

            return LinuxBackend(), found
        if sys.platform != "win32" and name == "posix":
            from forkshm.backend.posix import PosixBackend

            return PosixBackend(), found
        if sys.platform == "win32" and name == "windows":
            from forkshm.backend.windows import WindowsBackend

            return WindowsBackend(), found
    lacking = ", ".join(f"{name} ({refusals[name]})" if name in refusals else name for name in missing)
    needed = "Linux 5.3 or newer"
    if "shm_open" in refusals:
        needed = f"a shared memory folder (/dev/shm) that this user may write to, or {needed}"
    raise UnsupportedError(
        f"no usable backend: this system lacks {lacking}. forkshm needs {needed}",
        capability=missing[0],
    )


kernel: Backend
capabilities: Capabilities
"""The capabilities that the chosen backend needs, as found on this machine by trying them."""
# The backend of this process.
kernel, capabilities = _choose(probe)
locks: Locks = kernel.locks
"""The locks in shared memory of this backend."""


def _load_native_locks() -> Any:
    if sys.platform == "linux" and kernel.name == "linux":
        from forkshm.backend._native_locks import NativeLocks

        with contextlib.suppress(LookupError):
            return NativeLocks()
    return None


native_locks: Any = _load_native_locks()
"""Acquires and releases lock words in machine code; None where machine code cannot be used."""

publish(globals())
