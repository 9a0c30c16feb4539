"""What the doctor looks at on Windows."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from forkshm._commands._table import nbytes
from forkshm.backend import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm._commands.doctor import Finding

assert sys.platform == "win32"  # what the type checker needs to be told

from forkshm.backend.windows import memory_status  # noqa: E402 - after the platform check

__all__ = ("PARTS",)


def _limits() -> Iterator[Finding]:
    status = memory_status()
    yield "memory", f"{nbytes(status.available)} of {nbytes(status.total)} available", "", False
    yield (
        "memory and paging files",
        f"{nbytes(status.commit_available)} of {nbytes(status.commit_total)} not promised",
        "a region takes all of its size from it at once; beyond it, RegionCreateError (ENOMEM)",
        False,
    )
    yield "mappings start at", f"multiples of {nbytes(kernel.page_size)}", "which is what page_size() says", False
    yield "handles", "no limit that a program comes to", "each region is one, and each block of copies", False


def _names() -> Iterator[Finding]:
    try:
        folder = kernel.folder_of_named()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield "named objects", str(error), "no memory with a name; all other memory works", True
        return
    follows = "bounds SharedMemoryObject, and nothing else; FORKSHM_FOLDER says another folder"
    yield "named objects", f"{nbytes(free)} free in {folder}", follows, False


def _processes() -> Iterator[Finding]:
    usable = kernel.usable_cores()
    yield "cores", f"{usable} of {os.cpu_count() or 1}", f"Pool() starts {usable} workers", False


#: In the order in which they are told.
PARTS = (_limits, _names, _processes)
