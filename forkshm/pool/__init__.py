"""Layer 5 of 6. Takes functions and arguments, hands on results: processes that do the work.

What else ``multiprocessing.pool`` has is here, too, and is that of ``multiprocess``.
"""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.errors import RemoteTraceback
from forkshm.pool._imap import IMapIterator, IMapUnorderedIterator
from forkshm.pool._pool import Pool
from forkshm.pool._report import PoolReport, SlowTask, WorkerReport
from forkshm.pool._results import ApplyResult, AsyncResult, MapResult
from forkshm.pool._statistics import PoolStatistics
from forkshm.pool._worker_state import worker_state

if TYPE_CHECKING:
    from multiprocessing.pool import ThreadPool

__all__ = (
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "Pool",
    "PoolReport",
    "PoolStatistics",
    "RemoteTraceback",
    "SlowTask",
    "ThreadPool",
    "WorkerReport",
    "worker_state",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("pool", globals())
