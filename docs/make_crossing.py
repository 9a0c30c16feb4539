"""Send values of many types in every way, and write the table of what was shared and what was copied.

    python docs/make_crossing.py           print the table
    python docs/make_crossing.py --write   write it to docs/_include/crossing.md

The file's rows of libraries that are not installed are kept. ``tests/docs`` checks that the file is correct.

A value is *shared* if no byte of it was copied and both ends see each other's writes; *shared, read-only* if no byte
was copied and the receiver cannot write; *copied* if the receiver has its own copy.
"""

from __future__ import annotations

import importlib.util
import mmap
import pathlib
import re
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

import forkshm

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = pathlib.Path(__file__).parent / "_include" / "crossing.md"
N = 50_000


# -- values to send -----------------------------------------------------------------------


def shared() -> Any:
    return forkshm.ones(N)


def over_shared() -> Any:
    """A plain ndarray over shared memory."""
    return np.asarray(forkshm.ones(N))


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def masked() -> Any:
    return np.ma.MaskedArray(over_shared(), mask=np.asarray(forkshm.zeros(N, bool)), copy=False)


def memmap(mode: str) -> Any:
    with tempfile.NamedTemporaryFile() as file:
        np.ones(N).tofile(file.name)
        return np.memmap(file.name, float, mode)


def mapped_file() -> mmap.mmap:
    with tempfile.TemporaryFile() as file:
        file.truncate(8 * N)
        return mmap.mmap(file.fileno(), 0)


