"""Finds out whether the kernel's out-of-memory killer has killed a worker, by its counters."""

from __future__ import annotations

import contextlib
import os

__all__ = ("OomKills",)

# The directories of control groups and their limits, for the first and the second version.
_GROUPS_V1, _GROUPS_V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
_MEMBERSHIP = "/proc/self/cgroup"
_MACHINE = "/proc/vmstat"


class OomKills:
    """Counters of the kernel's OOM killer, as they were when this object was made."""

    def __init__(self) -> None:
        counts = _counted(_counts_of_group())
        # A group's counter covers its processes, whichever limit was hit. The machine's counter also covers others.
        self._before = counts or _counted([_MACHINE])

    def hint(self) -> str | None:
        """Return an explanation for a worker that was killed by SIGKILL, or None."""
        if not self._before:
            return None
        rose = {path: now for path, before in self._before.items() if (now := _count(path) or 0) > before}
        for path, now in rose.items():
            before = self._before[path]
            # Each kill explains one death.
            self._before.update((counter, self._before[counter] + 1) for counter in rose)
            sure = "the" if path != _MACHINE else "probably the"
            return f"{sure} kernel's out-of-memory killer: oom_kill in {path} rose from {before} to {now} meanwhile"
        return f"not by the out-of-memory killer: oom_kill in {next(iter(self._before))} did not change"


def _counted(paths: list[str]) -> dict[str, int]:
    return {path: count for path in paths if (count := _count(path)) is not None}


def _counts_of_group() -> list[str]:
    paths = []
    with contextlib.suppress(OSError):
        for line in _lines(_MEMBERSHIP):
            _, controllers, group = line.split(":", 2)
            group = group.rstrip("/")
            if not controllers:
                paths.append(f"{_GROUPS_V2}{group}/memory.events")
            elif "memory" in controllers.split(","):
                paths.append(f"{_GROUPS_V1}{group}/memory.oom_control")
    return paths


def _count(path: str) -> int | None:
    try:
        for line in _lines(path):
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass  # not mounted here, or not readable
    return None


def _lines(path: str) -> list[str]:
    # Called for each new pool. Reading without a text layer takes half the time.
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall()).splitlines()
