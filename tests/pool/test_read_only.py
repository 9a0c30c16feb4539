"""An error about read-only memory names the argument and the remedy."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest

import forkshm
from forkshm import view


def fill(array, value=0):
    array[...] = value


def fill_first(things):
    things[0][...] = 1


def fill_second(_, array):
    array[...] = 1


def fill_key(things):
    things["b"][...] = 1


def fill_buffer(region):
    region.buf[0] = 1


def told(error):
    """Return the whole message: the notes, or their replacement."""
    said = [str(error), *getattr(error, "__notes__", [])]
    assert "is read-only here" not in said[0]
    return "\n".join(said)


def failure(call, *args, **kwargs):
    with pytest.raises((ValueError, TypeError, BufferError)) as caught:
        call(*args, **kwargs)
    return caught.value


READ_ONLY = "is read-only here: it was sent with"
COPY = "Send forkshm.view(x, 'copy_on_write')"


@pytest.mark.parametrize("mode", ["read_only", "read_private"])
@pytest.mark.parametrize("made", [np.zeros, forkshm.zeros], ids=["copied", "shared"])
@pytest.mark.parametrize("size", [3, 100_000])
def test_the_argument_and_the_way_out_are_named(pool, mode, made, size):
    error = failure(pool.apply, fill, (view(made(size), mode), 1))
    kind = "SharedArray" if made is forkshm.zeros else "ndarray"
    assert f"argument 0 of fill(), {kind} float64 ({size},), is read-only here" in told(error)
    assert COPY in told(error)
    # In the traceback of the worker as well.
    assert "argument 0 of fill()" in str(error.__cause__)
    # The remedy works.
    pool.apply(fill, (view(made(size), "copy_on_write"), 1))


@pytest.mark.needs("seals")
def test_a_sealed_region_and_its_way_out(pool):
    shared = forkshm.zeros(1000)
    shared.region.seal()
    error = failure(pool.apply, fill, (shared, 1))
    assert "argument 0 of fill()" in told(error)
    assert "its region is sealed" in told(error)
    pool.apply(fill, (view(shared, "copy_on_write"), 1))
    assert not shared.any()


def test_a_region_itself(pool):
    region = forkshm.anonymous_shared_memory(100)
    error = failure(pool.apply, fill_buffer, (view(region, "read_only"),))
    assert isinstance(error, TypeError)
    assert "argument 0 of fill_buffer(), " in told(error)
    assert READ_ONLY in told(error)


def test_a_shared_array_that_is_read_only_in_the_sender_is_explained(pool):
    array = forkshm.zeros(100_000)
    array.flags.writeable = False
    error = failure(pool.apply, fill, (array, 1))
    assert "because it was read-only in the process that sent it" in told(error)
    assert "copy_on_write" not in told(error)
    array.flags.writeable = True
    pool.apply(fill, (array, 1))


@pytest.mark.parametrize(
    ("call", "args", "kwargs", "where"),
    [
        (fill, (), {"array": view(np.zeros(9), "read_only")}, "argument 'array' of fill()"),
        (fill_second, (1, view(np.zeros(9), "read_only")), {}, "argument 1 of fill_second()"),
        (fill_first, ([view(np.zeros(9), "read_only")],), {}, "argument 0[0] of fill_first()"),
        (fill_key, ({"a": 1, "b": view(np.zeros(9), "read_only")},), {}, "argument 0['b'] of fill_key()"),
        (np.ndarray.sort, (view(np.zeros(9), "read_only"),), {}, "argument 0 of ndarray.sort()"),
        (np.add, (1, 2, view(np.zeros(()), "read_only")), {}, "argument 2 of add()"),
        (
            struct.pack_into,
            ("B", view(pickle.PickleBuffer(bytearray(9)), "read_only"), 0, 1),
            {},
            "argument 1 of pack_into()",
        ),
    ],
    ids=["keyword", "second", "in a list", "in a dict", "method", "output", "memoryview"],
)
def test_the_error_names_the_read_only_argument(pool, call, args, kwargs, where):
    assert where in told(failure(pool.apply, call, args, kwargs))


def test_the_error_in_a_map_names_the_item(pool):
    items = [np.zeros(9), np.zeros(9), view(np.ones(7), "read_only")]
    error = failure(pool.map, fill, items, chunksize=3)
    assert "argument 0 of fill(), ndarray float64 (7,)" in told(error)
    error = failure(pool.starmap, fill_second, [(items[2], items[0]), (items[0], items[2])], chunksize=2)
    assert "argument 1 of fill_second(), ndarray float64 (7,)" in told(error)
    assert "argument 0" not in told(error)


def raise_about_something_else(array):
    raise ValueError("a wrong value")


def raise_about_a_file(path):
    raise ValueError(f"{path} is read-only")


def test_other_errors_are_left_alone(pool):
    error = failure(pool.apply, raise_about_something_else, (view(np.zeros(3), "read_only"),))
    assert told(error) == "a wrong value"
    error = failure(pool.apply, raise_about_a_file, ("x",))
    assert told(error) == "x is read-only"


class Grumpy(ValueError):
    def __str__(self):
        if not hasattr(self, "told"):
            self.told = True
            raise RuntimeError("not now")
        return "read-only"


def raise_grumpy(array):
    raise Grumpy


def test_an_exception_that_cannot_be_inspected_is_sent_unchanged(pool):
    with pytest.raises(Grumpy):
        pool.apply(raise_grumpy, (view(np.zeros(3), "read_only"),))


def test_no_more_than_a_few_are_named(pool):
    error = failure(pool.apply, fill_first, ([view(np.zeros(3), "read_only") for _ in range(50)],))
    assert told(error).count("of fill_first()") == 5
