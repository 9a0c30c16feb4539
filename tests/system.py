"""System resources that tests inspect, by system. An fd is what ``fileno()`` of forkshm's objects returns."""

from __future__ import annotations

import ctypes  # noqa: TID251 - asks Windows
import os
import sys

from forkshm.backend import kernel

# Granularity of mappings.
PAGE = os.sysconf("SC_PAGE_SIZE")

# The folder of named memory; `path_of_named` returns the file of a name.
SHM = "/dev/shm"


def open_fds():
    """Return the fds of this process, except those that another thread opens for a moment.

    The thread that gives memory back reads files of the kernel. On Windows, only handles that can be memory stay.
    """
    if sys.platform == "win32":
        return sorted(number for number, _ in kernel.handles())
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # it was closed, as the one that listed the directory
        if not target.startswith(("/proc/", "/sys/")):
            found.append(number)
    return sorted(found)


def is_mapped(address):
    """Return whether memory is mapped at an address."""
    if sys.platform == "win32":
        return _state(address) != _FREE
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=1)[0].split("-") for line in maps]
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def path_of_named(name):
    """Return the file of named memory."""
    return kernel._path_of(name) if sys.platform == "win32" else f"{SHM}/{name}"


def in_pages(value):
    """Return a name for a size near to a few pages, for ``ids`` of parametrize, so that it is the same everywhere."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    count, rest = divmod(value + 10, PAGE)
    rest -= 10
    if not 0 < abs(count) <= 12 or rest > 10:
        return None
    unit = "page" if abs(count) == 1 else "pages"
    return f"{count} {unit}{rest:+}" if rest else f"{count} {unit}"


_FREE = 0x10000


class _MemoryBasicInformation(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("allocation", ctypes.c_void_p),
        ("protection_then", ctypes.c_uint32),
        ("partition", ctypes.c_uint16),
        ("size", ctypes.c_size_t),
        ("state", ctypes.c_uint32),
        ("protection", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
    )


def _state(address):
    found = _MemoryBasicInformation()
    query = ctypes.windll.kernel32.VirtualQuery
    query.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    assert query(address, ctypes.byref(found), ctypes.sizeof(found))
    return found.state
