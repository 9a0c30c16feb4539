"""Segments, blocks and leases: the memory that carries copies from one process to another.

A process carves blocks out of its segments (`arena`). The kernel counts the processes that can see a block (`Lease`,
`Claim`), and the block is reused only when there is none.
"""

from forkshm._help import publish
from forkshm.region.blocks import _fork  # noqa: F401 - first, so that its hooks run before those of the arena
from forkshm.region.blocks._arena import KEEP_WARM, Block, arena
from forkshm.region.blocks._claim import Claim, Hold, Share, claim, claim_at
from forkshm.region.blocks._decay import EMPTY_SECONDS, is_short
from forkshm.region.blocks._lease import Lease, leases_open
from forkshm.region.blocks._segment import forget_abandoned, segments_held, segments_mapped

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
