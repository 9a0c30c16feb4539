"""Observation of a pool: reports, traces, statistics, progress bars, names of tasks."""

from forkshm._help import publish
from forkshm.pool._interfaces import Bar
from forkshm.pool._statistics import PoolStatistics
from forkshm.pool.observe._describe import (
    brief,
    describe,
    describe_call,
    describe_chunk,
    describe_task,
    index_of,
    names_of_arguments,
)
from forkshm.pool.observe._progress import length_of, no_bar, open_bar
from forkshm.pool.observe._record import PoolRecord
from forkshm.pool.observe._report import (
    PoolReport,
    SlowTask,
    WorkerClock,
    WorkerReport,
    worker_reports,
)
from forkshm.pool.observe._trace import Recorder, Trace, Traced

__all__ = (
    "Bar",
    "PoolRecord",
    "PoolReport",
    "PoolStatistics",
    "Recorder",
    "SlowTask",
    "Trace",
    "Traced",
    "WorkerClock",
    "WorkerReport",
    "brief",
    "describe",
    "describe_call",
    "describe_chunk",
    "describe_task",
    "index_of",
    "length_of",
    "names_of_arguments",
    "no_bar",
    "open_bar",
    "worker_reports",
)

publish(globals())
