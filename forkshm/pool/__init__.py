"""Layer 5 of 6. Runs functions in worker processes, and returns their results.

Other names of ``multiprocessing.pool`` are here, too; they are those of ``multiprocess``.
"""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm._help import publish
from forkshm.errors import RemoteTraceback
from forkshm.pool._imap import IMapIterator, IMapUnorderedIterator
from forkshm.pool._pool import Pool, check_options
from forkshm.pool._results import ApplyResult, AsyncResult, MapResult, Outcome, chunked, delivering, first_of
from forkshm.pool._statistics import PoolStatistics
from forkshm.pool._taking import take_arguments
from forkshm.pool._tasks import CANCELLED, Answer, Pace, PickledCallable, ResultSink, Task, Wrapper
from forkshm.pool._unforkable import installed
from forkshm.pool._worker_group import descriptors_open
from forkshm.pool._worker_state import at_worker_end, note_item, worker_state
from forkshm.pool.observe import PoolReport, SlowTask, WorkerReport

if TYPE_CHECKING:
    from multiprocessing.pool import ThreadPool

__all__ = [
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
]
# For the other packages of forkshm.
__all__ += [
    "CANCELLED",
    "Answer",
    "Outcome",
    "Pace",
    "PickledCallable",
    "ResultSink",
    "Task",
    "Wrapper",
    "at_worker_end",
    "check_options",
    "chunked",
    "delivering",
    "descriptors_open",
    "first_of",
    "installed",
    "note_item",
    "take_arguments",
]

publish(globals())

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("pool", globals())
