"""The limits of control groups: memory that is left, and CPU quotas."""

from __future__ import annotations

import contextlib
import math
import os

# Mount points of the groups: version 1 and version 2.
_V1, _V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
_V1_CPU = "/sys/fs/cgroup/cpu"
_MEMBERSHIP = "/proc/self/cgroup"
_MACHINE = "/proc/meminfo"
# File names of the limit and of the usage.
_FILES_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
_FILES_V2 = "memory.max", "memory.current"
# Entries of memory.stat for memory that the kernel reclaims before it kills a process of the group.
_RECLAIMABLE = ("inactive_file ", "active_file ", "slab_reclaimable ")


def memory_left() -> int | None:
    """Return the maximum bytes available before the kernel kills a process for memory; None for no limit."""
    left = []
    try:
        for _, controllers, group in _memberships():
            if not controllers:
                left += _left_of(_V2, group, *_FILES_V2)
            elif "memory" in controllers.split(","):
                left += _left_of(_V1, group, *_FILES_V1)
        return min(left) + _swap_free() if left else None
    except (OSError, ValueError):  # not mounted here, or not readable by this user
        return None


def cpu_quota() -> float | None:
    """Return the average number of cores that this process's control groups allow; None for no limit."""
    quotas: list[float] = []
    try:
        for _, controllers, group in _memberships():
            if not controllers:
                quotas += _quotas(_V2, group, "cpu.max")
            elif "cpu" in controllers.split(","):
                quotas += _quotas(_V1_CPU, group, "cpu.cfs_quota_us", "cpu.cfs_period_us")
    except (OSError, ValueError):  # not mounted here, or not readable by this user
        return None
    return min(quotas, default=None)


def _memberships() -> list[list[str]]:
    """Return the lines of ``/proc/self/cgroup``: number, controllers and group."""
    return [line.split(":", 2) for line in _text(_MEMBERSHIP).splitlines()]


def _text(path: str) -> str:
    # Each pool reads several of these small files. A text file object would take three times as long.
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall())


def _quotas(mount: str, group: str, *files: str) -> list[float]:
    """Return the quotas of a group and of its parents; all of them apply."""
    quotas = []
    while True:
        directory = f"{mount}{group.rstrip('/')}"
        # In a container the group's name may not exist here; the mounted root is the container's group.
        with contextlib.suppress(FileNotFoundError):
            words = [word for name in files for word in _text(f"{directory}/{name}").split()]
            if words[0] not in ("max", "-1") and len(words) > 1 and int(words[1]) > 0:
                quotas.append(int(words[0]) / int(words[1]))
        if group in ("", "/"):
            return quotas
        group = os.path.dirname(group)


def _left_of(mount: str, group: str, limit: str, used: str) -> list[int]:
    """Return the bytes left in a group and in its parents; all of their limits apply."""
    left = []
    while True:
        directory = f"{mount}{group.rstrip('/')}"
        # The root has no limit; below it, only groups with the controller have one.
        if os.path.exists(f"{directory}/{limit}") and (bound := _number(f"{directory}/{limit}")) is not None:
            lines = _text(f"{directory}/memory.stat").splitlines()
            reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith(_RECLAIMABLE))
            left.append(bound - (_number(f"{directory}/{used}") or 0) + reclaimable)
        if group in ("", "/"):
            return left
        group = os.path.dirname(group)


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return None if text == "max" else int(text)


def _swap_free() -> int:
    lines = _text(_MACHINE).splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapFree:"))


def within_quota(cores: int) -> int:
    """Return the number of *cores* that the control groups let this process keep busy, at least 1."""
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))
