"""The module ``multiprocessing.sharedctypes`` for forkshm; other names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.sync import sharedctypes as _ours
from forkshm.sync.sharedctypes import *  # noqa: F403

__all__ = _ours.__all__

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("sharedctypes", globals())
