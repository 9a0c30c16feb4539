"""Containers of many small arrays arrive unchanged."""

from __future__ import annotations

import pytest
from consuming import receive

import forkshm
from forkshm.backend import kernel
from forkshm.pickler import pack

np = pytest.importorskip("numpy")

import forkshm.integrations.numpy  # noqa: E402
from forkshm.integrations.numpy import _bundles as bundles  # noqa: E402


def crossed(thing):
    payload = pack(thing)
    fds = [kernel.duplicate(fd) for fd in payload.fds]
    payload.close()
    return receive(payload.data, 0, fds)[0].open()


COUNT = 100
KINDS = {
    "numbers": lambda n: np.arange(10.0) + n,
    "of other lengths": lambda n: np.arange(1 + n % 7),
    "strided": lambda n: np.arange(20.0)[::2] + 0 if n % 2 else (np.arange(20.0) + n)[::2],
    "two axes": lambda n: np.full((3, 4), n, np.int16),
    "two axes, of other shapes": lambda n: np.full((1 + n % 3, 4), n, np.int16),
    "two axes, strided": lambda n: np.full((6, 4), n, np.int16)[::2, ::-1],
    "columns": lambda n: np.asfortranarray(np.full((3, 4), n)),
    "of one element": lambda n: np.array([n]),
    "of no axes": lambda n: np.array(n),
    "of no elements": lambda n: np.zeros(n % 2),
    "text": lambda n: np.array([f"{n:03}"]),
    "text of other lengths": lambda n: np.array(["x" * (1 + n % 4)]),
    "bytes": lambda n: np.array([b"ab"]),
    "big-endian": lambda n: np.arange(3, dtype=">f8") + n,
    "big-endian of other lengths": lambda n: np.arange(n % 7, dtype=">f8"),
    "of both byte orders": lambda n: np.arange(3, dtype=[">f8", "<f8"][n % 2]),
    "big-endian of no axes": lambda n: np.array(n, ">f8"),
    "nested, of both byte orders": lambda n: (n, np.arange(3, dtype=[">f8", "<f8"][n % 2])),
    "dates": lambda n: np.array(["2020-01-01"], "M8[D]") + np.timedelta64(n, "D"),
    "structures": lambda n: np.array([(n, 2.5)], [("a", "i4"), ("b", "f8")]),
    "booleans": lambda n: np.array([n % 2 == 0]),
    "of several types": lambda n: np.arange(3, dtype=["f4", "i8"][n % 2]),
    "of other metadata": lambda n: np.zeros(3, np.dtype("i4", metadata={"unit": n})),
    "objects": lambda n: np.array([n, "x"], object),
    "read-only": lambda n: np.frombuffer(bytes([n] * 8), np.uint8),
    "one larger": lambda n: np.arange(50_000 if n == 3 else 5),
    "shared": lambda n: forkshm.array([n, 2]),
    "plain views of shared": lambda n: np.asarray(forkshm.array([n, 2])),
}
CONTAINERS = {
    "list": lambda arrays: arrays,
    "tuple": tuple,
    "dict": lambda arrays: {f"k{n}": array for n, array in enumerate(arrays)},
    "of tuples": lambda arrays: [(array, n, "x") for n, array in enumerate(arrays)],
    "of dicts": lambda arrays: [{"x": array, "y": [array]} for array in arrays],
    "beside a number": lambda arrays: ((arrays, 5), {}),
    "beside an object": lambda arrays: ((arrays, {1, 2}), {"named": arrays[0]}),
    "a map's": lambda arrays: [arrays[:50], arrays[50:]],
}


def pairs(mine, theirs):
    if isinstance(mine, np.ndarray):
        yield mine, theirs
        return
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert list(mine) == list(theirs)
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            yield from pairs(one, other)
    else:
        assert mine == theirs


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", KINDS)
def test_bundled_arrays_arrive_unchanged(kind, container):
    sent = CONTAINERS[container]([KINDS[kind](n) for n in range(COUNT)])
    for mine, theirs in pairs(sent, crossed(sent)):
        assert type(mine) is type(theirs)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.dtype.metadata == theirs.dtype.metadata
        np.testing.assert_array_equal(mine, theirs)
        assert theirs.flags.writeable
        assert mine.flags.fnc == theirs.flags.fnc


def test_many_small_arrays_are_one_buffer_and_none_keeps_the_others():
    for sent in ([np.arange(10.0) for _ in range(COUNT)], [np.arange(20.0)[::2] for _ in range(COUNT)]):
        assert isinstance(bundles.bundle(sent, is_all=True), bundles.Bundle)
        assert isinstance(bundles.bundle(sent, is_all=False), bundles.Bundle)
    value = crossed([np.arange(10.0) for _ in range(COUNT)])
    assert all(array.base is None for array in value)


def test_rows_of_one_array_that_is_all_there_is_are_bundled():
    rows = list(np.zeros((COUNT, 5)))
    assert isinstance(bundles.bundle(rows, is_all=True), bundles.Bundle)
    assert bundles.bundle(rows, is_all=False) is False


def test_an_array_that_is_there_twice_is_one_array():
    a = [np.arange(3.0) for _ in range(COUNT)]
    value = crossed([*a, a[0]])
    assert value[-1] is value[0]
    value = crossed({"a": a, "b": [a[0]]})
    assert value["b"][0] is value["a"][0]
    (value, one), _ = crossed(((a, a[0]), {}))
    assert one is value[0]
    (value,), named = crossed(((a,), {"b": a[0]}))
    assert named["b"] is value[0]
    first, second = crossed([a, a[1:]])
    assert second[0] is first[1]


def test_views_of_an_array_that_is_there_too_stay_its_views():
    a = np.zeros((COUNT, 5))
    for sent in ((a, list(a)), (list(a), a)):
        value = crossed((sent, {}))[0]
        whole, rows = value if isinstance(value[1], list) else value[::-1]
        rows[3][:] = 7
        assert (whole[3] == 7).all()
    b = np.arange(30.0)
    windows = crossed([b[n : n + 3] for n in range(28)] + [b[:4]] * 5)
    windows[3][0] = -1
    assert windows[2][1] == windows[1][2] == -1


def test_a_holder_beside_the_list_keeps_its_alias():
    class Holder:
        pass

    arrays = [np.arange(3.0) for _ in range(COUNT)]
    holder = Holder()
    holder.view = arrays[5][1:]
    holder.same = arrays[7]
    value, held = crossed(((arrays, holder), {}))[0]
    value[5][1] = 9
    assert held.view[0] == 9
    assert held.same is value[7]


def test_small_arrays_that_are_shared_stay_shared():
    whole = forkshm.zeros((COUNT, 4))
    for rows in (list(np.asarray(whole)), list(whole)):
        value = crossed(rows)
        whole[5] += 1
        assert (value[5] == whole[5]).all()
        del value


def test_arrays_that_arrived_are_bundled_with_the_others():
    arrived = crossed([np.arange(5.0) for _ in range(COUNT)])
    again = crossed(arrived)
    assert all((array == np.arange(5.0)).all() for array in again)
    single = crossed(np.arange(3000.0).reshape(COUNT, 30))
    for mine, theirs in zip(single, crossed(list(single)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_pool_passes_them_both_ways():
    sent = [np.arange(10.0) + n for n in range(1000)]
    with forkshm.Pool(1) as pool:
        for value in (pool.apply(list, (sent,)), pool.map(abs, sent), pool.apply(dict, (enumerate(sent),)).values()):
            for mine, theirs in zip(sent, value, strict=True):
                np.testing.assert_array_equal(mine, theirs)
