"""The module ``multiprocessing.queues`` for forkshm; other names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.channel import JoinableQueue, Queue, SimpleQueue

__all__ = ("JoinableQueue", "Queue", "SimpleQueue")

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("queues", globals())
