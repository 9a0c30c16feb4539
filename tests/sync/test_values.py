"""Value, Array, RawValue, RawArray and the heap behind them."""

from __future__ import annotations

import ctypes  # noqa: TID251 - the types of values
import gc

import numpy as np
import pytest

import forkshm
from forkshm.heap import Arena, BufferWrapper
from forkshm.sharedctypes import copy, synchronized


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("y", ctypes.c_double))


class Point3(Point):
    _fields_ = (("z", ctypes.c_double),)


def test_a_structure_has_its_fields_under_the_lock(pool):
    point = forkshm.Value(Point3, 1.0, 2.0, 3.0)
    assert (point.x, point.y, point.z) == (1.0, 2.0, 3.0)

    def move(point):
        with point.get_lock():
            point.x += 10
        point.get_obj().z = 7.0

    pool.apply(move, (point,))
    assert (point.x, point.z) == (11.0, 7.0)


@pytest.mark.parametrize("make", [forkshm.Value, forkshm.Array, forkshm.RawValue, forkshm.RawArray])
@pytest.mark.parametrize("typecode", ["x", "ii", ""])
def test_a_typecode_that_there_is_not_is_refused(make, typecode):
    with pytest.raises(TypeError, match=f"bad typecode '{typecode}': use a ctypes type, or one of the type codes c, "):
        make(typecode, 1)


def test_arrays_of_arrays_cross(pool):
    table = forkshm.RawArray(ctypes.c_int * 3, 2)

    def fill(table):
        table[1][2] = 5
        return table

    back = pool.apply(fill, (table,))
    assert table[1][2] == 5
    back[0][0] = 6
    assert table[0][0] == 6


def test_plain_ctypes_objects_are_sent_by_value(pool):
    kept = forkshm.Value("i", 1), forkshm.RawArray("i", 2)
    assert pool.apply(lambda number: number.value, (ctypes.c_int(5),)) == 5
    assert list(pool.apply(lambda numbers: numbers, ((ctypes.c_int * 2)(1, 2),))) == [1, 2]
    with pytest.raises(ValueError, match="pointers"):
        pool.apply(id, ((ctypes.POINTER(ctypes.c_int) * 2)(),))
    del kept


class Line(ctypes.Structure):
    _fields_ = (("start", Point), ("ends", Point * 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: forkshm.RawArray(Point, 3)[1],
        lambda: forkshm.RawValue(Line).start,
        lambda: forkshm.RawArray(Line, 2)[1].ends[1],
        lambda: forkshm.Value(Line).get_obj().start,
        lambda: forkshm.anonymous_shared_memory(4096).construct(Point),
        lambda: Point.from_buffer(forkshm.anonymous_shared_memory(4096).buf, 64),
        lambda: Point.from_buffer(forkshm.zeros(10)),
    ],
)
def test_ctypes_objects_over_shared_memory_are_shared(pool, make):
    point = make()

    def move(point):
        point.x += 1
        return point

    back = pool.apply(move, (point,))
    assert point.x == 1
    back.y = 5
    assert (type(back), point.y) == (type(point), 5)


def test_a_shared_array_as_a_ctypes_array_is_shared(pool):
    array = forkshm.zeros(4)
    pool.apply(lambda numbers: numbers.__setitem__(1, 4), (np.ctypeslib.as_ctypes(array),))
    assert array[1] == 4


def test_parts_of_private_ctypes_objects_are_sent_by_value(pool):
    points = (Point * 3)()
    points[1].x = 4
    back = pool.apply(lambda point: point, (points[1],))
    back.x += 1
    assert (back.x, points[1].x) == (5, 4)
    assert pool.apply(lambda number: number.value, (ctypes.c_int.from_buffer(bytearray(b"\1\0\0\0")),)) == 1
    read_only = pool.apply(lambda point: point, (forkshm.view(forkshm.RawArray(Point, 3)[1], "read_only"),))
    assert read_only.x == 0


