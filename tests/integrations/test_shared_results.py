"""Methods and functions of NumPy applied to a SharedArray return views of its memory, or plain arrays."""

from __future__ import annotations

import itertools
import pickle
import warnings

import pytest
from consuming import receive

import forkshm
from forkshm.pickler import pack

np = pytest.importorskip("numpy")


def arrays_in(result):
    if isinstance(result, np.ndarray):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from arrays_in(part)
    elif isinstance(result, dict):
        for part in result.values():
            yield from arrays_in(part)


def check(result, what):
    for array in arrays_in(result):
        if isinstance(array, forkshm.SharedArray):
            assert array.region is not None, f"{what}: a SharedArray without a region"
        assert isinstance(array, (forkshm.SharedArray, np.ndarray)), what


def made(dtype=float):
    return forkshm.array(np.arange(1, 17).reshape(4, 4).astype(dtype))


# Methods without an array argument, or with effects elsewhere.
_NOT_CALLED = {"base", "tofile", "dump", "resize", "setflags", "dumps", "itemset", "newbyteorder", "tostring"}
ARGUMENTS = (
    (),
    (0,),
    (1,),
    (-1,),
    ([1, 0],),
    (float,),
    (2, 0),
    ([True, False, True, True], 0),
    (0, 1),
    ("<i4",),
    (None,),
    ("cpu",),
    ("i1", 0),
    ([np.arange(4)],),
    (1, "i1"),
    (1, "?"),
    ("?", 0),
)


def called_with_anything(name, dtype):
    """Call a method, or get an attribute, in all ways that it accepts; return the number of these ways."""
    called = 0
    for arguments in ARGUMENTS:
        for base in (made(dtype), made(dtype)[1:, ::2], made(dtype)[0], np.squeeze(made(dtype)[:1, :1])):
            plain = np.array(base)
            try:
                expected = getattr(plain, name)
                result = getattr(base, name)
                if callable(expected):
                    expected, result = expected(*arguments), result(*arguments)
            except (TypeError, ValueError, IndexError, AttributeError, KeyError):
                continue
            called += 1
            check(result, f"{name}{arguments}")
            for mine, theirs in zip(arrays_in(result), arrays_in(expected), strict=True):
                if mine.dtype.kind != "O":
                    np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    return called


