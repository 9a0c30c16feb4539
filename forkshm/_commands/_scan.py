"""Scan for live shared memory on this machine, as far as this user may see it.

The kernel keeps no list. Live memory is held by an fd or a mapping of a process, and ``/proc`` shows both for processes
of the same user, and for all processes to root. The name of forkshm's memory objects has a label and the pid of the
creator. Named objects are the files in ``/dev/shm``, regardless of their creator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import sys
import time
from typing import TYPE_CHECKING

from forkshm.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("SHM", "Memory", "Scan", "age_of", "began", "command_of", "scan")

# The directory of shm_open(3).
SHM = "/dev/shm"  # noqa: S108 - not a temporary file: the kernel's directory

# Linux's directory of processes.
PROC = "/proc"

# Paths in fd links and maps. The suffix " (deleted)" marks memory without a name, or whose name was removed.
_OURS = re.compile(r"/memfd:forkshm-(?P<kind>[a-z]+)(?:-(?P<pid>\d+))? \(deleted\)$")
_MAPS = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) \S+ (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+) +(?P<path>/(?:memfd:forkshm-|dev/shm/).*)$"
)


@dataclasses.dataclass
class Memory:
    """One live memory object."""

    kind: str
    """``region``, ``arena`` (copies in flight, and memory kept for the next copies), or ``named``."""
    name: str
    """Name of a named object; empty for others."""
    creator: int = 0
    """Pid of the creator; 0 if unknown."""
    owner: int = -1
    """User id of the owner; -1 if unknown."""
    size: int = 0
    """Size in bytes."""
    resident: int | None = None
    """Bytes in RAM or swap; None if no process has an fd of the object."""
    made: float = 0.0
    """Approximate time of creation, in seconds since the epoch; 0 if unknown."""
    holders: set[int] = dataclasses.field(default_factory=set)
    """Pids of the processes that have the object open or mapped."""

    def note(self, status: os.stat_result) -> None:
        """Set the fields known from stat(2)."""
        assert sys.platform != "win32"  # looks into /proc
        self.size = status.st_size
        self.resident = status.st_blocks * 512
        self.owner = status.st_uid
        # stat(2) has no creation time for these objects. The oldest of the three times is the closest.
        self.made = min(status.st_atime, status.st_mtime, status.st_ctime)


@dataclasses.dataclass
class Scan:
    """Result of a scan."""

    memory: list[Memory]
    """The memory objects found, the largest first."""
    hidden: int
    """Number of processes that could not be inspected; they may hold these or other objects."""


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def command_of(pid: int) -> str:
    """Return the command line of a process, or "" if it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    line = os.fsdecode(b" ".join(words)) if words != [b""] else ""
    if not line:  # a zombie or a thread of the kernel
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
            line = f"({file.read().strip()})"
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def began(pid: int) -> float:
    """Return the start time of a process in seconds since the epoch, or 0 if it has ended."""
    assert sys.platform != "win32"  # looks into /proc
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        with open("/proc/stat") as times:
            booted = next(int(line.split()[1]) for line in times if line.startswith("btime "))
    except (OSError, StopIteration, IndexError):
        return 0.0
    return booted + ticks / os.sysconf("SC_CLK_TCK")


class _Found:
    def __init__(self) -> None:
        self.by_identity: dict[tuple[int, int], Memory] = {}
        self.hidden = 0

    def memory_at(self, identity: tuple[int, int], path: str) -> Memory | None:
        known = self.by_identity.get(identity)
        if known is None:
            if match := _OURS.search(path):
                known = Memory(match["kind"], "", creator=int(match["pid"] or 0))
            elif path.startswith(SHM + "/"):
                known = Memory("named", path[len(SHM) + 1 :])
            else:
                return None
            self.by_identity[identity] = known
        return known

    def look_at_fds(self, pid: int) -> None:
        folder = f"/proc/{pid}/fd"
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed meanwhile
                path = os.readlink(f"{folder}/{name}")
                if not path.startswith(("/memfd:forkshm-", SHM + "/")):
                    continue
                status = os.stat(f"{folder}/{name}")
                memory = self.memory_at((status.st_dev, status.st_ino), path)
                if memory is not None:
                    memory.note(status)
                    memory.holders.add(pid)

    def look_at_maps(self, pid: int) -> None:
        assert sys.platform != "win32"  # looks into /proc
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as maps:
            for line in maps:
                if match := _MAPS.match(line.rstrip("\n")):
                    device = os.makedev(int(match["major"], 16), int(match["minor"], 16))
                    memory = self.memory_at((device, int(match["inode"])), match["path"])
                    if memory is not None:
                        memory.holders.add(pid)
                        if memory.resident is None:  # no fd found so far: estimate the size from the mapping
                            end = int(match["end"], 16) - int(match["start"], 16) + int(match["offset"], 16)
                            memory.size = max(memory.size, end)

    def look_at_names(self) -> None:
        with contextlib.suppress(OSError), os.scandir(SHM) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        path = f"{SHM}/{entry.name}"
                        memory = self.memory_at((status.st_dev, status.st_ino), path)
                        if memory is not None:
                            memory.note(status)


def scan() -> Scan:
    """Return the memory of all processes that this user may inspect, and all named memory.

    Raises:
        UnsupportedError: The system has no ``/proc`` of Linux, so other processes cannot be inspected.
    """
    if os.name == "nt" or not os.path.exists(f"{PROC}/self/maps"):
        raise UnsupportedError(
            "cannot list the memory of processes: this system has no /proc of Linux. Set FORKSHM_LEAKS=1 to let a "
            "program report at its end what it still holds.",
            capability="proc",
        )
    found = _Found()
    for pid in _pids():
        try:
            found.look_at_maps(pid)
            found.look_at_fds(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
        except PermissionError:
            found.hidden += 1
    found.look_at_names()
    return Scan(sorted(found.by_identity.values(), key=lambda memory: (-memory.size, memory.name)), found.hidden)


def age_of(memory: Memory) -> float | None:
    """Return the age of the memory in seconds, or None if unknown."""
    return time.time() - memory.made if memory.made else None
