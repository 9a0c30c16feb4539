"""Arrays whose elements lie in shared memory."""

from __future__ import annotations

import copy
import gc
import os
import pathlib
import pickle
import re

import pytest
from system import open_fds

import forkshm
from forkshm import SharedArray
from forkshm.errors import RegionCreateError
from forkshm.pickler import pack, tiny_stream

np = pytest.importorskip("numpy")

PAGE = os.sysconf("SC_PAGE_SIZE")

SHAPES = [(), 5, (5,), (2, 3), (2, 3, 4), (0,), (3, 0, 2), np.int64(4), [2, 3]]
DTYPES = [float, "f4", "i1", np.uint64, bool, complex, ">i4", "U5", "S3", "M8[s]", [("x", "f8"), ("y", "i2", (3,))]]


def plain(array):
    """A SharedArray as a plain array, for comparing."""
    return np.asarray(array)


def is_plain(value):
    return type(value) is not SharedArray and isinstance(value, np.ndarray)


def is_shared(value):
    return type(value) is SharedArray and value.region is not None


# -- creating -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("maker", ["empty", "zeros", "ones"])
def test_new_arrays_equal_those_of_numpy_in_a_region_of_that_size(maker, shape, order):
    made = getattr(forkshm, maker)(shape, "f4", order)
    expected = getattr(np, "zeros" if maker == "empty" else maker)(shape, "f4", order)
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
    assert made.strides == expected.strides or not made.size
    np.testing.assert_array_equal(plain(made), expected)
    assert is_shared(made)
    assert made.region.size == max(expected.nbytes, 1)
    assert made.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_without_objects_can_be_shared(dtype):
    made = forkshm.zeros((3, 4), dtype)
    expected = np.zeros((3, 4), dtype)
    assert made.dtype == expected.dtype
    assert made.region.size == expected.nbytes
    np.testing.assert_array_equal(plain(made), expected)


ODD_TYPES = [
    None,
    str,
    bytes,
    "U",
    "S0",
    "V",
    np.void,
    "M8",
    "(2,3)f4",
    np.dtype((">i4", 2)),
    [("a", "U"), ("b", "f4", 2)],
]


@pytest.mark.parametrize("shape", [(), 0, 3, (2, 2)])
@pytest.mark.parametrize("dtype", ODD_TYPES)
@pytest.mark.parametrize("maker", ["zeros", "empty", "ones"])
def test_dtypes_without_length_or_unit_or_with_axes_match_numpy(maker, dtype, shape):
    ours, theirs = getattr(forkshm, maker)(shape, dtype), getattr(np, maker)(shape, dtype)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if maker != "empty":
        assert ours.tobytes() == theirs.tobytes()


def test_the_default_type_is_float():
    assert {made.dtype for made in (forkshm.empty(1), forkshm.zeros(1), forkshm.ones(1))} == {np.dtype(float)}


@pytest.mark.parametrize(
    ("value", "dtype"), [(3, None), (2.5, None), (True, None), (1j, None), (3.9, "i4"), ("ab", None)]
)
def test_full_has_the_value_everywhere_and_by_default_its_type(value, dtype):
    made, expected = forkshm.full((2, 3), value, dtype), np.full((2, 3), value, dtype)
    assert made.dtype == expected.dtype
    np.testing.assert_array_equal(plain(made), expected)


def test_full_with_a_row_repeats_the_row():
    np.testing.assert_array_equal(plain(forkshm.full((2, 3), [1, 2, 3])), np.full((2, 3), [1, 2, 3]))


