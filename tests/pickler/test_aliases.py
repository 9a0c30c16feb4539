"""Views of one memory arrive as views of one memory; view() sets the receiver's access."""

from __future__ import annotations

import pytest

import forkshm
from forkshm import view

np = pytest.importorskip("numpy")

SIZES = [7, 300, 1000, 100_000]


def one_memory(arrays):
    """Return whether a write through the first array shows in all others, each of which covers its memory."""
    first = arrays[0]
    first.reshape(-1)[:] = 77
    return all((np.asarray(array) == 77).all() for array in arrays[1:])


VIEWS = {
    "itself": lambda a: a,
    "end": lambda a: a[5:],
    "reversed": lambda a: a[::-1],
    "every other": lambda a: a[::2],
    "one element": lambda a: a[3:4],
    "columns": lambda a: a[: a.size // 7 * 7].reshape(7, -1).T,
    "three axes": lambda a: a[:6].reshape(1, 2, 3).transpose(2, 0, 1),
    "other type": lambda a: a.view(np.int32),
}


@pytest.mark.parametrize("make", [np.zeros, forkshm.zeros], ids=["private", "shared"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", [1, -1], ids=["array first", "views first"])
def test_views_of_one_array_arrive_as_views_of_one_array(cross, make, size, order):
    array = make(size, np.int64)
    array[:] = np.arange(size)
    names = list(VIEWS)[::order]
    value = dict(zip(names, cross([VIEWS[name](array) for name in names]).value, strict=True))
    for name in names:
        np.testing.assert_array_equal(value[name], VIEWS[name](array))
    value["itself"][:] = 7
    expected = np.full(size, 7, array.dtype)
    for name in names:
        np.testing.assert_array_equal(value[name], VIEWS[name](expected))
    # Memory sent by value is the receiver's own; shared memory is common to all.
    assert (array[2] == 7) == (make is forkshm.zeros)


@pytest.mark.parametrize("order", [1, -1], ids=["array first", "views first"])
@pytest.mark.parametrize("size", SIZES)
def test_they_are_still_views_of_one_array_when_they_are_sent_on(cross, pool, size, order):
    array = np.arange(size)
    names = list(VIEWS)[::order]
    back = dict(zip(names, pool.apply(lambda views: views, ([VIEWS[name](array) for name in names],)), strict=True))
    back["itself"][:] = 7
    expected = np.full(size, 7)
    for name in names:
        np.testing.assert_array_equal(back[name], VIEWS[name](expected))
    # A view whose array is not sent on is the receiver's own.
    alone = cross([back["one element"], 5, "text"]).value[0]
    alone[0] = 8
    assert back["itself"][3] == 7


def test_a_small_view_that_was_written_is_sent_as_it_is(pool):
    def write(array):
        array[50_000] = 5
        return array[:10_000], array[50_000:50_010], array[2:4]

    start, written, small = pool.apply(write, (np.zeros(100_000),))
    start[2] = 3
    assert written.tolist() == [5, *[0] * 9]
    assert small.tolist() == [3, 0]


def test_the_list_of_the_readme(cross):
    a = np.arange(60_000.0).reshape(200, 300)
    crossing = cross((a, a[10:], a.T, a[::-1]))
    whole, end, turned, reversed_ = crossing.value
    assert crossing.copied == a.nbytes
    whole[199, 299] = -5
    assert end[189, 299] == turned[299, 199] == reversed_[0, 299] == -5


def test_parts_that_overlap_without_the_whole_arrive_as_one_memory(cross):
    a = np.arange(100_000)
    first, second = cross((a[:60_000], a[40_000:])).value
    first[50_000] = -1
    assert second[10_000] == -1
    assert np.array_equal(second[:5], a[40_000:40_005])


def test_neighbours_stay_apart(cross):
    # Two adjacent parts that do not overlap are two buffers.
    a = np.arange(100_000)
    first, second = cross((a[:50_000], a[50_000:])).value
    assert np.array_equal(first, a[:50_000])
    assert np.array_equal(second, a[50_000:])


def test_elements_far_apart_cross_alone(cross):
    a = np.arange(1_000_000, dtype="i8")
    crossing = cross(a[::100])
    assert crossing.copied == 80_000
    assert np.array_equal(crossing.value, a[::100])


def test_small_arrays_beside_a_large_one_do_not_keep_its_memory(cross):
    small, _ = cross((np.arange(10), np.zeros(100_000))).value
    owner = small
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert forkshm.region.blocks._claim.claim_at(small.ctypes.data) is None


def test_as_strided_beyond_the_memory_is_left_to_numpy(cross):
    a = np.arange(10_000)
    overlapping = np.lib.stride_tricks.sliding_window_view(a, 50)
    assert np.array_equal(cross(overlapping).value, overlapping)


# -- view() -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["read_only", "read_private", "copy_on_write"])
@pytest.mark.parametrize("make", [np.zeros, forkshm.zeros], ids=["private", "shared"])
def test_the_mode_decides_whether_the_receiver_may_write(cross, make, size, mode):
    array = make(size)
    array[:] = 1
    value = cross(view(array, mode)).value
    assert isinstance(value, np.ndarray)
    assert (value == 1).all()
    assert value.flags.writeable == (mode == "copy_on_write")
    if mode == "copy_on_write":
        value[:] = 2
        assert (array == 1).all()


def test_read_only_shared_memory_shows_later_writes(cross):
    array = forkshm.zeros(1000)
    value = cross(view(array, "read_only")).value
    array[:] = 3
    assert (value == 3).all()


def test_read_only_cannot_be_undone_by_the_receiver(cross):
    value = cross(view(forkshm.zeros(1000), "read_only")).value
    with pytest.raises(ValueError, match="WRITEABLE"):
        value.flags.writeable = True


def test_two_receivers_with_copy_on_write_do_not_see_each_other(received_twice):
    array = forkshm.zeros(1000)
    first, second = received_twice(view(array, "copy_on_write"))
    first[:] = 1
    second[:] = 2
    assert (first == 1).all()
    assert (array == 0).all()


def test_the_mode_is_that_of_all_in_the_argument_and_of_nothing_else(cross):
    shared, private = forkshm.ones(1000), np.ones(50_000)
    first, inner, last = cross([shared, view({"a": [forkshm.ones(5), private]}, "read_only"), private[:60] + 1]).value
    assert first.flags.writeable
    assert not inner["a"][0].flags.writeable
    assert not inner["a"][1].flags.writeable
    assert last.flags.writeable


def test_a_view_within_a_view_has_its_own_mode(cross):
    outer = cross(view([view(np.ones(5), "copy_on_write"), np.ones(6)], "read_only")).value
    assert [array.flags.writeable for array in outer] == [True, False]


def test_a_region_arrives_with_the_mode(cross):
    region = forkshm.anonymous_shared_memory(5000)
    region.buf[0] = 1
    value = cross(view(region, "read_only")).value
    assert value.mode is forkshm.region.read_only
    assert value.buf.readonly
    region.buf[0] = 2
    assert value.buf[0] == 2


@pytest.mark.parametrize("size", SIZES)
def test_read_write_of_private_memory_is_refused(cross, size):
    with pytest.raises(
        forkshm.errors.RegionAccessError, match=r"cannot send [\d,]+ bytes read_write.*forkshm\.asarray"
    ):
        cross(view(np.zeros(size), "read_write"))


@pytest.mark.needs("seals")
def test_read_write_of_a_sealed_region_is_refused(cross):
    region = forkshm.anonymous_shared_memory(5000)
    region.seal()
    with pytest.raises(forkshm.errors.RegionAccessError, match="read_only to others"):
        cross(view(region, "read_write"))


def test_read_write_of_shared_memory_is_shared(cross):
    array = forkshm.zeros(100)
    value = cross(view(array, "read_write")).value
    value[5] = 1
    assert array[5] == 1


def test_there_is_no_such_mode():
    with pytest.raises(ValueError, match="write_only"):
        view(1, "write_only")


def test_a_plain_pickle_of_a_view_is_by_value():
    import pickle

    back = pickle.loads(pickle.dumps(view(np.arange(3), "read_only")))
    assert back.mode is forkshm.region.read_only
    assert np.array_equal(back.value, [0, 1, 2])


OWN = {
    "pair": lambda a, b: (a, b),
    "nested": lambda a, b: {"x": [a, (b, 3)], "y": "text"},
    "same twice": lambda a, b: [a, a, b],
    "with a view": lambda a, b: (a, b, a[1:]),
    "view first": lambda a, b: [b[::-1], {"b": b}],
    "view of a view in a dict": lambda a, b: {"a": a.reshape(2, -1)[1], "b": a},
    "only views": lambda a, b: (a[:5], a[3:]),
}


@pytest.mark.parametrize("size", [10, 300, 1200, 5000])
@pytest.mark.parametrize("name", OWN)
def test_small_arrays_in_containers_keep_their_aliases(cross, name, size):
    sent = OWN[name](np.arange(2.0 * size), np.arange(size))
    got = cross(sent).value
    before, after = list(arrays_in(sent)), list(arrays_in(got))
    assert [array.tolist() for array in after] == [array.tolist() for array in before]
    assert all(array.flags.writeable for array in after)
    for one, mine in zip(before, after, strict=True):
        for other, others in zip(before, after, strict=True):
            assert np.shares_memory(mine, others) == np.shares_memory(one, other)


def arrays_in(thing):
    if isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from arrays_in(part)
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from arrays_in(part)


def test_a_few_small_arrays_are_in_the_stream(cross):
    crossed = cross(({"a": np.arange(100.0), "b": [np.arange(50), "text"]}, 5))
    assert (crossed.copied, crossed.shared, crossed.fds) == (0, 0, 0)


def test_a_list_that_holds_itself_arrives(cross):
    sent = [np.arange(3)]
    sent.append(sent)
    got = cross(sent).value
    assert got[1] is got
    assert got[0].tolist() == [0, 1, 2]


def test_a_dict_that_holds_itself_arrives(cross):
    sent = {"array": np.arange(3)}
    sent["parent"] = sent
    for thing, at in (
        (sent, lambda got: got),
        (((sent,), {}), lambda got: got[0][0]),
        (((), {"x": sent}), lambda got: got[1]["x"]),
    ):
        got = at(cross(thing).value)
        assert got["parent"] is got
        assert got["array"].tolist() == [0, 1, 2]


def test_dicts_that_share_their_parts_at_many_levels_arrive(cross):
    sent = {"array": np.arange(3)}
    for _ in range(50):
        sent = {"left": sent, "right": sent}
    got = cross(sent).value
    assert got["left"] is got["right"]
