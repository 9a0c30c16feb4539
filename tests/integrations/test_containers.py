"""Objects of other libraries that hold arrays: their large buffers are copied once."""

from __future__ import annotations

import collections
import dataclasses

import pytest

np = pytest.importorskip("numpy")

NUMBERS = 200_000


def same(value):
    return value


@dataclasses.dataclass
class Record:
    array: object
    name: str


def arrow():
    pa = pytest.importorskip("pyarrow")
    return pa.table({"a": np.arange(NUMBERS), "b": np.arange(NUMBERS) / 2, "s": [str(n) for n in range(NUMBERS)]})


def frame():
    pd = pytest.importorskip("pandas")
    return pd.DataFrame({"a": np.arange(NUMBERS), "b": np.arange(NUMBERS) / 2}, index=np.arange(NUMBERS) * 2)


def series_of_dates():
    pd = pytest.importorskip("pandas")
    return pd.Series(pd.date_range("2020", periods=NUMBERS, freq="min"))


def sparse():
    return pytest.importorskip("scipy.sparse").eye(NUMBERS, format="csr")


def nested():
    array = np.arange(NUMBERS)
    return {"x": [array, (array + 1, {"y": array + 2})], "deque": collections.deque([array + 3])}


VALUES = {
    "arrow": (arrow, lambda a, b: a.equals(b), lambda x: x.nbytes),
    "frame": (frame, lambda a, b: a.equals(b), lambda x: x.memory_usage().sum()),
    "dates": (series_of_dates, lambda a, b: a.equals(b), lambda x: x.memory_usage(index=False)),
    "sparse": (sparse, lambda a, b: (a != b).nnz == 0, lambda x: x.data.nbytes + x.indices.nbytes + x.indptr.nbytes),
    "nested": (nested, lambda a, b: np.array_equal(a["x"][1][1]["y"], b["x"][1][1]["y"]), lambda x: 4 * 8 * NUMBERS),
    "dataclass": (
        lambda: Record(np.arange(NUMBERS), "r"),
        lambda a, b: np.array_equal(a.array, b.array),
        lambda x: 8 * NUMBERS,
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_container_arrives_equal_and_its_buffers_are_copied_once(pool, name):
    make, equal, nbytes = VALUES[name]
    value = make()
    before = pool.statistics()
    back = pool.apply(same, (value,))
    after = pool.statistics()
    assert equal(value, back)
    copied = after.bytes_copied - before.bytes_copied
    shared = after.bytes_shared - before.bytes_shared
    # Sent as copies, and sent back by descriptor, except for buffers that a library itself copied.
    assert nbytes(value) <= copied + 1000
    assert copied + shared <= 2.2 * nbytes(value)


def test_large_text_and_bytes_cross_outside_of_the_message(pool):
    for value in (b"x" * 5_000_000, bytearray(b"y" * 5_000_000), "z" * 5_000_000, "\u20ac" * 2_000_000):
        before = pool.statistics().bytes_copied
        assert pool.apply(same, (value,)) == value
        assert pool.statistics().bytes_copied - before >= 2 * 5_000_000