SOURCES = {
    "list": lambda: [[1, 2], [3, 4]],
    "number": lambda: 3.5,
    "rows": lambda: np.arange(12.0).reshape(3, 4),
    "columns": lambda: np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "reversed": lambda: np.arange(12)[::-2],
    "structures": lambda: np.ones(3, [("a", "i4"), ("b", "f8")]),
    "empty": list,
    "buffer": lambda: memoryview(b"abc"),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("maker", [forkshm.array, forkshm.asarray])
def test_an_array_made_of_values_has_them_and_keeps_their_order(maker, name):
    source = SOURCES[name]()
    made, expected = maker(source), np.array(source)
    assert is_shared(made)
    assert made.dtype == expected.dtype
    np.testing.assert_array_equal(plain(made), expected)
    assert made.flags.f_contiguous == expected.flags.f_contiguous
    made[...] = np.zeros((), made.dtype)
    np.testing.assert_array_equal(np.array(source), expected)


@pytest.mark.parametrize(("order", "columns"), [("C", False), ("F", True), ("K", True), ("A", True)])
def test_the_order_of_a_copy_can_be_asked_for(order, columns):
    source = np.asfortranarray(np.arange(6).reshape(2, 3))
    made = forkshm.array(source, order=order)
    assert made.flags.fnc == columns
    np.testing.assert_array_equal(plain(made), source)


def test_an_array_can_change_its_type_on_the_way():
    assert forkshm.array([1, 2], "f4").dtype == np.float32
    assert forkshm.asarray([1.7, 2], int).tolist() == [1, 2]


def test_array_copies_shared_memory_and_asarray_does_not():
    source = forkshm.zeros(3)
    view, copied = forkshm.asarray(source), forkshm.array(source)
    source[0] = 1
    assert (view[0], copied[0]) == (1, 0)
    assert view.region is source.region
    assert copied.region is not source.region


def test_asarray_takes_any_view_of_shared_memory_without_a_copy():
    source = forkshm.array(np.arange(12).reshape(3, 4))
    for view in (plain(source), plain(source)[::-1, 1:], source.T):
        same = forkshm.asarray(view)
        assert is_shared(same)
        assert same.ctypes.data == view.ctypes.data
        assert same.strides == view.strides
    with forkshm.anonymous_shared_memory(80) as region:
        same = forkshm.asarray(np.ndarray((10,), float, region.buf))
        assert same.region is region
        del same


def test_asarray_to_another_type_copies():
    source = forkshm.zeros(3, "i4")
    assert forkshm.asarray(source, "f8").region is not source.region


@pytest.mark.parametrize("maker", ["empty_like", "zeros_like", "ones_like"])
@pytest.mark.parametrize("name", ["list", "rows", "columns"])
def test_the_like_forms_take_shape_type_and_order_of_their_prototype(maker, name):
    prototype = np.asarray(SOURCES[name]())
    made, expected = getattr(forkshm, maker)(prototype), getattr(np, maker)(prototype)
    assert (made.shape, made.dtype, made.strides) == (expected.shape, expected.dtype, expected.strides)
    assert is_shared(made)
    if maker != "empty_like":
        np.testing.assert_array_equal(plain(made), expected)


def test_the_like_forms_can_change_type_and_shape():
    made = forkshm.full_like(forkshm.zeros((2, 3), "i4"), 7.5, "f8", (4,))
    np.testing.assert_array_equal(plain(made), np.full(4, 7.5))
    assert forkshm.zeros_like([1, 2], float).dtype == float
    assert forkshm.ones_like([1, 2], shape=(2, 2)).shape == (2, 2)
    assert forkshm.full_like([1, 2], 3).tolist() == [3, 3]


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: forkshm.empty(3, object), lambda: forkshm.zeros(3, [("a", "O")])])
def test_objects_cannot_be_shared(make):
    before = len(open_fds())
    with pytest.raises(TypeError, match="holds Python objects, which live in one process"):
        make()
    assert len(open_fds()) == before


def test_objects_cannot_be_shared_by_copying_either():
    for make in (forkshm.array, forkshm.asarray):
        with pytest.raises(TypeError, match="dtype object"):
            make([{}, None])


@pytest.mark.parametrize("shape", [-1, (2, -3), (-1, -1)])
def test_negative_extents_are_refused_with_the_shape(shape):
    with pytest.raises(ValueError, match=r"negative extent, got shape \(.*-"):
        forkshm.zeros(shape)


@pytest.mark.parametrize("shape", [1.5, "3", (2, 1.0), None])
def test_extents_are_integers(shape):
    with pytest.raises(TypeError):
        forkshm.empty(shape)