def frame(memory: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(memory.reshape(5, -1).T, columns=list("abcde"), copy=False)


def arrow(memory: Any) -> Any:
    import pyarrow as pa

    return pa.Array.from_buffers(pa.float64(), N, [None, pa.py_buffer(memory)])


def polars_series() -> Any:
    import polars as pl

    return pl.Series(np.ones(N))


def tensor(memory: Any) -> Any:
    import torch

    return torch.from_numpy(memory)


def xarray_of(memory: Any) -> Any:
    import xarray as xr

    return xr.DataArray(memory)


def sparse(memory: Any) -> Any:
    import scipy.sparse

    columns = np.arange(N, dtype=np.int32)
    rows = np.arange(N + 1, dtype=np.int32)
    if isinstance(memory, forkshm.SharedArray):
        columns, rows = forkshm.asarray(columns), forkshm.asarray(rows)
    return scipy.sparse.csr_matrix((memory, columns, rows), shape=(N, N), copy=False)


def filled_value() -> Any:
    array = forkshm.Array("d", N)
    array[:] = [1.0] * N
    return array


def buffer_of(thing: Any) -> Any:
    """Return an array over the memory of a value; None if it has no such memory."""
    kind = type(thing).__module__.partition(".")[0]
    if kind == "pandas":
        values = thing.to_numpy()
        return values if values.ndim == 1 else values[:, 0]
    if kind in ("pyarrow", "torch", "polars"):
        return thing.numpy() if kind == "torch" else thing.to_numpy()
    if kind == "xarray":
        return thing.values
    if kind == "scipy":
        return thing.data
    if isinstance(thing, forkshm.MappedRegion):
        return np.frombuffer(thing.buf)
    if hasattr(thing, "get_obj"):
        return np.frombuffer(thing.get_obj())
    if isinstance(thing, (bytes, bytearray, mmap.mmap)):
        return np.frombuffer(thing)
    if isinstance(thing, (list, tuple)):
        return buffer_of(thing[0]) if isinstance(thing[0], np.ndarray) else None
    if isinstance(thing, dict):
        return buffer_of(next(iter(thing.values())))
    if isinstance(thing, np.ndarray):
        return np.asarray(thing["a"] if thing.dtype.names else thing).ravel() if thing.flags.c_contiguous else thing
    return None


THINGS: dict[str, tuple[str, str | None, Callable[[], Any]]] = {
    "NumPy": ("", None, lambda: None),
    "`forkshm.ones(n)`": ("NumPy", None, shared),
    "a view, slice, transpose or reversal of it": ("NumPy", None, lambda: forkshm.ones(2 * N)[::-2]),
    "a plain `ndarray` over its memory": ("NumPy", None, over_shared),
    "the same, not writeable": ("NumPy", None, lambda: read_only(over_shared())),
    "a `recarray` or subclass over it": (
        "NumPy",
        None,
        lambda: np.asarray(forkshm.ones(N, [("a", "f8")])).view(np.recarray),
    ),
    "a masked array over it": ("NumPy", None, masked),
    "`view(shared, 'read_only')`": ("NumPy", None, lambda: forkshm.view(shared(), "read_only")),
    "`view(shared, 'copy_on_write')`": ("NumPy", None, lambda: forkshm.view(shared(), "copy_on_write")),
    "`np.ones(n)`": ("NumPy", None, lambda: np.ones(N)),
    "`np.ones(n)`, not writeable": ("NumPy", None, lambda: read_only(np.ones(N))),
    "a strided view of `np.ones(n)`": ("NumPy", None, lambda: np.ones(2 * N)[::2]),
    "`np.memmap`, mode `r+`": ("NumPy", None, lambda: memmap("r+")),
    "`np.memmap`, mode `r`": ("NumPy", None, lambda: memmap("r")),
    "`np.memmap`, mode `c`": ("NumPy", None, lambda: memmap("c")),
    "a `DataFrame` of `np.ones(n)`": ("pandas", "pandas", lambda: frame(np.ones(N))),
    "a `DataFrame` over `forkshm.ones(n)`": ("pandas", "pandas", lambda: frame(over_shared())),
    "rows of it, `frame.iloc[10:]`": ("pandas", "pandas", lambda: frame(over_shared()).iloc[10:]),
    "a column of it, `frame['a']`": ("pandas", "pandas", lambda: frame(over_shared())["a"]),
    "columns of it, `frame[['a', 'b', 'd']]`": ("pandas", "pandas", lambda: frame(over_shared())[list("abd")]),
    "an Arrow array": ("Arrow", "pyarrow", lambda: arrow(np.ones(N))),
    "an Arrow array over `forkshm.ones(n)`": ("Arrow", "pyarrow", lambda: arrow(over_shared())),
    "a polars `Series`": ("polars", "polars", polars_series),
    "a `Tensor`": ("PyTorch", "torch", lambda: tensor(np.ones(N))),
    "a `Tensor` after `share_memory_()`": ("PyTorch", "torch", lambda: tensor(np.ones(N)).share_memory_()),
    "a `Tensor` over `forkshm.ones(n)`": ("PyTorch", "torch", lambda: tensor(over_shared())),
    "an xarray `DataArray`": ("xarray", "xarray", lambda: xarray_of(np.ones(N))),
    "a `DataArray` over `forkshm.ones(n)`": ("xarray", "xarray", lambda: xarray_of(over_shared())),
    "a `csr_matrix`": ("SciPy", "scipy", lambda: sparse(np.ones(N))),
    "a `csr_matrix` over shared arrays": ("SciPy", "scipy", lambda: sparse(shared())),
    "`bytes`": ("Python", None, lambda: np.ones(N).tobytes()),
    "`bytearray`": ("Python", None, lambda: bytearray(np.ones(N).tobytes())),
    "`mmap.mmap` of a file": ("Python", None, mapped_file),
    "a list, dict or object that holds `np.ones(n)`": ("Python", None, lambda: {"a": np.ones(N)}),
    "a list, dict or object that holds `forkshm.ones(n)`": ("Python", None, lambda: {"a": forkshm.ones(N)}),
    "other Python objects": ("Python", None, lambda: ["a"] * N),
    "`MappedRegion`": ("forkshm", None, lambda: forkshm.anonymous_shared_memory(8 * N)),
    "`Array`, `Value`, `SharedMemory`": ("forkshm", None, filled_value),
}
del THINGS["NumPy"]


# Texts above the tables.
NOTES = {
    "pandas": (
        "",
        "A DataFrame is copied, unless it was built over shared memory. Then its rows and single columns are shared.",
    ),
}


# -- ways to send -------------------------------------------------------------------------


def touch(thing: Any) -> bool | None:
    """Write to a value that arrived; return whether that succeeded, or None if it has no buffer."""
    array = buffer_of(thing)
    if array is None:
        return None
    if isinstance(thing, bytes) or not array.flags.writeable:
        if type(thing).__module__.startswith("pandas"):  # its arrays are read-only views; write through pandas
            place: Any = 0 if thing.ndim == 1 else (0, 0)
            thing.iloc[place] = 7.0
            return True
        return False
    array[0] = 7.0
    return True


kept: list[Any] = []


def give_back(thing: Any) -> Any:
    kept[:] = [thing]
    return thing


def first() -> Any:
    array = buffer_of(kept[0])
    return None if array is None else array[0]


def put(queue: Any, thing: Any) -> None:
    queue.put(thing)


def serve(connection: Any, thing: Any) -> None:
    connection.send(touch(thing))


def as_argument(pool: Any, thing: Any) -> bool | None:
    written: bool | None = pool.apply(touch, (thing,))
    return written


def as_result(pool: Any, thing: Any) -> bool | None:
    return touch(pool.apply(give_back, (thing,)))


def in_a_closure(pool: Any, thing: Any) -> bool | None:
    wrapped = thing if not isinstance(thing, forkshm.pickler.View) else None
    if wrapped is None:
        return as_argument(pool, thing)
    written: bool | None = pool.apply(lambda: touch(wrapped))
    return written


def through_a_queue(pool: Any, thing: Any) -> bool | None:
    queue = forkshm.SimpleQueue()
    queue.put(thing)
    return touch(queue.get())


def through_a_pipe(pool: Any, thing: Any) -> bool | None:
    here, there = forkshm.Pipe()
    there.send(thing)
    return touch(here.recv())


WAYS = {
    "argument": as_argument,
    "result": as_result,
    "closure": in_a_closure,
    "queue": through_a_queue,
    "pipe": through_a_pipe,
}


def outcome(pool: Any, make: Callable[[], Any], way: Callable[[Any, Any], bool | None]) -> str:
    """Return the outcome for a value that was sent in that way."""
    thing = make()
    sent = thing.value if isinstance(thing, forkshm.pickler.View) else thing
    mine = buffer_of(sent)
    before = forkshm.statistics()
    written = way(pool, thing)
    after = forkshm.statistics()
    # This process does not count copies that the worker makes for its result; but the result arrives as a copy.
    copied = after.bytes_copied - before.bytes_copied
    if mine is None:
        return "pickled"
    changed = mine[0] == 7.0
    if written is False:
        return "copied, read-only" if copied else "shared, read-only"
    if changed:
        return "shared" if not copied else "shared, and copied"
    return "copied" if copied else "shared until written"


def rows_of(pool: Any) -> dict[str, tuple[str, list[str]]]:
    """Return the group and the outcomes of each value that can be created here."""
    rows = {}
    for name, (group, module, make) in THINGS.items():
        if module is None or importlib.util.find_spec(module) is not None:
            rows[name] = (group, [outcome(pool, make, way) for way in WAYS.values()])
    return rows


def rows_in_file() -> dict[str, list[str]]:
    """Return the rows of the existing file."""
    if not FILE.exists():
        return {}
    lines = re.findall(r"^\| (.+) \|$", FILE.read_text(), re.MULTILINE)
    return {cells[0]: cells[1:] for cells in (line.split(" | ") for line in lines)}


def table(rows: dict[str, tuple[str, list[str]]]) -> str:
    """Return the new text of the file."""
    old = rows_in_file()
    lines = ["<!-- Generated: python docs/make_crossing.py --write -->", ""]
    current = None
    for name, (group, _, _) in THINGS.items():
        cells = rows[name][1] if name in rows else old.get(name)
        if cells is None:
            continue
        if group != current:
            current = group
            head = "Data frames" if group == "pandas" else group
            lines += ["", f"## {head}", *NOTES.get(group, ())]
            lines += ["", "| Value | " + " | ".join(WAYS) + " |", "| --- " * (len(WAYS) + 1) + "|"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with forkshm.Pool(1) as made:
        text = table(rows_of(made))
    if sys.argv[1:] == ["--write"]:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(text)
    else:
        print(text, end="")
