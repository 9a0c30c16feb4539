"""Names made by a family of processes, which the first process of the family removes when it ends.

A family is a process that was not started by forkshm, with its children and their descendants. It is identified by a
random tag that each process receives from its parent. Each process records the names it made in a file of its own
beside the objects. A line has the number of the object and its name, so that another object of that name is left alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
from typing import Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import kernel
from forkshm.region._object import SharedMemoryObject, checked_name

__all__ = ("begin", "forget", "forget_removed", "note", "was_removed_at_exit")

# The key in the data that multiprocess passes to every child, with any start method.
_KEY = "forkshm_family"


def _config() -> dict[str, Any]:
    config: dict[str, Any] = _multiprocess.process.current_process()._config  # type: ignore[attr-defined]
    return config


def _folder() -> str:
    folder = kernel.folder_of_named()
    if os.path.isdir(folder):
        return folder
    import tempfile  # local, because most programs that import forkshm do not need it

    return tempfile.gettempdir()


def _prefix() -> str:
    return f"forkshm-names-{_config()[_KEY]}-"


def _file() -> str:
    return os.path.join(_folder(), f"{_prefix()}{os.getpid()}")


def begin() -> None:
    """Found a family, unless this process will become a member of another one."""
    _config().setdefault(_KEY, secrets.token_hex(8))
    atexit.register(_remove_all, os.getpid())


class _Notes:
    """Names that this process made and did not remove, each with its number. Removing them needs no fd."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.lines = 0


_notes = _Notes()
_system.register_at_fork(after_in_child=_notes.__init__)  # type: ignore[misc]
# A file with this many obsolete lines is rewritten.
_TOO_MANY = 1000


def note(opened: SharedMemoryObject) -> None:
    """Record the name, so that it is removed when the family ends."""
    number = _number(opened)
    _notes.numbers[opened.name] = number
    _write(_line(number, opened.name))
    _notes.lines += 1
    if _notes.lines > 2 * len(_notes.numbers) + _TOO_MANY:
        _write_anew()


def forget(name: str) -> None:
    """Record that a name was removed."""
    if _notes.numbers.pop(name, None) is not None and not _notes.numbers:
        with contextlib.suppress(OSError):
            os.unlink(_file())
        _notes.lines = 0


def forget_removed() -> None:
    """Record which names were removed by other processes."""
    for name, number in list(_notes.numbers.items()):
        if not _is_there(number, name):
            forget(name)


def _line(number: str, name: str) -> bytes:
    return f"{number} {name}\n".encode(errors="surrogateescape")


def _write(lines: bytes, path: str | None = None) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    fds: list[int] = []
    try:
        fds.extend(map(os.open, (path or _file(),), (flags,), (0o600,)))
        os.write(fds[0], lines)
    finally:
        if fds:
            os.close(fds[0])


def _write_anew() -> None:
    # Names that other processes have removed are dropped, too.
    left = {name: number for name, number in list(_notes.numbers.items()) if _is_there(number, name)}
    new = f"{_file()}.new"
    _write(b"".join(_line(number, name) for name, number in left.items()), new)
    os.replace(new, _file())
    _notes.numbers, _notes.lines = left, len(left)


def _number(opened: SharedMemoryObject) -> str:
    (device, inode), _ = kernel.identify(opened.fileno())
    return f"{device}:{inode}"


@_interrupts.promptly
def _remove_all(pid: int) -> None:
    _interrupts.repeat(lambda: _remove_names(pid))


def _remove_names(pid: int) -> None:
    if os.getpid() != pid or _multiprocess.process.parent_process() is not None:
        return
    with _interrupts.held_back():
        for name, number in _notes.numbers.items():
            _remove(number, name)
        with contextlib.suppress(OSError):
            os.unlink(_file())
        with contextlib.suppress(OSError):
            for file in os.listdir(_folder()):
                if not file.startswith(_prefix()):
                    continue
                _remove_listed(os.path.join(_folder(), file))


def _remove_listed(path: str) -> None:
    with contextlib.suppress(OSError):
        with open(path, errors="surrogateescape") as names:
            lines = names.read().splitlines()
        for line in lines:
            number, _, name = line.partition(" ")
            _remove(number, name)
        os.unlink(path)


# Names that this process removed because it ends.
_removed_at_exit: set[str] = set()


def was_removed_at_exit(name: str) -> bool:
    """Return whether the name was removed because this process ends."""
    return name in _removed_at_exit


def _remove(number: str, name: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if _is_there(number, name):
            _removed_at_exit.add(name)
            SharedMemoryObject.remove(name)


def _is_there(number: str, name: str) -> bool:
    """Return whether the name still belongs to the object with that number."""
    folder = kernel.folder_of_named()
    with contextlib.suppress(OSError, ValueError):
        if os.path.isdir(folder) and kernel.name != "windows":
            status = os.lstat(os.path.join(folder, checked_name(name)))
            return f"{status.st_dev}:{status.st_ino}" == number
        with SharedMemoryObject("open_only", name, "read_only") as there:
            return _number(there) == number
    return False
