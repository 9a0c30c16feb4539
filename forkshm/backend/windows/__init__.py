"""The backend for Windows. Experimental."""

import sys

__all__ = ("WindowsBackend", "memory_status")

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

from forkshm.backend.windows._backend import WindowsBackend  # noqa: E402 - after the platform check
from forkshm.backend.windows._winapi import memory_status  # noqa: E402
