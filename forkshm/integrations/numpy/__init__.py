"""NumPy: arrays in shared memory, and how arrays are sent to other processes."""

from __future__ import annotations

import importlib

import numpy as np

from forkshm._help import publish
from forkshm.integrations.numpy._array import PrivateArray, SharedArray
from forkshm.integrations.numpy._create import (
    array,
    asarray,
    empty,
    empty_like,
    full,
    full_like,
    made_in,
    ones,
    ones_like,
    zeros,
    zeros_like,
)
from forkshm.integrations.numpy._files import (
    is_simple_memmap,
    rebuild_memmap,
    rebuild_over_mmap,
    rebuild_over_named,
    reduce_memmap,
)
from forkshm.integrations.numpy._foreign import rebuild_foreign_array, reduce_foreign_array
from forkshm.integrations.numpy._send import (
    is_shared,
    is_simple,
    rebuild_array,
    rebuild_broadcast,
    rebuild_overlapping,
    rebuild_plain,
    rebuild_repeated,
    rebuild_shared,
    reduce_array,
)
from forkshm.integrations.numpy._subclasses import rebuild_masked, rebuild_subclass, reduce_subclass
from forkshm.integrations.numpy_memory import shared_allocations
from forkshm.pickler import register, register_family, register_foreign, register_plain, register_simple

__all__ = [
    "SharedArray",
    "array",
    "asarray",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "shared_allocations",
    "zeros",
    "zeros_like",
]
# Used by other packages of forkshm.
__all__ += ["PrivateArray", "is_shared", "made_in"]

publish(globals())
# Pickles name these functions by the package, because the pickler need not check names of that module.
for _function in (
    rebuild_array,
    rebuild_broadcast,
    rebuild_foreign_array,
    rebuild_masked,
    rebuild_memmap,
    rebuild_over_mmap,
    rebuild_over_named,
    rebuild_overlapping,
    rebuild_plain,
    rebuild_repeated,
    rebuild_shared,
    rebuild_subclass,
):
    _function.__module__ = __name__

register_foreign(SharedArray, reduce_foreign_array)
register(np.ndarray, reduce_array)
register(np.memmap, reduce_memmap)
register(SharedArray, reduce_array)
register_family(np.ndarray, reduce_subclass)
register(PrivateArray, lambda array: reduce_array(array.view(np.ndarray)))
# Results of many computations. Strings and structured scalars may be long.
register_plain(
    *{kind for kind in np.sctypeDict.values() if issubclass(kind, (np.number, np.bool_, np.datetime64, np.timedelta64))}
)
# The memory of a shared array, and of views of it, is found by its address.
register_simple(SharedArray, own_bytes=lambda array: 0 if array.base is not None else -1)
register_simple(np.ndarray, when=is_simple, own_bytes=lambda array: array.nbytes if array.base is None else -1)
register_simple(np.memmap, when=is_simple_memmap)
# Registers how containers of arrays are sent, after the arrays themselves.
importlib.import_module("forkshm.integrations.numpy._bundles")
