"""Checks of the doctor on Windows."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from forkshm._commands._table import nbytes
from forkshm.backend import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm._commands._table import Finding

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

from forkshm.backend.windows import memory_status  # noqa: E402 - after the platform check

__all__ = ("PARTS",)


def _limits() -> Iterator[Finding]:
    status = memory_status()
    yield "memory", f"{nbytes(status.available)} of {nbytes(status.total)} available", "", False
    yield (
        "memory and paging files",
        f"{nbytes(status.commit_available)} of {nbytes(status.commit_total)} not committed",
        "a region commits its whole size at once; beyond the limit, RegionCreateError (ENOMEM)",
        False,
    )
    yield "mappings start at", f"multiples of {nbytes(kernel.page_size)}", "page_size() returns this", False
    yield "handles", "no practical limit", "each region and each block of copies uses one", False


def _names() -> Iterator[Finding]:
    try:
        folder = kernel.folder_of_named()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield "named objects", str(error), "named memory is unavailable; all other memory works", True
        return
    follows = "limits only SharedMemoryObject; set FORKSHM_FOLDER for another folder"
    yield "named objects", f"{nbytes(free)} free in {folder}", follows, False


def _processes() -> Iterator[Finding]:
    usable = kernel.usable_cores()
    yield "cores", f"{usable} of {os.cpu_count() or 1}", f"Pool() starts {usable} workers", False


# Checks in the order of the report.
PARTS = (_limits, _names, _processes)
