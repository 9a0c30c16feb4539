"""What memory the control groups of this process have left."""

from __future__ import annotations

import os

#: Where the groups are; of the first version and the second.
_V1, _V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
_MEMBERSHIP = "/proc/self/cgroup"
_MACHINE = "/proc/meminfo"
#: Names of the limit and of what is used.
_FILES_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
_FILES_V2 = "memory.max", "memory.current"
#: What a group uses, and the kernel would take from it before it kills anybody.
_RECLAIMABLE = ("inactive_file ", "active_file ", "slab_reclaimable ")


def memory_left() -> int | None:
    """Return how many bytes can be had before the kernel kills for want of them, at most; None for no limit."""
    left = []
    try:
        with open(_MEMBERSHIP) as lines:
            memberships = [line.rstrip("\n").split(":", 2) for line in lines]
        for _, controllers, group in memberships:
            if not controllers:
                left += _left_of(_V2, group, *_FILES_V2)
            elif "memory" in controllers.split(","):
                left += _left_of(_V1, group, *_FILES_V1)
        return min(left) + _swap_free() if left else None
    except (OSError, ValueError):  # not mounted here, or not ours to read
        return None


def _left_of(mount: str, group: str, limit: str, used: str) -> list[int]:
    """Look at the group and those around it: all of their limits hold."""
    left = []
    while True:
        directory = f"{mount}{group.rstrip('/')}"
        # The root has no limit, and below it only what has the controller.
        if os.path.exists(f"{directory}/{limit}") and (bound := _number(f"{directory}/{limit}")) is not None:
            with open(f"{directory}/memory.stat") as lines:
                reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith(_RECLAIMABLE))
            left.append(bound - (_number(f"{directory}/{used}") or 0) + reclaimable)
        if group in ("", "/"):
            return left
        group = os.path.dirname(group)


def _number(path: str) -> int | None:
    with open(path) as file:
        text = file.read().strip()
    return None if text == "max" else int(text)


def _swap_free() -> int:
    with open(_MACHINE) as lines:
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapFree:"))
