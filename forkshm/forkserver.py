"""The module ``multiprocessing.forkserver`` for forkshm; its names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess

if TYPE_CHECKING:
    from multiprocessing.forkserver import *  # noqa: F403
else:
    __getattr__, __dir__ = _multiprocess.stand_in("forkserver", globals())
