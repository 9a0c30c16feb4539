"""List what this system supports, its limits, and the consequences for forkshm.

Examples:
  python -m forkshm doctor             a table; include it when you report a bug
  python -m forkshm doctor --strict    fail if something is missing, for example in CI
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import platform
import sys
from typing import TYPE_CHECKING

from forkshm import _system
from forkshm._commands._table import Finding, show
from forkshm.backend import IS_FREE_THREADED, capabilities, experiments, kernel
from forkshm.pool import installed

if sys.platform == "win32":
    from forkshm._commands._doctor_windows import PARTS
else:
    from forkshm._commands._doctor_unix import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("add_arguments", "findings", "run")

# Consequences of each backend.
_FOLLOWS = {
    "linux": "",
    "posix": "slower, without seals; memory can be sent only through forkshm's channels",
    "windows": "no fork: processes are spawned, and team, supervise and launch raise UnsupportedError",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to *parser*."""
    parser.add_argument("--strict", action="store_true", help="exit with code 1 if a finding is marked with !")


def _support() -> Iterator[Finding]:
    found = experiments()
    yield "supported", "no" if found else "yes", "; ".join(found), bool(found)
    if kernel.name == "posix" and sys.platform == "linux":
        yield "posix backend", "chosen on Linux", "for tests only: the linux backend is supported here", False


def _kernel() -> Iterator[Finding]:
    asked = os.environ.get("FORKSHM_BACKEND")
    yield "backend", f"{kernel.name}{' (FORKSHM_BACKEND)' if asked else ''}", _FOLLOWS[kernel.name], False
    for field in dataclasses.fields(capabilities):
        if field.metadata["needed"] == kernel.name:
            there = getattr(capabilities, field.name)
            yield field.name, "works" if there else "MISSING", "" if there else "forkshm cannot work", not there
    fd = kernel.create_memory(kernel.page_size, "probe")
    try:
        kernel.seal_writes(fd)
        yield "seals against writes", "work", "region.seal() is enforced by the kernel", False
    except OSError as error:
        yield "seals against writes", str(error.strerror), "region.seal() raises UnsupportedError", True
    finally:
        kernel.close(fd)
    try:
        kernel.own_pages(0, 0)
        yield "written pages", "reported", "received copies are sent on without copying again", False
    except OSError as error:
        yield (
            "written pages",
            str(error.strerror),
            "received copies that are sent on are copied again",
            True,
        )


def _python() -> Iterator[Finding]:
    born = platform.machine() == "x86_64" and sys.implementation.name == "cpython" and not IS_FREE_THREADED
    has_numpy = importlib.util.find_spec("numpy") is not None
    yield (
        "NumPy",
        "there" if has_numpy else "not installed",
        "shared arrays" if has_numpy else "regions without arrays: pip install 'forkshm[numpy]'",
        not has_numpy,
    )
    for library, module in installed() if _system.CAN_FORK else ():
        yield (
            library,
            f"there ({module})",
            "a forked worker may wait forever if this process has used it: use the start method forkserver",
            False,
        )
    yield (
        "arrays born shared",
        "possible" if born and has_numpy else "not here",
        "" if born and has_numpy else "shared_allocations and born_shared raise UnsupportedError",
        False,
    )


def findings() -> Iterator[Finding]:
    """Yield all findings."""
    version = f"forkshm {sys.modules['forkshm'].__version__}, Python {platform.python_version()}"
    yield "this is", f"{version}, {platform.system()} {platform.release()} {platform.machine()}", "", False
    for part in (_support, _kernel, *PARTS, _python):
        yield from part()


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    found = list(findings())
    show(
        ("", "what", "found", "so"),
        [["!" if lacks else "", what, there, follows] for what, there, follows, lacks in found],
    )
    return 1 if arguments.strict and any(lacks for *_, lacks in found) else 0
