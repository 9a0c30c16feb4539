"""Apache Arrow: a slice is sent as its elements, without the rest of its buffers.

Arrow pickles whole buffers, so sending ten rows of a table would send the whole table. If the slice covers little of
its buffers, it is written as an Arrow stream, which contains only the slice. Views of text (``string_view``,
``binary_view``) are written as text, because a stream contains all of the buffers they refer to. Buffers in shared
memory or in a mapped file are sent whole, because that costs nothing.
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
# Views of text came after Arrow 14, so they are known by name.
_TEXT = {"string_view": _pa.string(), "binary_view": _pa.binary()}


def reduce_table(table: Any) -> Any:
    """Reduce a table or a batch of rows; send only its slices if they cover little of their buffers."""
    stream = _stream_of_seen(table, table.get_total_buffer_size())
    if stream is None:
        return NotImplemented
    return rebuild_table, (type(table) is _pa.RecordBatch, stream, table.schema)


def reduce_array(array: Any) -> Any:
    """Reduce an array, contiguous or chunked; send only its slices if they cover little of their buffers."""
    whole = array.get_total_buffer_size()
    if whole < _WORTH_IT:
        return NotImplemented
    is_chunked = type(array) is _pa.ChunkedArray
    made = (_pa.table if is_chunked else _pa.record_batch)([array], names=["array"])
    stream = _stream_of_seen(made, whole)
    if stream is None:
        return NotImplemented
    return rebuild_array, (is_chunked, stream, array.type)


def rebuild_table(is_batch: bool, stream: Any, schema: Any) -> Any:
    """Return the table or batch whose rows arrived."""
    reader = _pa.ipc.open_stream(_pa.py_buffer(stream))
    table = reader.read_next_batch() if is_batch else reader.read_all()
    if table.schema == schema:
        return table
    columns = [_with_type(column, kind) for column, kind in zip(table.columns, schema.types, strict=True)]
    return type(table).from_arrays(columns, schema=schema)


def rebuild_array(is_chunked: bool, stream: Any, kind: Any) -> Any:
    """Return the array whose elements arrived."""
    return rebuild_table(not is_chunked, stream, _pa.schema([("array", kind)])).column(0)


def _stream_of_seen(table: Any, whole: int) -> pickle.PickleBuffer | None:
    """Return a stream of the rows that are seen, or None if the buffers are to be sent as they are."""
    if whole < _WORTH_IT or whole <= table.nbytes or _is_elsewhere(table):
        return None
    try:
        seen = _without_views(table)
    except (_pa.ArrowInvalid, _pa.ArrowNotImplementedError):  # 2 GiB of text, or types that cannot be converted
        return None
    return _stream_of(seen) if whole > _MOST * seen.nbytes else None


def _without_views(table: Any) -> Any:
    """Return the same rows, with text instead of views of text, which refer to whole buffers in a stream, too."""
    stored = [getattr(kind, "storage_type", kind) for kind in table.schema.types]
    texts = [_text_type(kind) for kind in stored]
    if texts == stored:
        return table
    # Arrow 26 converts an extension array of views to garbage, so its storage is converted.
    columns = [
        column if text == kind else _with_type(column, kind).cast(text)
        for column, kind, text in zip(table.columns, stored, texts, strict=True)
    ]
    return type(table).from_arrays(columns, names=[str(position) for position in range(len(columns))])


def _text_type(kind: Any) -> Any:
    """Return a type with text instead of views of text, and otherwise the same."""

    def field(of: Any) -> Any:
        return of.with_type(_text_type(of.type))

    types = _pa.types
    if types.is_struct(kind):
        return _pa.struct([field(of) for of in kind])
    if types.is_list(kind):
        return _pa.list_(field(kind.value_field))
    if types.is_large_list(kind):
        return _pa.large_list(field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return _pa.list_(field(kind.value_field), kind.list_size)
    if types.is_map(kind):
        return _pa.map_(field(kind.key_field), field(kind.item_field), kind.keys_sorted)
    return _TEXT.get(str(kind), kind)


def _with_type(column: Any, kind: Any) -> Any:
    """Return a column, contiguous or chunked, with a type that stores the same values."""
    if isinstance(column, _pa.ChunkedArray):
        return _pa.chunked_array([_with_type(chunk, kind) for chunk in column.chunks], kind)
    if isinstance(column, _pa.ExtensionArray):
        column = column.storage
    stored = getattr(kind, "storage_type", kind)
    if column.type != stored:
        column = column.cast(stored)
    return column if stored == kind else kind.wrap_array(column)


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
