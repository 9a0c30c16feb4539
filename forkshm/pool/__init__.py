"""Layer 5 of 6. Takes functions and arguments, hands on results: processes that do the work."""

from forkshm.errors import RemoteTraceback
from forkshm.pool._pool import Pool
from forkshm.pool._results import ApplyResult, AsyncResult, IMapIterator, IMapUnorderedIterator, MapResult
from forkshm.pool._statistics import PoolStatistics

__all__ = (
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "Pool",
    "PoolStatistics",
    "RemoteTraceback",
)
