"""Segments, blocks and leases: the memory that carries copies from one process to another.

A process carves blocks out of its segments (`arena`). The kernel counts the processes that can see a block (`Lease`,
`Claim`), and the block is reused only when there is none.
"""

from forkshm._help import publish
from forkshm.region.blocks._arena import KEEP_WARM, Block, arena
from forkshm.region.blocks._decay import EMPTY_SECONDS, is_short
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
    "EMPTY_SECONDS",
    "KEEP_WARM",
    "Block",
    "Claim",
    "Hold",
    "Lease",
    "Share",
    "arena",
    "claim",
    "claim_at",
    "forget_abandoned",
    "is_short",
    "leases_open",
    "segments_held",
    "segments_mapped",
)

publish(globals())
