"""As ``multiprocessing.managers``: what is not ours is that of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.channel._manager import BaseManager, SyncManager

if TYPE_CHECKING:
    from multiprocessing.managers import BaseProxy, SharedMemoryManager, Token

__all__ = ("BaseManager", "BaseProxy", "SharedMemoryManager", "SyncManager", "Token")

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("managers", globals())
