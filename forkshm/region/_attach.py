"""Regions and mappings of memory that is already known: at an address, or named by a descriptor."""

from __future__ import annotations

from typing import Any

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.region._checks import map_refused
from forkshm.region._lifetime import guard
from forkshm.region._mapped import MappedRegion
from forkshm.region._table import (
    Mapping,
    Mode,
    borrow,
    give_back,
    lend,
    mapping_at,
    mapping_of,
    new_mapping,
)

__all__ = (
    "attach",
    "own_parts",
    "region_at",
    "region_of",
)


def own_parts(region: MappedRegion) -> list[tuple[int, int]]:
    """Return the ranges of a ``copy_on_write`` region on pages that this process has written.

    If the kernel cannot tell, the whole region is returned.

    Returns:
        Start and end offset of each range.
    """
    mapping = region._mapping
    try:
        runs = kernel.own_pages(*mapping.pages)
    except OSError:
        runs = [mapping.pages]
    start, end = mapping.address, mapping.address + mapping.size
    return [(max(first, start) - start, min(first + length, end) - start) for first, length in runs]


def region_of(mapping: Mapping, exporter: Any) -> MappedRegion:
    """Return the existing region of a live mapping, or a new one."""
    region: MappedRegion | None = mapping.region() if mapping.region is not None else None
    if region is None or region.closed:
        region = MappedRegion.__new__(MappedRegion)
        region._adopt(mapping, exporter)
    return region


def region_at(address: int) -> MappedRegion | None:
    """Return the region that contains *address* in this process, or None."""
    mapping = mapping_at(address)
    exporter = mapping.exporter() if mapping is not None and mapping.exporter is not None else None
    return None if mapping is None or exporter is None else region_of(mapping, exporter)


NOT_SEALED = (
    "cannot map received memory that is not sealed: its sender could shrink it later, which would kill this process "
    "(SIGBUS). Seal the memfd with F_SEAL_SHRINK before sending it."
)
"""Message for received memory that could shrink while it is mapped."""


@_interrupts.promptly
def attach(fd: int, offset: int, size: int, mode: Mode, *, borrowed: bool = False) -> tuple[Mapping, Any]:
    """Return a mapping of the memory that a descriptor names, existing or new.

    This function takes ownership of *fd*, even if it raises, unless *fd* is *borrowed*.

    Returns:
        The mapping and its exporter. Keep the exporter, which keeps the memory mapped.

    Raises:
        ValueError: The object is smaller than the descriptor says, or could shrink.
        RegionCreateError: The kernel refused.
    """
    known: int | None = None
    is_taken = False
    try:
        identity, whole = kernel.identify(fd)
        if offset < 0 or size < 1 or offset + size > whole:
            raise ValueError(
                f"cannot map bytes {offset:,} to {offset + size:,} of a descriptor: the object has only {whole:,} "
                "bytes. It was truncated after it was mapped. Map it again."
            )
        # An existing copy-on-write mapping may have private writes that the new holder must not see.
        found = mapping_of(identity, offset, size, mode) if mode is not Mode.copy_on_write else None
        if found is None:
            if kernel.may_shrink(fd, identity):
                raise ValueError(NOT_SEALED)
            with guard:
                # If another part of the object is mapped already, both mappings use one fd.
                known = borrow(identity, fd)
                if known is None and borrowed:
                    # The message and the mapping share the fd until the message is closed.
                    known = lend(fd)
            made = new_mapping(fd if known is None else known, identity, offset, size, mode)
            is_taken = True
            return made
    except OSError as error:
        raise map_refused(error, size, mode) from error
    finally:
        if known is not None and not is_taken:
            with guard:
                give_back(known)
        if not borrowed and not (known is None and is_taken):
            with guard:
                give_back(fd)
    return found
