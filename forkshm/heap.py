"""The module ``multiprocessing.heap`` for forkshm; other names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.sync.heap import Arena, BufferWrapper

__all__ = ("Arena", "BufferWrapper")

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("heap", globals())
