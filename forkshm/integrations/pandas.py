"""pandas: rows of a frame in shared memory are sent without a copy.

pandas keeps the columns of one type in a block, an array of columns by rows. Rows are a view of the block with gaps,
and pandas copies such a view when it pickles it. A view of shared memory is passed to NumPy's reducer unchanged.
"""

# Without pandas installed, pyright resolves the name pandas to this module.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import pandas.core.internals.blocks as blocks

from forkshm.integrations.numpy import is_shared
from forkshm.pickler import register

try:
    from pandas._libs.internals import _unpickle_block
except ImportError:  # a pandas with other internals
    _unpickle_block = None


def reduce_block(block: Any) -> Any:
    """Reduce a block whose values are a view of shared memory with gaps; leave other blocks to pandas."""
    values = block.values
    if type(values) is np.ndarray and not values.flags.forc and is_shared(values):
        return _unpickle_block, (values, block.mgr_locs.indexer, block.ndim)
    return NotImplemented


if _unpickle_block is not None:
    for _name in ("NumpyBlock", "NumericBlock", "ObjectBlock", "Block"):
        _kind = getattr(blocks, _name, None)
        if isinstance(_kind, type):
            register(_kind, reduce_block)
