"""pandas: rows of a frame over shared memory cross without a copy.

pandas keeps the columns of one type in a block, an array of columns by rows. Rows are a view of it with gaps, and
pandas copies such a view when it is pickled. What lies in shared memory is handed to NumPy's reducer as it is.
"""

# Where pandas is not installed pyright takes this module, which has its name, for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import pandas.core.internals.blocks as blocks

from forkshm.integrations.numpy import is_shared
from forkshm.pickler import register

try:
    from pandas._libs.internals import _unpickle_block
except ImportError:  # a pandas that does this in another way
    _unpickle_block = None


def reduce_block(block: Any) -> Any:
    """Send a block whose values are a view of shared memory with gaps; pandas' own way for any other."""
    values = block.values
    if type(values) is np.ndarray and not values.flags.forc and is_shared(values):
        return _unpickle_block, (values, block.mgr_locs.indexer, block.ndim)
    return NotImplemented


if _unpickle_block is not None:
    for _name in ("NumpyBlock", "NumericBlock", "ObjectBlock", "Block"):
        _kind = getattr(blocks, _name, None)
        if isinstance(_kind, type):
            register(_kind, reduce_block)
