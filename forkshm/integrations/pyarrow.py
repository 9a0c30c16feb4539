"""Apache Arrow: a slice is sent as its elements, without the rest of its buffers.

Arrow pickles whole buffers, so sending ten rows of a table would send the whole table. If the slice covers little of
its buffers, it is written as an Arrow stream, which contains only the slice. Buffers in shared memory or in a mapped
file are sent whole, because that costs nothing.
"""

# Without Arrow installed, pyright resolves the name pyarrow to this module.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from forkshm.backend import kernel
from forkshm.pickler import register, register_family
from forkshm.region import mapping_at
from forkshm.region.blocks import Share, claim_at

if TYPE_CHECKING:
    from collections.abc import Iterator

_pa: Any = pa  # the parts of Arrow without type annotations

# Smaller buffers are sent whole, and so are buffers of which at least this fraction is covered.
_WORTH_IT = 16 * 1024
_MOST = 2


def reduce_table(table: Any) -> Any:
    """Reduce a table or a batch of rows; send only its slices if they cover little of their buffers."""
    if not _is_mostly_unseen(table):
        return NotImplemented
    return rebuild_table, (type(table) is _pa.RecordBatch, _stream_of(table))


def reduce_array(array: Any) -> Any:
    """Reduce an array, contiguous or chunked; send only its slices if they cover little of their buffers."""
    if not _is_mostly_unseen(array):
        return NotImplemented
    is_chunked = type(array) is _pa.ChunkedArray
    made = _pa.table if is_chunked else _pa.record_batch
    return rebuild_array, (is_chunked, _stream_of(made([array], names=["array"])))


def rebuild_table(is_batch: bool, stream: Any) -> Any:
    """Return the table or batch whose rows arrived."""
    reader = _pa.ipc.open_stream(_pa.py_buffer(stream))
    return reader.read_next_batch() if is_batch else reader.read_all()


def rebuild_array(is_chunked: bool, stream: Any) -> Any:
    """Return the array whose elements arrived."""
    return rebuild_table(not is_chunked, stream).column(0)


def _is_mostly_unseen(thing: Any) -> bool:
    whole = thing.get_total_buffer_size()
    return bool(whole >= _WORTH_IT and whole > _MOST * thing.nbytes and not _is_elsewhere(thing))


def _is_elsewhere(thing: Any) -> bool:
    """Return whether any buffer is shared memory, or mapped from a file."""
    for buffer in _buffers(thing):
        if buffer is not None and buffer.size >= _WORTH_IT:
            if mapping_at(buffer.address) is not None:
                return True
            claim = claim_at(buffer.address)  # received memory, whose file is the arena of another process
            if claim.share is Share.shared if claim is not None else kernel.mapped_file(buffer.address) is not None:
                return True
    return False


def _buffers(thing: Any) -> Iterator[Any]:
    if isinstance(thing, (_pa.Table, _pa.RecordBatch)):
        for column in thing.columns:
            yield from _buffers(column)
    elif isinstance(thing, _pa.ChunkedArray):
        for chunk in thing.chunks:
            yield from chunk.buffers()
    else:
        yield from thing.buffers()


def _stream_of(table: Any) -> pickle.PickleBuffer:
    sink = _pa.BufferOutputStream()
    with _pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    return pickle.PickleBuffer(sink.getvalue())


register(_pa.Table, reduce_table)
register(_pa.RecordBatch, reduce_table)
register(_pa.ChunkedArray, reduce_array)
register_family(_pa.Array, reduce_array)
