"""The module ``multiprocessing.sharedctypes`` for forkshm; other names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.sync.sharedctypes import (
    Array,
    RawArray,
    RawValue,
    Synchronized,
    SynchronizedArray,
    SynchronizedBase,
    SynchronizedString,
    Value,
    copy,
    rebuild_ctype,
    reduce_ctype,
    synchronized,
)

__all__ = (
    "Array",
    "RawArray",
    "RawValue",
    "Synchronized",
    "SynchronizedArray",
    "SynchronizedBase",
    "SynchronizedString",
    "Value",
    "copy",
    "rebuild_ctype",
    "reduce_ctype",
    "synchronized",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("sharedctypes", globals())