@pytest.mark.parametrize(
    ("shape", "kind"), [(2**62, ValueError), ((2**40, 2**40), ValueError), (2**58, RegionCreateError)]
)
def test_too_large_a_shape_is_refused_with_the_size(shape, kind):
    before = len(open_fds())
    with pytest.raises(kind):
        forkshm.zeros(shape)
    assert len(open_fds()) == before


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order"):
        forkshm.empty(3, order="X")


# -- which results stay shared ---------------------------------------------------------

VIEWS = {
    "slice of a slice": lambda a: a[1:][:, ::2],
    "slice of a transpose": lambda a: a.T[1:],
    "slice": lambda a: a[1:3],
    "step": lambda a: a[::2, ::-1],
    "row": lambda a: a[1],
    "transpose": lambda a: a.T,
    "swapaxes": lambda a: a.swapaxes(0, 1),
    "reshape": lambda a: a.reshape(2, 6),
    "ravel": lambda a: a.ravel(),
    "newaxis": lambda a: a[:, None],
    "ellipsis": lambda a: a[...],
    "view": lambda a: a.view("u1"),
    "squeeze": lambda a: a[:1].squeeze(),
    "np.transpose": np.transpose,
    "np.flip": np.flip,
    "np.split": lambda a: np.split(a, 3)[1],
    "astype without a copy": lambda a: a.astype(a.dtype, copy=False),
}

