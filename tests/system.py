"""What tests look at, where each system shows it. An fd is what ``fileno()`` of forkshm's objects returns."""

from __future__ import annotations

import ctypes  # noqa: TID251 - asks Windows
import os
import sys

from forkshm.backend import kernel

# What mappings start at multiples of.
PAGE = os.sysconf("SC_PAGE_SIZE")

# Where memory with a name is: whoever looks into it asks `path_of_named`.
SHM = "/dev/shm"


def open_fds():
    """Numbers of what this process has open; of what can be memory, where handles come and go."""
    if sys.platform == "win32":
        return sorted(number for number, _ in kernel.handles())
    return sorted(os.listdir("/proc/self/fd"))


def is_mapped(address):
    """Whether there is memory at an address."""
    if sys.platform == "win32":
        return _state(address) != _FREE
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=1)[0].split("-") for line in maps]
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def path_of_named(name):
    """Return the file of memory with a name."""
    return kernel._path_of(name) if sys.platform == "win32" else f"{SHM}/{name}"


def in_pages(value):
    """Name a size near to a few pages by these, for ``ids`` of parametrize: so it is called the same everywhere."""
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
