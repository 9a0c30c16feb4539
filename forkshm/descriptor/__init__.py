"""Layer 2 of 6. Takes mapped bytes, hands on small values that name them.

Beside one of our own messages the kernel carries the fds, and the descriptor is an index
into them (`_tables`). A `RegionDescriptor` stands alone: it can go through any channel
and says so when its memory is gone.
"""

from forkshm.descriptor._region import RegionDescriptor, describe

__all__ = ("RegionDescriptor", "describe")
