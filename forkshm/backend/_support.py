"""Which systems and Pythons are experimental."""

from __future__ import annotations

import sys
import sysconfig

__all__ = ("IS_FREE_THREADED", "experiments")

# Whether this Python was built without the global interpreter lock. The lock may still be enabled at run time.
IS_FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def experiments(system: str = sys.platform, *, is_free_threaded: bool = IS_FREE_THREADED) -> list[str]:
    """Return a clause for each experimental part of this system and this Python, with its consequences."""
    found = []
    if system == "win32":
        found.append("Windows is experimental: a selection of the tests passes under Wine, and none was run on Windows")
    elif system != "linux":
        found.append(
            f"{system} is experimental: the tests of the posix backend pass on Linux, and none was run on {system}"
        )
    if is_free_threaded:
        found.append(
            "free-threaded Python is experimental: the classic locks take microseconds instead of 50 ns, and "
            "shared_allocations() and born_shared raise UnsupportedError"
        )
    return found
