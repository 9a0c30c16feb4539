"""The backend for any POSIX system: it uses nothing that macOS and the BSDs lack. Experimental."""

import sys

__all__ = ("PosixBackend",)

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend.posix._backend import PosixBackend  # noqa: E402 - after the platform check
