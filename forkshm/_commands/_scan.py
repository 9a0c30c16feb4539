"""What shared memory there is on this machine, as far as this user may look.

The kernel keeps no list. What is alive is held: by an fd, or by a mapping, of some process, and both are in ``/proc``,
for processes of the same user, and for root. Memory objects of forkshm carry a label and the pid of their creator in
their name; named objects are the files of ``/dev/shm``, whoever made them.
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

#: Where shm_open(3) keeps its objects.
SHM = "/dev/shm"  # noqa: S108 - not a temporary file: the kernel's directory

#: What Linux tells of processes.
PROC = "/proc"

#: In an fd's link and in maps: what ends in " (deleted)" has no name, or none any more.
_OURS = re.compile(r"/memfd:forkshm-(?P<kind>[a-z]+)(?:-(?P<pid>\d+))? \(deleted\)$")
_MAPS = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) \S+ (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+) +(?P<path>/(?:memfd:forkshm-|dev/shm/).*)$"
)


@dataclasses.dataclass
class Memory:
    """One memory object that is alive."""

    #: ``region``, ``arena`` (copies on their way, and warm memory for the next), or ``named``.
    kind: str
    #: Of a named one.
    name: str
    #: The process that made it; 0 where the kernel does not tell.
    creator: int = 0
    #: User id of the owner; -1 when unknown.
    owner: int = -1
    size: int = 0
    #: Bytes that take memory, in RAM or swapped out; None when nobody has an fd to ask.
    resident: int | None = None
    #: Seconds since the epoch: when it was made, as nearly as the kernel tells; 0 when it does not.
    made: float = 0.0
    #: Processes that have it open or mapped.
    holders: set[int] = dataclasses.field(default_factory=set)

    def note(self, status: os.stat_result) -> None:
        """Take over what stat(2) says."""
        assert sys.platform != "win32"  # looks into /proc
        self.size = status.st_size
        self.resident = status.st_blocks * 512
        self.owner = status.st_uid
        # There is no time of birth for these in stat(2), and none of the three goes back.
        self.made = min(status.st_atime, status.st_mtime, status.st_ctime)


@dataclasses.dataclass
class Scan:
    """What was found."""

    memory: list[Memory]
    #: Processes that could not be looked into: they may hold more, or the same.
    hidden: int


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def command_of(pid: int) -> str:
    """Return what a process runs, or "" when it has ended."""
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
    """Return when a process began, in seconds since the epoch; 0 when it has ended."""
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
                        if memory.resident is None:  # nobody has an fd so far: as much as is mapped
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
    """Look at all processes that this user may look into, and at the names.

    Raises:
        UnsupportedError: There is no ``/proc`` of Linux: nobody says what other processes have.
    """
    if os.name == "nt" or not os.path.exists(f"{PROC}/self/maps"):
        raise UnsupportedError(
            "what memory processes have is read from /proc, and this system has none; with FORKSHM_LEAKS=1 in the "
            "environment, a program says itself at its end what it still held",
            capability="proc",
        )
    found = _Found()
    for pid in _pids():
        try:
            found.look_at_maps(pid)
            found.look_at_fds(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except PermissionError:
            found.hidden += 1
    found.look_at_names()
    return Scan(sorted(found.by_identity.values(), key=lambda memory: (-memory.size, memory.name)), found.hidden)


def age_of(memory: Memory) -> float | None:
    """Return seconds since it was made, or None."""
    return time.time() - memory.made if memory.made else None