def test_pointers_are_refused_wherever_they_are(pool):
    region = forkshm.anonymous_shared_memory(64)
    with pytest.raises(ValueError, match=r"pointers.*args\[0\]"):
        pool.apply(id, (ctypes.POINTER(ctypes.c_int).from_buffer(region.buf),))


def test_a_copy_has_memory_of_its_own():
    first = forkshm.RawValue(Point, 1.0, 2.0)
    second = copy(first)
    second.x = 5.0
    assert (first.x, second.x, second.y) == (1.0, 5.0, 2.0)


@pytest.mark.parametrize("size", [0, 1, 3, 65_536, 65_537, 1_000_000])
def test_sizes(size, pool):
    array = forkshm.Array("B", size)
    assert len(array) == size
    assert not any(array[:])
    if size:
        pool.apply(lambda array: array.__setitem__(-1, 9), (array,))
        assert array[size - 1] == 9


def test_strings():
    text = forkshm.Array("c", b"hello")
    assert (text.value, text.raw) == (b"hello", b"hello")
    text.value = b"hi"
    assert text.raw == b"hi\0lo"


def test_locks_of_ones_own(pool):
    lock = forkshm.Lock()
    value, array = forkshm.Value("i", lock=lock), forkshm.Array("i", 2, lock=lock)
    assert value.get_lock() is array.get_lock() is lock
    one, other = pool.apply(lambda *both: both, (value, array))
    with one.get_lock():
        assert not other.get_lock().acquire(block=False)
        assert not lock.acquire(block=False)
    assert isinstance(forkshm.Value("i", lock=False), ctypes.c_int)
    with pytest.raises(AttributeError, match="no method 'acquire'"):
        forkshm.Value("i", lock="no lock")
    with pytest.raises(AssertionError, match="already synchronized"):
        synchronized(value)


def test_neighbors_in_a_slab_do_not_disturb_each_other():
    arrays = [forkshm.RawArray("B", size) for size in range(1, 300)]
    for number, array in enumerate(arrays):
        array[:] = [number % 251] * len(array)
    assert all(set(array) == {number % 251} for number, array in enumerate(arrays))


def test_memory_is_freed_with_its_last_object():
    before = forkshm.statistics().regions
    things = [forkshm.Array("d", 10) for _ in range(10_000)] + [forkshm.RawArray("d", 100_000)]
    assert forkshm.statistics().regions > before
    view = np.frombuffer(things[5].get_obj())
    del things
    gc.collect()
    assert forkshm.statistics().regions == before + 1
    assert view[0] == 0.0
    del view
    assert forkshm.statistics().regions == before


def test_the_child_of_a_fork_takes_other_memory(in_child):
    first = forkshm.RawValue("i", 1)

    def make():
        mine = [forkshm.RawValue("i", 7) for _ in range(100)]
        return sum(one.value for one in mine) != 700

    assert in_child(make) == 0
    mine = [forkshm.RawValue("i") for _ in range(100)]
    assert not any(one.value for one in mine)
    assert first.value == 1


def test_wrappers_of_memory(pool):
    wrapper = BufferWrapper(10)
    pool.apply(lambda wrapper: wrapper.create_memoryview().__setitem__(0, 3), (wrapper,))
    assert wrapper.create_memoryview()[0] == 3
    arena = Arena(100)
    pool.apply(lambda arena: arena.buffer.__setitem__(0, 4), (arena,))
    assert arena.buffer[0] == 4
    with pytest.raises(ValueError, match="out of range"):
        BufferWrapper(-1)
    with pytest.raises(OverflowError):
        BufferWrapper(2**63)


def test_nothing_waits_for_the_collector():
    before = forkshm.statistics().regions
    gc.disable()
    try:
        things = [forkshm.Lock(), forkshm.RLock(), forkshm.Semaphore(), forkshm.Event(), forkshm.Barrier(2)]
        things += [forkshm.Condition(), forkshm.Value("i"), forkshm.Array("d", 100_000), forkshm.RawValue("d")]
        assert forkshm.statistics().regions > before
        del things
        assert forkshm.statistics().regions == before
    finally:
        gc.enable()