@pytest.mark.parametrize("dtype", ["f8", "c16", "i4", "?"])
def test_methods_and_attributes_return_views_or_plain_arrays(dtype):
    names = [name for name in dir(np.ndarray) if not name.startswith("_") and name not in _NOT_CALLED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        never = [name for name in names if not called_with_anything(name, dtype)]
    assert set(never) <= {"getfield", "mT", "setfield", "to_device", "choose"}, "called with nothing that they take"


VIEWS = {
    "T": lambda s: s.T,
    "real": lambda s: s.real,
    "slice": lambda s: s[1:],
    "reshape": lambda s: s.reshape(2, 8),
    "ravel": lambda s: s.ravel(),
    "squeeze": lambda s: s[:1].squeeze(),
    "transpose": lambda s: s.transpose(),
    "view": lambda s: s.view("i8"),
    "diagonal": lambda s: s.diagonal(),
    "swapaxes": lambda s: s.swapaxes(0, 1),
    "np.transpose": np.transpose,
    "np.split": lambda s: np.split(s, 2)[1],
    "np.atleast_3d": np.atleast_3d,
    "np.broadcast_to": lambda s: np.broadcast_to(s, (3, 4, 4)),
    "np.expand_dims": lambda s: np.expand_dims(s, 0),
    "np.flip": np.flip,
    "np.ravel": np.ravel,
    "np.reshape": lambda s: np.reshape(s, -1),
    "np.moveaxis": lambda s: np.moveaxis(s, 0, 1),
    "np.asanyarray": np.asanyarray,
    "as_strided": lambda s: np.lib.stride_tricks.as_strided(s, (2, 2), (8, 8), subok=True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_shared(name):
    s = made()
    view = VIEWS[name](s)
    assert isinstance(view, forkshm.SharedArray)
    assert view.region is s.region
    assert np.shares_memory(view, s)


PLAIN = {
    "dot": lambda s: s.dot(s),
    "@": lambda s: s @ s,
    "argmax": lambda s: s.argmax(0),
    "argmin": lambda s: s.argmin(1),
    "imag": lambda s: s.imag,
    "flat": lambda s: s.flat[3:5],
    "flat, all": lambda s: np.asarray(s.flat),
    "cumsum": lambda s: s.cumsum(0),
    "sum": lambda s: s.sum(0),
    "round": lambda s: s.round(1),
    "inv": lambda s: np.linalg.inv(s + np.eye(4)),
    "svd": lambda s: np.linalg.svd(s)[0],
    "fft": lambda s: np.fft.fft(s),
    "unique": lambda s: np.unique(s, return_index=True)[0],
    "copy": lambda s: s.copy(),
    "index": lambda s: s[[0, 1]],
    "mask": lambda s: s[s > 3],
    "where": lambda s: np.where(s > 3, s, 0),
    "concatenate": lambda s: np.concatenate([s, s]),
    "a ufunc": np.sin,
    "np.array": np.array,
    "astype": lambda s: s.astype("f4"),
    "clip": lambda s: s.clip(1, 3),
    "tile": lambda s: np.tile(s, 2),
    "sort": np.sort,
    "np.copy, subok": lambda s: np.copy(s, subok=True).view(np.ndarray),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_result_of_computing_is_plain(name):
    assert type(PLAIN[name](made())) is np.ndarray


@pytest.mark.parametrize(
    "copy",
    [
        lambda s: np.array(s, subok=True),
        lambda s: np.require(s.T, requirements="C"),
        lambda s: np.asanyarray(s, "f4"),
        lambda s: np.array(s[:, ::2], subok=True, order="F"),
    ],
)
def test_a_copy_that_numpy_makes_of_the_same_type_is_not_called_shared(copy):
    s = made()
    value = copy(s)
    assert not isinstance(value, forkshm.SharedArray)
    assert value.flags.owndata
    value[:] = 0
    assert s.all()
    assert type(value + 1) is np.ndarray
    arrived = pickle.loads(pickle.dumps(value))
    assert type(arrived) is np.ndarray
    payload = pack(value)
    arrived = receive(payload.data, 0, [])[0].open()
    assert type(arrived) is np.ndarray
    assert not arrived.any()


def functions(module):
    for name in sorted(dir(module)):
        function = getattr(module, name)
        if callable(function) and not isinstance(function, type) and not name.startswith("_") and name not in _OTHER:
            yield name, function


# Functions that read, write, print, or set something.
_OTHER = {"save", "savez", "savez_compressed", "savetxt", "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "info"}
_OTHER |= {"fromregex", "show_config", "show_runtime", "set_printoptions", "seterr", "seterrcall", "setbufsize", "test"}
_OTHER |= {"get_include", "getbufsize", "geterr", "geterrcall", "frombuffer", "fromstring", "set_string_function"}


@pytest.mark.parametrize("module", [np, np.linalg, np.fft, np.lib.stride_tricks], ids=lambda module: module.__name__)
def test_functions_return_views_or_plain_arrays(module):
    s, row = made(), made()[0]
    ways = [(s,), (row,), (s, s), (row, row), ([s, s],), ([row, row],), (s, 1), (s, 0, 1), (s, [0, 1]), (s > 2, s, s)]
    ways += [(row, row, row), (s, (2, 8)), (s, (3, 4, 4)), ("ij,jk", s, s), ("i,j->ij", row, row), (s, 2, 0), (s, row)]
    for name, function in functions(module):
        for way in ways:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                try:
                    result = function(*way)
                except Exception:  # it takes other arguments
                    continue
            check(result, f"{name} of {len(way)}")
            if name not in ("array", "asarray", "asanyarray", "asfortranarray", "ascontiguousarray", "require"):
                for array in itertools.islice(arrays_in(result), 50):
                    assert type(array) in (np.ndarray, forkshm.SharedArray, np.matrix, np.recarray), name


def test_functions_return_the_out_array():
    s, out = made(), forkshm.zeros((4, 4))
    assert s.dot(s, out=out) is out
    assert s.dot(s, out) is out
    assert np.cumsum(s, axis=0, out=out) is out
    np.testing.assert_array_equal(out, np.cumsum(np.asarray(s), axis=0))
    assert np.take(s, [0, 1, 2, 3], axis=0, out=out) is out
    assert s.byteswap(inplace=True) is s


def test_flat_and_imag_can_be_set():
    s = made("c16")
    s.flat = 3
    s.flat[2] = 5
    s.imag = 1
    assert s[0, 2] == 5 + 1j
    assert s[0, 0] == 3 + 1j
    s.imag[0, 0] = 7
    assert s[0, 0] == 3 + 7j
    assert isinstance(s.imag, forkshm.SharedArray)


@pytest.mark.parametrize("dtype", [str, bytes, "U", "S", "S0", "U0", "f4", "S5", [("a", "U3")]])
def test_elements_have_the_size_that_numpy_gives_them(dtype):
    for name in ("zeros", "empty", "ones"):
        if name == "ones" and isinstance(dtype, list):
            continue
        ours, theirs = getattr(forkshm, name)(3, dtype), getattr(np, name)(3, dtype)
        assert ours.dtype == theirs.dtype
        if name != "empty":
            np.testing.assert_array_equal(np.asarray(ours), theirs)
        if ours.dtype.kind in "US":
            ours[0] = theirs[0] = "x"
            assert ours[0] == theirs[0]
    if ours.dtype.kind in "US":
        assert forkshm.full(2, "abc", dtype)[0] == np.full(2, "abc", dtype)[0]
        assert forkshm.full(2, "abc")[0] == "abc"
        assert forkshm.zeros_like(np.array(["abc"])).dtype == "U3"
