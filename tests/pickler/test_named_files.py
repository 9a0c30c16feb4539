"""A memmap crosses by the name of its file where the kernel does not say which file lies at an address."""

from __future__ import annotations

import pytest

pytest.importorskip("numpy")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("posix_backend"),
]

PROGRAM = """
import mmap, os, sys
import numpy as np
import forkshm

N = 100_000

def look(array):
    first = float(np.asarray(array).ravel()[0])
    kind = type(array).__name__, getattr(array, "mode", None), array.shape, array.flags.writeable
    if array.flags.writeable:
        array[(0,) * array.ndim] = 7
    return kind, first

def rename(records):
    records.a[0] = 9
    return type(records).__name__

def sent(pool, array):
    before = pool.statistics().bytes_copied
    kind, first = pool.apply(look, (array,))
    return *kind, first, pool.statistics().bytes_copied - before

if __name__ == "__main__":
    path, method = sys.argv[1:]
    np.arange(5.0, N + 5).tofile(path)
    with forkshm.get_context(method).Pool(1) as pool:
        for mode in ("r", "r+", "c"):
            mapped = np.memmap(path, float, mode)
            for name, part in {
                "all": mapped, "slice": mapped[1000:90_000], "columns": mapped.reshape(100, 1000)[:, 3:700],
                "reversed": mapped[::-1], "plain": np.asarray(mapped)[500:],
            }.items():
                before = float(np.asarray(part).ravel()[0])
                kind, as_mode, shape, writable, first, copied = sent(pool, part)
                assert (kind, shape, first) == (type(part).__name__, part.shape, before), (mode, name)
                assert as_mode == getattr(part, "mode", None), (mode, name)
                assert writable == (mode != "r" or name == "plain"), (mode, name)
                assert (part.ravel()[0] == 7) == (mode == "r+"), (mode, name)
                assert (copied == 0) == (mode != "c"), (mode, name, copied)
                if mode == "r+":
                    part[(0,) * part.ndim] = before
        private = np.memmap(path, float, "c")
        private[0] = 8  # sent, though the file has another value
        arrived = pool.apply(lambda x: x, (private[:10],))
        assert (arrived[0], arrived.filename, arrived.offset) == (8, private.filename, private.offset)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
            try:
                pool.apply(len, (mapping,))
            except TypeError as error:
                assert "send the path" in str(error) and "(args[0]: mmap.mmap)" in str(error), error
            else:
                raise SystemExit("no error")
        with_offset = np.memmap(path, "f8", "r+", offset=8 * 3000, shape=(50, 100))
        assert sent(pool, with_offset)[-2:] == (3005.0, 0) and with_offset[0, 0] == 7
        assert sent(pool, np.memmap(path, float, "r") + 0.0)[-1] > 0
        strided = np.lib.stride_tricks.as_strided(np.memmap(path, float, "r+"), (50,), (16,))
        assert sent(pool, strided)[-2:] == (5.0, 0) and strided[0] == 7
        strided[0] = 5
        records = np.memmap(path, [("a", "f8")], "r+").view(np.recarray)
        before = pool.statistics().bytes_copied
        assert pool.apply(rename, (records,)) == "recarray" and records.a[0] == 9
        assert pool.statistics().bytes_copied == before
        records.a[0] = 5
        read_only = np.asarray(np.memmap(path, float, "r+"))
        read_only.flags.writeable = False
        assert sent(pool, read_only)[3:] == (True, 5.0, 0) and read_only[0] == 5

        replaced = np.memmap(path, float, "r+")
        os.rename(path, path + ".old")
        np.zeros(N).tofile(path)
        assert sent(pool, replaced)[-2] == 5.0
        assert replaced[0] == 5.0
        del replaced
        cut = np.memmap(path, float, "r+")
        os.truncate(path, 4096)
        try:
            pool.apply(look, (cut,))
        except forkshm.RegionGoneError as error:
            assert "to 4,096 bytes" in str(error), error
        else:
            raise SystemExit("no error")
        gone = np.memmap(path + ".old", float, "r+")
        os.unlink(path + ".old")
        assert sent(pool, gone)[-2] == 5.0
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_memmap_is_shared(run_script, monkeypatch, tmp_path, method):
    monkeypatch.setenv("FORKSHM_BACKEND", "posix")
    assert run_script(PROGRAM, str(tmp_path / "numbers"), method) == "done\n"


# Views of any size, and views that came back from a worker.
SMALL = """
import sys
import numpy as np
import forkshm

def write(array):
    array[(0,) * array.ndim] = 7

def write_first(arrays):
    write(arrays[0])

if __name__ == "__main__":
    path = sys.argv[1]
    views = [np.asarray, lambda mapped: np.asarray(mapped)[::-2], lambda mapped: mapped.view(np.recarray)]
    ways = [
        lambda pool, view: pool.apply(write, (view,)),
        lambda pool, view: pool.apply(write_first, ([view, 1],)),
        lambda pool, view: write(pool.apply(lambda x: x, (view,))),
        lambda pool, view: pool.apply(write, (pool.apply(lambda x: x, (view,)),)),
    ]
    with forkshm.Pool(1) as pool:
        for size in (1, 100, 100_000):
            for number, view_of in enumerate(views):
                for way in ways:
                    np.zeros(size).tofile(path)
                    view = view_of(np.memmap(path, float, "r+"))
                    way(pool, view)
                    assert view.ravel()[0] == 7, (size, number, ways.index(way))
        # A copied column with gaps, alone and in containers.
        np.arange(400.0).tofile(path)
        column = np.memmap(path, float, "c", shape=(20, 20))[:, 3]
        column[0] = 7
        for thing in (column, [column], {"column": (column, 1)}):
            arrived = pool.apply(lambda x: x, (thing,))
            assert repr(arrived) == repr(thing), arrived
    print("done")
"""


def test_a_writable_view_of_any_size_is_shared(run_script, monkeypatch, tmp_path):
    monkeypatch.setenv("FORKSHM_BACKEND", "posix")
    assert run_script(SMALL, str(tmp_path / "numbers")) == "done\n"
