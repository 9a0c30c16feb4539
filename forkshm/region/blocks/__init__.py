"""Segments, blocks and leases: the memory that carries copies from one process to another.

A process carves blocks out of its segments (`arena`); the kernel counts the processes that can see a block (`Lease`,
`Claim`), and a block is used again only when there is none.
"""

from forkshm.region.blocks._arena import Block, arena
from forkshm.region.blocks._segment import (
    Claim,
    Hold,
    Lease,
    Share,
    claim,
    claim_at,
    forget_abandoned,
    leases_open,
    segments_held,
    segments_mapped,
)

__all__ = (
    "Block",
    "Claim",
    "Hold",
    "Lease",
    "Share",
    "arena",
    "claim",
    "claim_at",
    "forget_abandoned",
    "leases_open",
    "segments_held",
    "segments_mapped",
)