COPIES = {
    "fancy of a slice": lambda a: a[1:][[0, 1]],
    "fancy of a transpose": lambda a: a.T[[0, 1]],
    "mask of a slice": lambda a: a[1:][a[1:] > 3],
    "copy": lambda a: a.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "flatten": lambda a: a.flatten(),
    "astype": lambda a: a.astype("f4"),
    "integers as index": lambda a: a[[0, 2]],
    "bools as index": lambda a: a[a > 3],
    "ravel across": lambda a: a.T.ravel(),
    "plus": lambda a: a + 1,
    "reflected": lambda a: 2 * a,
    "with another": lambda a: a * a,
    "matmul": lambda a: a @ a.T,
    "negative": lambda a: -a,
    "comparison": lambda a: a > 3,
    "sum over an axis": lambda a: a.sum(axis=0),
    "cumsum": lambda a: a.cumsum(),
    "take": lambda a: a.take([0, 1]),
    "argsort": lambda a: a.argsort(),
    "compress": lambda a: a.compress([True, False, True], 0),
    "byteswap": lambda a: a.byteswap(),
    "reshape across": lambda a: a.T.reshape(12),
    "np.sin": np.sin,
    "np.where": lambda a: np.where(a > 3, a, 0),
    "np.concatenate": lambda a: np.concatenate([a, a]),
    "np.stack": lambda a: np.stack([a, a]),
    "np.sort": lambda a: np.sort(a, axis=None),
    "np.mean": lambda a: np.mean(a, axis=1),
    "np.add.reduce": lambda a: np.add.reduce(a),
    "np.add.outer": lambda a: np.add.outer(a[0], a[1]),
    "np.zeros_like": np.zeros_like,
    "np.copy": np.copy,
    "np.array": np.array,
    "np.linalg.inv": lambda a: np.linalg.inv(plain(a)[:3, :3] + np.eye(3)),
    "clip": lambda a: a.clip(2, 5),
    "round": lambda a: a.round(),
    "repeat": lambda a: a.repeat(2),
    "conjugate": lambda a: (a + 1j).conj(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_a_shared_array_in_the_same_region(name):
    array = forkshm.array(np.arange(12.0).reshape(3, 4))
    view = VIEWS[name](array)
    assert is_shared(view)
    assert view.region is array.region
    assert np.shares_memory(plain(view), plain(array))
    np.testing.assert_array_equal(plain(view), VIEWS[name](plain(array)))


@pytest.mark.parametrize("name", COPIES)
def test_operations_that_allocate_return_plain_arrays(name):
    array = forkshm.array(np.arange(12.0).reshape(3, 4))
    result = COPIES[name](array)
    assert is_plain(result)
    assert not np.shares_memory(result, plain(array))
    np.testing.assert_array_equal(result, COPIES[name](plain(array)))


@pytest.mark.parametrize(
    "reduce", [np.sum, np.max, np.mean, np.argmax, lambda a: a.sum(), lambda a: a.std(), lambda a: a[1, 2]]
)
def test_a_single_value_is_a_scalar(reduce):
    array = forkshm.array(np.arange(12.0).reshape(3, 4))
    result, expected = reduce(array), reduce(plain(array))
    assert result == expected
    assert type(result) is type(expected)


def test_a_plain_array_and_a_shared_one_mix():
    shared, private = forkshm.ones(3), np.arange(3.0)
    for result in (shared + private, private + shared, np.maximum(private, shared), private @ shared):
        assert not isinstance(result, SharedArray)
    private += shared
    assert private.tolist() == [1, 2, 3]


def test_functions_of_several_results_give_plain_arrays():
    quotient, remainder = np.divmod(forkshm.array([7, 8]), 3)
    assert is_plain(quotient)
    assert is_plain(remainder)
    assert (quotient.tolist(), remainder.tolist()) == ([2, 2], [1, 2])


def test_operations_in_place_keep_the_array_and_its_memory():
    array = forkshm.array(np.arange(6.0))
    same, region = array, array.region
    array += 1
    array *= plain(array)
    array -= forkshm.ones(6)
    array[1:3] += 10
    assert array is same
    assert array.region is region
    assert array.tolist() == [0, 13, 18, 15, 24, 35]


def test_results_written_into_a_shared_array_give_that_array():
    array, source = forkshm.zeros(3), np.arange(3.0)
    assert np.add(source, 1, out=array) is array
    assert array.tolist() == [1, 2, 3]
    assert np.add(source, 1, out=array, where=[True, False, True]) is array
    assert source.sum(out=forkshm.zeros(())) == 3
    assert is_shared(np.cumsum(source, out=array))
    assert array.tolist() == [0, 1, 3]
    assert np.clip(source, 1, 1, out=array) is array
    np.copyto(array, 5)
    assert array.tolist() == [5, 5, 5]


def test_several_results_with_out_return_the_shared_arrays():
    first, second = forkshm.zeros(2, int), forkshm.zeros(2, int)
    results = np.divmod(np.array([7, 8]), 3, out=(first, second))
    assert results[0] is first
    assert results[1] is second
    assert (first.tolist(), second.tolist()) == ([2, 2], [1, 2])


def test_updating_at_repeated_indices_works():
    array = forkshm.zeros(3)
    np.add.at(array, [0, 0, 2], 1)
    assert array.tolist() == [2, 0, 1]


def test_a_shared_array_prints_as_an_array():
    assert repr(forkshm.array([1, 2])) == "SharedArray([1, 2])"
    assert str(forkshm.array([1, 2])) == "[1 2]"


def test_a_view_as_shared_array_of_private_memory_has_no_region():
    assert np.zeros(3).view(SharedArray).region is None


def test_an_empty_slice_at_the_end_never_belongs_to_the_next_region():
    arrays = [forkshm.zeros(PAGE, "u1") for _ in range(10)]
    for array in arrays:
        tail = array[PAGE:]
        assert tail.size == 0
        assert getattr(tail, "region", None) in (None, array.region)


# -- plain pickles and copies ---------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[::-1], lambda a: a.T, lambda a: a[:0]], ids=list("artz"))
def test_a_plain_pickle_carries_the_elements_and_loads_as_a_plain_array(protocol, view):
    array = view(forkshm.array(np.arange(12.0).reshape(3, 4)))
    loaded = pickle.loads(pickle.dumps(array, protocol))
    assert is_plain(loaded)
    np.testing.assert_array_equal(loaded, plain(array))
    array[...] = -1
    assert not (loaded == -1).any()


def test_a_plain_pickle_is_read_without_us(run_script, tmp_path):
    path = tmp_path / "array.pickle"
    path.write_bytes(pickle.dumps(forkshm.array([1, 2, 3])))
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).tolist(), 'forkshm' in sys.modules)"
    assert run_script(
        f"with open({str(path)!r}): pass\n" + script.replace("open(", "__import__('io').FileIO("), path
    ) == ("[1, 2, 3] False\n")


def test_a_deep_copy_of_something_with_shared_arrays_has_plain_ones():
    array = forkshm.ones(3)
    copied = copy.deepcopy({"a": [array]})["a"][0]
    array[0] = 5
    assert is_plain(copied)
    assert copied.tolist() == [1, 1, 1]


