"""How shared arrays are sent through channels of the standard library."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from forkshm.integrations.numpy._array import SharedArray, is_writable
from forkshm.pickler import Passage, send_region, take_region
from forkshm.region import Mode

if TYPE_CHECKING:
    import numpy as np

__all__ = ("rebuild_foreign_array", "reduce_foreign_array")


def reduce_foreign_array(array: SharedArray) -> Any:
    """Reduce an array for a channel of the standard library: its region, and the position of the elements in it."""
    region = array.region
    if region is None or region.mode is Mode.copy_on_write:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    where = array.__array_interface__["data"][0] - region.address
    layout = array.dtype, array.shape, array.strides, where, is_writable(array)
    return rebuild_foreign_array, (send_region(region), *layout)


def rebuild_foreign_array(
    passage: Passage, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], where: int, writable: bool
) -> SharedArray:
    """Return the array of the region that arrived."""
    made = SharedArray(shape, dtype, take_region(passage).buf, where, strides)
    if not writable:
        made.flags.writeable = False
    return made
