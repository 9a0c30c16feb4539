"""Regions in the queues and executors of the standard library.

Their pipes carry bytes only, so a `RegionDescriptor` is sent. It names the memory and does not hold it. The sender
holds the memory, through an fd of its own, until the receiver acknowledges it:

    sender                                          receiver
    duplicate the fd; take a receipt, a word of
    memory that both can see
    pickle: descriptor, receipt          ------->   open the memory, then sign the receipt
    at a later send: close the fd if signed

Memory that is never received is held until the sender ends.
"""

from __future__ import annotations

import dataclasses
import multiprocessing.reduction
from typing import Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import Identity, kernel
from forkshm.descriptor import RegionDescriptor, describe
from forkshm.errors import NotPicklableError
from forkshm.region import MappedRegion, Mode, anonymous_shared_memory

__all__ = ("Passage", "forget_received", "reduce_region", "register_foreign", "send_region", "take_region")

_WORD = 8
# Memory that is not acknowledged, beyond so many receipts, is held until the process ends.
_RECEIPTS = 128 * 1024


@dataclasses.dataclass(frozen=True)
class Passage:
    """A region on its way through a foreign channel."""

    region: RegionDescriptor
    receipts: RegionDescriptor | None
    """Memory in which the receiver signs; None if there was no room for another receipt."""
    receipt: int
    signature: int
    """The value that the receiver writes there. It is unique, so that a reused receipt does not count as signed."""


@dataclasses.dataclass
class _Held:
    """A memory object that was sent to others."""

    fd: int
    passages: int


class _Outstanding:
    """Memory that this process has sent and no receiver has acknowledged."""

    def __init__(self) -> None:
        # The feeder threads of the standard library take this lock, too.
        self._lock = _interrupts.Lock()
        self._held: dict[Identity, _Held] = {}
        # By receipt number: the signature that is awaited, and the memory object.
        self._waiting: dict[int, tuple[int, Identity]] = {}
        self._receipts: MappedRegion | None = None
        self._free: list[int] = []
        self._next_signature = 1
        self._sends_until_sweep = 0

    def send(self, region: MappedRegion) -> Passage:
        descriptor = describe(region)
        identity = (descriptor.device, descriptor.inode)
        with self._lock:
            self._sends_until_sweep -= 1
            if self._sends_until_sweep <= 0:
                self._sweep()
            if self._receipts is None:
                self._receipts = anonymous_shared_memory(_RECEIPTS * _WORD)
            held = self._held.get(identity)
            if held is None:
                held = _Held(-1, 0)
                # No call between the creation of the fd and the last of these stores.
                held.fd = kernel.duplicate(descriptor.fd)
                self._held[identity] = held
            descriptor = dataclasses.replace(descriptor, fd=held.fd)
            number = self._free[-1] if self._free else len(self._waiting)
            if number >= _RECEIPTS:
                held.passages += 1
                return Passage(descriptor, None, 0, 0)
            signature = self._next_signature
            passage = Passage(descriptor, describe(self._receipts), number, signature)
            # No call from here on.
            if self._free:
                del self._free[-1]
            self._next_signature = signature + 1
            held.passages += 1
            self._waiting[number] = signature, identity
            return passage

    def sweep(self) -> None:
        with self._lock:
            self._sweep()

    def _sweep(self) -> None:
        if self._receipts is not None:
            with memoryview(self._receipts.buf).cast("Q") as words:
                signed = list(filter(lambda number: words[number] == self._waiting[number][0], self._waiting))
            for number in signed:
                _, identity = self._waiting.pop(number)
                self._free.append(number)
                held = self._held[identity]
                held.passages -= 1
                if not held.passages:
                    kernel.close(held.fd)
                    del self._held[identity]
            if not self._waiting:
                self._receipts = None
                self._free.clear()
        # Proportional to the number of waiting receipts, so that sends stay fast while many wait.
        self._sends_until_sweep = len(self._waiting) // 8

    def in_child(self) -> None:
        # The parent holds the memory that it has sent.
        for held in self._held.values():
            kernel.close(held.fd)
        self.__init__()  # type: ignore[misc]


_outstanding = _Outstanding()
_system.register_at_fork(after_in_child=_outstanding.in_child)


def forget_received() -> None:
    """Release the memory that was received since the last send."""
    _outstanding.sweep()


def send_region(region: MappedRegion) -> Passage:
    """Hold a region for others, and return the message that names it.

    Raises:
        NotPicklableError: Only this process sees what is written to the region.
        OSError: The limit on open files is reached.
    """
    if region.mode is Mode.copy_on_write:
        raise NotPicklableError(
            f"cannot send {region!r}: only this process sees what is written to it. Send bytes(region.buf) instead."
        )
    return _outstanding.send(region)


def take_region(passage: Passage) -> MappedRegion:
    """Map a region that was sent, and acknowledge it to the sender.

    Raises:
        RegionGoneError: The sender has ended; or the region was received before, and the sender has closed it.
        RegionCreateError: The kernel refused the mapping.
    """
    region = passage.region.attach()
    if passage.receipts is not None:
        receipts = passage.receipts.attach()
        with memoryview(receipts.buf).cast("Q") as words:
            words[passage.receipt] = passage.signature
    return region


def reduce_region(region: MappedRegion) -> Any:
    """Send a region through a pickler of the standard library's multiprocessing."""
    return take_region, (send_region(region),)


def register_foreign(kind: type, reduce: Any) -> None:
    """Register *reduce* for this type in the channels of the standard library and of multiprocess."""
    multiprocessing.reduction.ForkingPickler.register(kind, reduce)
    _multiprocess.reduction.ForkingPickler.register(kind, reduce)


register_foreign(MappedRegion, reduce_region)
