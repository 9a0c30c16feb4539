"""The manager that `forkshm.Manager` starts: its pools are forkshm's.

A pool of multiprocess pickles functions by dill, which cannot do that on CPython 3.15.
"""

from __future__ import annotations

from typing import Any

from forkshm import _multiprocess
from forkshm.channel.manager import SyncManager
from forkshm.pool._pool import Pool

__all__ = ("SyncManager",)

_theirs: Any = _multiprocess.managers
SyncManager.register("Pool", Pool, _theirs.PoolProxy)