def test_saving_to_a_file_and_loading_works(tmp_path):
    np.save(tmp_path / "array.npy", forkshm.array([1, 2, 3]))
    assert np.load(tmp_path / "array.npy").tolist() == [1, 2, 3]


def test_a_data_frame_can_be_made_over_shared_memory():
    pandas = pytest.importorskip("pandas")
    array = forkshm.array(np.arange(6.0).reshape(3, 2))
    frame = pandas.DataFrame(array, columns=["a", "b"])
    assert frame["b"].sum() == 9
    assert (frame * 2)["a"].tolist() == [0, 4, 8]


# -- lifetime and processes -----------------------------------------------------------


def regions_mapped():
    with open("/proc/self/maps") as maps:
        return sum("forkshm-region" in line for line in maps)


def test_the_region_lives_as_long_as_the_last_array_and_no_longer():
    before = regions_mapped()
    array = forkshm.zeros((100, 100))
    part = array[3:5].T
    assert regions_mapped() == before + 1
    del array
    gc.collect()
    part[...] = 1
    assert part.sum() == 200
    assert regions_mapped() == before + 1
    del part
    assert regions_mapped() == before


def test_the_region_of_an_array_cannot_be_closed_while_the_array_lives():
    array = forkshm.zeros(10)
    region = array.region
    with pytest.raises(forkshm.errors.RegionBusyError):
        region.close()
    array[0] = 1
    del array
    region.close()


def test_the_parent_sees_a_forked_childs_writes(in_child):
    array = forkshm.zeros((10, 10))

    def write():
        array[3] = 4
        array[:, 5] += 1

    assert in_child(write) == 0
    assert (array[3, 0], array[0, 5], array[3, 5]) == (4, 1, 5)


WITHOUT_NUMPY = """
import sys

class NoNumPy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

sys.meta_path.insert(0, NoNumPy())
import forkshm

def look():
    for name in ("zeros", "SharedArray", "asarray"):
        try:
            getattr(forkshm, name)
        except forkshm.errors.MissingDependencyError as error:
            assert isinstance(error, ImportError)
            assert error.extra == "numpy"
            print(error)

def write(region):
    region.buf[:] = b"abc"

def main():
    look()
    with forkshm.anonymous_shared_memory(3) as region, forkshm.Pool(2) as pool:
        assert pool.map(abs, [-1, -2, 3]) == [1, 2, 3]
        assert pool.apply(len, (b"x" * 100_000,)) == 100_000
        pool.apply(write, (region,))
        assert bytes(region.buf) == b"abc"
    assert "numpy" not in sys.modules

if __name__ == "__main__":
    main()
"""


def test_without_numpy_only_arrays_are_missing_and_say_what_to_install(run_script):
    said = run_script(WITHOUT_NUMPY).splitlines()
    assert said == [
        f"cannot use forkshm.{name}: NumPy is not installed. Run: pip install 'forkshm[numpy]'"
        for name in ("zeros", "SharedArray", "asarray")
    ]


def test_the_program_on_the_page_about_it_runs_without_numpy(run_script):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "systems.md").read_text()
    text = text.partition("## Without NumPy")[2].partition("\n## ")[0]
    program, said = re.search(r"```python\n(.*?)```\n\n```output\n(.*?)```", text, re.DOTALL).groups()
    assert run_script(f"import sys\nsys.modules['numpy'] = None\n{program}") == said


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.float16(2),
        np.longdouble(1) / 3,
        np.int8(-3),
        np.uint64(2**63),
        np.bool_(1),
        np.complex64(1j),
        np.datetime64("2026-11-29"),
        np.timedelta64(5, "s"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scalars_cross_as_a_plain_pickle(pool, value):
    results = [pool.apply(type(value), (value,)), *pool.map(copy.copy, [value, value], chunksize=1)]
    assert [(type(result), result) for result in results] == 3 * [(type(value), value)]
    assert tiny_stream(value) == pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    assert pack([value]).data.endswith(pickle.dumps([value], pickle.HIGHEST_PROTOCOL))
