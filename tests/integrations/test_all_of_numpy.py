"""All functions of NumPy and all methods of an array, called with shared arrays.

A view of shared memory is a SharedArray with its region; a result with memory of its own is a plain array.
"""

from __future__ import annotations

import contextlib
import io

import pytest

import forkshm
from forkshm.region import region_at

np = pytest.importorskip("numpy")

import numpy.lib.recfunctions  # noqa: E402

MADE = {
    "matrix": lambda: forkshm.array(np.arange(1.0, 17).reshape(4, 4) + np.eye(4)),
    "transposed": lambda: forkshm.array(np.arange(1.0, 17).reshape(4, 4)).T,
    "vector": lambda: forkshm.array(np.arange(1.0, 5)),
    "strided": lambda: forkshm.array(np.arange(1.0, 9))[::2],
    "integers": lambda: forkshm.array(np.arange(1, 5)),
    "complex": lambda: forkshm.array(np.arange(1, 5) + 1j),
    "truth": lambda: forkshm.array(np.array([True, False, True, True])),
    "text": lambda: forkshm.array(np.array(["a", "bc", "d", "e"])),
    "times": lambda: forkshm.array(np.array([1, 2, 3, 4], "M8[D]")),
    "records": lambda: forkshm.array(np.array([(1, 2.0)] * 4, [("x", "i4"), ("y", "f8")])),
    "scalar": lambda: forkshm.array(np.array(3.5)),
}

POSITIONAL = [
    lambda a: (a,),
    lambda a: (a, a),
    lambda a: (a, a, a),
    lambda a: ([a, a],),
    lambda a: (a, 0),
    lambda a: (a, 1),
    lambda a: (a, 2),
    lambda a: (a, -1, 0),
    lambda a: (a, [0, 1]),
    lambda a: (a, a.dtype),
    lambda a: (a, (2, 2)),
    lambda a: (1, a),
    lambda a: (lambda x: x, 0, a),
    lambda a: ([a > 2], [a]),
    lambda a: ("ij->ji" if a.ndim > 1 else "i->i", a),
    lambda a: (),
]

KEYWORDS = [
    {},
    {"axis": 0},
    {"keepdims": True},
    {"subok": True},
    {"copy": False},
    {"copy": True, "subok": True},
    {"order": "F", "subok": True},
    {"dtype": "f4", "subok": True},
    {"dtype": float, "copy": False},
    {"ndmin": 3, "subok": True},
    {"requirements": ["F", "O", "W"]},
    {"return_index": True, "return_inverse": True, "return_counts": True},
    {"full_matrices": False},
]

SPACES = {
    "np": np,
    "np.char": np.char,
    "np.emath": np.emath,
    "np.fft": np.fft,
    "np.linalg": np.linalg,
    "np.lib.recfunctions": numpy.lib.recfunctions,
    "np.lib.stride_tricks": np.lib.stride_tricks,
}
# Functions that write files, change NumPy's settings, or do not take arrays.
LEFT_OUT = {"fromfile", "fromregex", "genfromtxt", "get_include", "info", "load", "loadtxt", "memmap", "save"}
LEFT_OUT |= {"savetxt", "savez", "savez_compressed", "set_printoptions", "setbufsize", "seterr", "seterrcall"}
LEFT_OUT |= {"show_config", "show_runtime", "source", "test", "errstate", "printoptions", "who"}
# These change the array itself, or need arguments other than arrays.
LEFT_OUT |= {"__array_ufunc__", "__dlpack__", "__init__", "__init_subclass__", "__setstate__", "__subclasshook__"}
# Aliases of `array` and `asarray` in np.char.
LEFT_OUT |= {"narray", "asnarray"}
LEFT_OUT |= {"dump", "resize", "setflags", "tofile", "__class__", "__array__"}

