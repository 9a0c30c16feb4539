"""Statistics of the data that a pool has moved."""

from __future__ import annotations

import dataclasses

__all__ = ("PoolStatistics",)


@dataclasses.dataclass(frozen=True)
class PoolStatistics:
    """Counters of one pool since it was made, for both directions together."""

    tasks: int
    """Answered tasks, including failed ones; a chunk of a map is one task."""
    messages: int
    """Messages sent and received."""
    bytes_copied: int
    """Bytes of buffers and pickle streams that were copied into an arena."""
    bytes_shared: int
    """Bytes of buffers that were sent as descriptors."""
    workers_replaced: int
    """Workers that were replaced because they died or retired (``maxtasksperchild``)."""
