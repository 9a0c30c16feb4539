"""RegionDescriptor: a region named by process, fd and kernel identity."""

from __future__ import annotations

import dataclasses
import errno
import os

from forkshm.backend import kernel
from forkshm.errors import RegionGoneError
from forkshm.region import MappedRegion, Mode, attach, map_refused, region_of

__all__ = ("RegionDescriptor", "describe")


@dataclasses.dataclass(frozen=True)
class RegionDescriptor:
    """The name of a region of a living process, in a few dozen bytes that can be pickled.

    Forkshm's own channels carry the kernel's handle with the message and need no
    descriptor of this kind. It can go through any channel, to any process of the
    same user on the same machine. It does not keep the memory alive: it can be attached
    while the process that created it keeps the region open.

    Attributes:
        pid: The process that holds the region open.
        start_time: Start time of that process, to detect a reused pid.
        fd: The fd by which that process knows the memory object.
        device: Device number of the object; with *inode*, it detects a reused fd.
        inode: Inode number of the object.
        offset: Start of the region in the object, in bytes.
        size: Size of the region in bytes.
        mode: The access that the region allows.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> region = anonymous_shared_memory(3)
        >>> descriptor = describe(region)
        >>> region.buf[:] = b"abc"
        >>> bytes(descriptor.attach().buf)
        b'abc'
    """

    pid: int
    start_time: int
    fd: int
    device: int
    inode: int
    offset: int
    size: int
    mode: Mode

    def attach(self) -> MappedRegion:
        """Return the region mapped in this process, mapping it if necessary.

        Raises:
            RegionGoneError: The process ended or closed the region, or this process may
                not access it; the message says which. Nothing was mapped.
            RegionCreateError: The kernel refused the mapping.
        """
        what = f"region of {self.size:,} bytes that process {self.pid} had as fd {self.fd}"
        identity = self.device, self.inode
        try:
            if kernel.start_time(self.pid) != self.start_time:
                raise RegionGoneError(f"cannot attach the {what}: that process ended, and its pid was used again")
            fd = kernel.open_remote(self.pid, self.fd, identity)
        except (FileNotFoundError, ProcessLookupError) as error:
            reason = "it closed the region" if kernel.is_running(self.pid) else "that process ended"
            raise RegionGoneError(
                f"cannot attach the {what}: {reason}. Keep the region open until it has been received."
            ) from error
        except PermissionError as error:
            raise RegionGoneError(f"cannot attach the {what}: this process may not access that process") from error
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise map_refused(error, self.size, self.mode) from error
            raise RegionGoneError(
                f"cannot attach the {what}: that fd is a different object now, so the region was closed. "
                "Keep the region open until it has been received."
            ) from error
        try:
            return region_of(*attach(fd, self.offset, self.size, self.mode))
        except ValueError as error:
            raise RegionGoneError(f"cannot attach the {what}: {error}") from error


def describe(region: MappedRegion) -> RegionDescriptor:
    """Return a descriptor of *region*, valid while this process keeps it open.

    Raises:
        RegionClosedError: The region was closed.
    """
    fd = region.fileno()
    (device, inode), _ = kernel.identify(fd)
    pid = os.getpid()
    return RegionDescriptor(
        pid=pid,
        start_time=kernel.start_time(pid),
        fd=fd,
        device=device,
        inode=inode,
        offset=region.offset,
        size=region.size,
        mode=region._mapping.sent_as,
    )
