"""The names that a family of processes has made, and that its first process removes when it ends.

A family is a process that nobody of ours has started, and all that it and its children have. It is known by a random
tag, which every process has from its parent. The names are in a file beside them: of each a line with the number of
the object, so that another one of that name is left alone, and the name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.region._object import SharedMemoryObject

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("begin", "note")

#: In what multiprocess hands on to every child, however it is started.
_KEY = "forkshm_family"


def _config() -> dict[str, Any]:
    config: dict[str, Any] = _multiprocess.process.current_process()._config  # type: ignore[attr-defined]
    return config


def _file() -> str:
    folder = kernel.folder_of_named()
    folder = folder if os.path.isdir(folder) else tempfile.gettempdir()
    return os.path.join(folder, f"forkshm-names-{_config()[_KEY]}")


def begin(at_exit: Callable[[Callable[[int], object], int], object]) -> None:
    """Found a family, unless this process gets to be of another one; *at_exit* registers what is done at the end."""
    _config().setdefault(_KEY, secrets.token_hex(8))
    at_exit(_remove_all, os.getpid())


def note(opened: SharedMemoryObject) -> None:
    """Have the name removed when the family ends."""
    line = f"{_number(opened)} {opened.name}\n".encode(errors="surrogateescape")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(_file(), flags, 0o600)
    try:
        os.write(fd, line)  # lines of several processes come one after the other: O_APPEND
    finally:
        os.close(fd)


def _number(opened: SharedMemoryObject) -> str:
    (device, inode), _ = kernel.identify(opened.fileno())
    return f"{device}:{inode}"


def _remove_all(pid: int) -> None:
    if os.getpid() != pid or _multiprocess.process.parent_process() is not None:
        return
    with contextlib.suppress(OSError):
        path = _file()
        with open(path, errors="surrogateescape") as names:
            lines = names.read().splitlines()
        os.unlink(path)
        for line in lines:
            number, _, name = line.partition(" ")
            with contextlib.suppress(OSError, ValueError), SharedMemoryObject("open_only", name, "read_only") as there:
                if _number(there) == number:
                    SharedMemoryObject.remove(name)
