"""Layer 1 of 6. Takes what the kernel offers, hands on bytes mapped in this process.

Regions are what users ask for and hold; the arena is memory that forkshm carves up
itself to carry copies. Both end when the kernel sees that nobody uses them.
"""

from forkshm.region._anonymous import anonymous_shared_memory
from forkshm.region._mapped import MappedRegion, Mode

__all__ = ("MappedRegion", "Mode", "anonymous_shared_memory")