# Functions that return a plain array, or one of another class of NumPy, as requested. It is sent as shared memory.
PLAIN_VIEWS = {"array", "asarray", "asarray_chkfinite", "ascontiguousarray", "asfortranarray", "asmatrix", "as_strided"}
PLAIN_VIEWS |= {"bmat", "broadcast_to", "from_dlpack", "frombuffer", "matrix", "merge_arrays", "repack_fields"}
PLAIN_VIEWS |= {"require", "stack_arrays", "chararray"}
# The parameter subok= asks NumPy for a copy of the same type, which C code creates without asking the class.
COPIES_OF_THE_TYPE = {"array", "asanyarray", "require"}


def arrays_in(value, depth=0):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)) and depth < 4:
        for part in value:
            yield from arrays_in(part, depth + 1)


def fault_of(name, array):
    if not array.size:
        return None
    is_shared = region_at(array.__array_interface__["data"][0]) is not None
    if isinstance(array, forkshm.SharedArray):
        return None if is_shared and array.region is not None else "is a SharedArray in private memory"
    if is_shared:
        return None if name in PLAIN_VIEWS else f"is a {type(array).__name__} in shared memory"
    if type(array).__module__.startswith("forkshm") and name not in COPIES_OF_THE_TYPE:
        return f"is a {type(array).__name__}"
    return None


class Arrays:
    """Provides each kind of array, with its first values at every access."""

    def __init__(self):
        self._made = {}

    def __getitem__(self, kind):
        if kind not in self._made:
            array = MADE[kind]()
            self._made[kind] = array, np.array(array)
        array, values = self._made[kind]
        if (array.dtype, array.shape) != (values.dtype, values.shape):
            del self._made[kind]
            return self[kind]
        np.copyto(np.asarray(array), values)
        return array


def faults(name, find, kinds=MADE):
    """Call a function in many ways; return the faults of its results, and the number of calls that returned."""
    made, found, returned = Arrays(), set(), 0
    for kind in kinds:
        for position in POSITIONAL:
            for keywords in KEYWORDS:
                array = made[kind]
                try:
                    arguments = position(array)
                    with contextlib.redirect_stdout(io.StringIO()):
                        result = find(array)(*arguments, **keywords)
                except Exception:
                    continue  # the function does not take such arguments
                returned += 1
                for part in arrays_in(result):
                    if (fault := fault_of(name, part)) is not None:
                        found.add(f"{name} of {kind}, {len(arguments)} arguments, {keywords}: the result {fault}")
    return found, returned


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", SPACES)
def test_every_function(space):
    found, returned = set(), 0
    for name in sorted(dir(SPACES[space])):
        function = getattr(SPACES[space], name)
        if name.startswith("_") or name in LEFT_OUT or not callable(function) or isinstance(function, type):
            continue
        wrong, calls = faults(name, lambda _, function=function: function)
        found |= wrong
        returned += calls
    assert not found, "\n".join(sorted(found)[:20])
    assert returned > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_and_attribute():
    found, returned = set(), 0
    for name in sorted(dir(np.ndarray)):
        if name in LEFT_OUT or name == "__new__":
            continue
        if callable(getattr(np.ndarray, name, None)):
            wrong, calls = faults(name, lambda array, name=name: getattr(array, name))
            found |= wrong
            returned += calls
            continue
        made = Arrays()
        for kind in MADE:
            try:
                value = getattr(made[kind], name)
            except (AttributeError, BufferError, ValueError):
                continue  # the method does not take such elements
            for part in arrays_in(value):
                if (fault := fault_of(name, part)) is not None:
                    found.add(f"{name} of {kind} {fault}")
    assert not found, "\n".join(sorted(found)[:20])
    assert returned > 1000


@pytest.mark.parametrize("copy", [np.array, lambda a, subok: np.require(a.T, requirements="C")])
def test_a_copy_of_the_type_is_not_shared_and_is_sent_as_a_plain_array(copy):
    made = copy(forkshm.array(np.arange(16.0).reshape(4, 4)), subok=True)
    assert not isinstance(made, forkshm.SharedArray)
    assert made.flags.owndata
    assert type(made + 1) is type(made.sum(axis=0)) is np.ndarray
    queue = forkshm.Queue()
    queue.put(made)
    assert type(queue.get()) is np.ndarray
