"""The module ``multiprocessing.connection`` for forkshm; other names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.channel import Connection, Pipe

if TYPE_CHECKING:
    from multiprocessing.connection import Client, Listener, wait

__all__ = ("Client", "Connection", "Listener", "Pipe", "wait")

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("connection", globals())
