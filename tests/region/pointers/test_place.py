"""place() and construct(): types that may live in a region, and their positions."""

from __future__ import annotations

import ctypes  # noqa: TID251 - the language of layouts
import gc
import os

import pytest

from forkshm import MappedRegion, Mode, anonymous_shared_memory
from forkshm.errors import RegionAccessError, RegionBusyError, RegionClosedError, RegionError, UnplaceableTypeError
from forkshm.region import Mutex
from forkshm.region.pointers._offset_ptr import OffsetPtr
from forkshm.region.pointers._place import aligned, assign, construct, place

PAGE = os.sysconf("SC_PAGE_SIZE")
# ctypes' name of an int, which is that of c_long where both have the same size.
INT = ctypes.c_int.__name__


class Point(ctypes.Structure):
    """A structure without pointers."""

    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]


class Raw(ctypes.Structure):
    """A structure with an address that is valid in one process only."""


Raw._fields_ = [("value", ctypes.c_int), ("next", ctypes.POINTER(Raw))]


@pytest.fixture
def region():
    with anonymous_shared_memory(PAGE) as made:
        yield made
        gc.collect()


def structure(*fields, base=ctypes.Structure, name="Thing", **attributes):
    return type(name, (base,), {**attributes, "_fields_": list(fields)})


# -- placing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ctypes.c_bool, True),
        (ctypes.c_char, b"a"),
        (ctypes.c_wchar, "ä"),
        (ctypes.c_int8, -5),
        (ctypes.c_uint64, 2**64 - 1),
        (ctypes.c_size_t, 7),
        (ctypes.c_float, 1.5),
        (ctypes.c_double, 2.5),
        (ctypes.c_longdouble, 3.5),
        (ctypes.c_int32.__ctype_be__, 5),
    ],
    ids=["bool", "char", "wchar", "int8", "uint64", "size_t", "float", "double", "longdouble", "big-endian int32"],
)
def test_simple_types_are_placed(region, kind, value):
    made = construct(region, kind, 64, value)
    assert made.value == place(region, kind, 64).value == value
    assert bytes(region.buf[64 : 64 + ctypes.sizeof(kind)]) == bytes(made)


def test_a_placed_object_shares_the_memory_and_leaves_the_bytes(region):
    region.buf[0:4] = (9).to_bytes(4, "little")
    one, two = place(region, Point), place(region, Point)
    assert one.x == 9
    one.y = 2.5
    assert two.y == 2.5
    assert ctypes.addressof(one) == ctypes.addressof(two) == region.address
    with MappedRegion(region) as other:
        assert place(other, Point).y == 2.5


def test_the_constructor_of_a_type_runs_in_the_region(region):
    class Counter(ctypes.Structure):
        _fields_ = [("count", ctypes.c_int), ("step", ctypes.c_int)]

        def __init__(self, start, *, step=1):
            super().__init__(start, step)

    construct(region, Counter, 0, 5, step=2)
    assert (place(region, Counter).count, place(region, Counter).step) == (5, 2)


def test_construct_overwrites_with_zeros_and_null(region):
    kind = structure(("a", ctypes.c_int64), ("p", OffsetPtr[Point]), ("ps", OffsetPtr[None] * 2), ("b", ctypes.c_int64))
    region.buf[:] = b"\xff" * PAGE
    made = construct(region, kind, 8, b=3)
    assert (made.a, made.b) == (0, 3)
    null, zero = (1).to_bytes(8, "little"), bytes(8)
    assert bytes(region.buf[:56]) == b"\xff" * 8 + zero + null * 3 + b"\3" + bytes(7) + b"\xff" * 8


def test_construct_makes_nested_pointers_null(region):
    inner = structure(("n", ctypes.c_int), ("p", OffsetPtr[Point] * 2))
    either = structure(("p", OffsetPtr[Point]), ("n", ctypes.c_int64), base=ctypes.Union)
    middle = structure(("u", either), ("i", inner))
    made = construct(region, middle * 2 * 2, 0)
    for row in made:
        for item in row:
            assert not item.u.p
            assert [bool(pointer) for pointer in item.i.p] == [False, False]


def test_the_first_member_of_a_union_is_constructed(region):
    number_first = structure(("n", ctypes.c_int64), ("p", OffsetPtr[Point]), base=ctypes.Union)
    pointer_first = structure(("p", OffsetPtr[Point]), ("n", ctypes.c_int64), base=ctypes.Union)
    assert construct(region, number_first, 0).n == 0
    assert not construct(region, pointer_first, 8).p


def test_a_type_of_no_bytes_is_placed_anywhere(region):
    empty = structure()
    for kind in (empty, ctypes.c_int * 0, empty * 3, OffsetPtr[empty] * 0):
        construct(region, kind, 0)
        construct(region, kind, PAGE)
    pointer = construct(region, OffsetPtr[empty], 0, place(region, empty, PAGE))
    assert type(pointer.get()) is empty
    assert (pointer + 5) == pointer


def test_construct_takes_the_items_of_an_array(region):
    assert list(construct(region, ctypes.c_int * 3, 0, 1, 2, 3)) == [1, 2, 3]
    point = construct(region, Point, 64, x=4)
    pointers = construct(region, OffsetPtr[Point] * 3, 128, point, None)
    assert [pointer.offset for pointer in pointers] == [64, None, None]


def test_an_exception_of_init_propagates(region):
    with pytest.raises(TypeError):
        construct(region, Point, 0, 1, "two")
    with pytest.raises(TypeError):
        construct(region, Point, 0, 1, 2, 3)


# -- positions ---------------------------------------------------------------------------


def test_an_offset_has_to_be_aligned(region):
    with pytest.raises(ValueError, match=r"cannot place Point at offset 13 .*to 8 bytes. The next .* is 16"):
        place(region, Point, 13)
    with pytest.raises(ValueError, match=rf"cannot place {INT} \* 3 at .* must be aligned to 4 bytes"):
        construct(region, ctypes.c_int * 3, 2)
    place(region, ctypes.c_char * 7, 13)
    place(region, structure(("c", ctypes.c_char), ("d", ctypes.c_double), _pack_=1, _layout_="ms"), 13)


def test_the_alignment_of_the_region_counts(region):
    """A region may start anywhere in its object."""
    with MappedRegion(region, offset=6) as odd:
        with pytest.raises(ValueError, match=r"offset 0 .* next aligned offset is 2"):
            place(odd, Point)
        place(odd, Point, 2).x = 5
    assert place(region, Point, 8).x == 5


def test_an_object_must_fit_into_the_region(region):
    place(region, Point, PAGE - 16)
    place(region, ctypes.c_char * PAGE, 0)
    with pytest.raises(
        ValueError, match=f"cannot place Point of 16 bytes at offset {PAGE - 8:,}: the region has {PAGE:,} bytes"
    ):
        place(region, Point, PAGE - 8)
    with pytest.raises(ValueError, match=rf"c_char \* {PAGE + 1} of {PAGE + 1:,} bytes at offset 0"):
        place(region, ctypes.c_char * (PAGE + 1))
    with pytest.raises(ValueError, match="the region has"):
        place(region, ctypes.c_char, 2**70)


@pytest.mark.parametrize(("offset", "error"), [(-8, ValueError), (1.5, TypeError), ("8", TypeError), (None, TypeError)])
def test_an_offset_is_a_number_from_zero(region, offset, error):
    with pytest.raises(error):
        place(region, Point, offset)
    with pytest.raises(error):
        aligned(offset, Point)


def test_the_next_aligned_offset():
    assert [aligned(offset, Point) for offset in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert aligned(3, ctypes.c_char) == 3
    assert aligned(3, ctypes.c_int * 5) == 4


def test_nothing_was_changed_when_construct_refuses(region):
    region.buf[:] = b"\xff" * PAGE
    for kind, offset in [(Point, 3), (Point, PAGE - 8), (Raw, 0)]:
        with pytest.raises((ValueError, TypeError)):
            construct(region, kind, offset)
    assert bytes(region.buf) == b"\xff" * PAGE


# -- lifetimes and modes -----------------------------------------------------------------


def test_an_object_keeps_the_memory_when_the_region_is_dropped():
    point = construct(anonymous_shared_memory(PAGE), Point, 0, 7)
    gc.collect()
    assert point.x == 7


def test_a_region_with_an_object_cannot_be_closed(region):
    point = place(region, Point)
    with pytest.raises(RegionBusyError, match="1 view of it is alive"):
        region.close()
    point.x = 3
    assert region.buf[0] == 3


def test_a_closed_region_is_refused():
    region = anonymous_shared_memory(PAGE)
    region.close()
    with pytest.raises(RegionClosedError):
        place(region, Point)
    with pytest.raises(RegionClosedError):
        construct(region, Point)


@pytest.mark.parametrize("mode", [Mode.read_only, Mode.read_private])
def test_a_read_only_region_is_refused_with_advice(region, mode):
    with MappedRegion(region, mode) as reading:
        for make in (place, construct):
            with pytest.raises(RegionAccessError, match="Map the memory copy_on_write to read it"):
                make(reading, Point)


def test_a_copy_on_write_region_of_a_file_for_reading_can_be_looked_at(tmp_path):
    path = tmp_path / "point"
    path.write_bytes(bytes(Point(3, 4.5)))
    with path.open("rb") as file, MappedRegion(file, Mode.copy_on_write) as region:
        point = place(region, Point)
        assert (point.x, point.y) == (3, 4.5)
        point.x = 5
        del point
    assert path.read_bytes() == bytes(Point(3, 4.5))


# -- types that may not live in a region -------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "telling"),
    [
        (ctypes.c_void_p, r"it is a c_void_p, an address in one process. Use OffsetPtr\[None\]"),
        (ctypes.c_char_p, r"it is a c_char_p, an address in one process. Use OffsetPtr\[c_char\], or keep the text"),
        (ctypes.c_wchar_p, r"it is a c_wchar_p, an address in one process. Use OffsetPtr\[c_wchar\], or keep the text"),
        (ctypes.py_object, "it is a Python object, which exists in one process only"),
        (ctypes.POINTER(ctypes.c_int), rf"it is a POINTER\({INT}\), an address in one process. Use OffsetPtr\[{INT}\]"),
        (
            ctypes.POINTER(ctypes.POINTER(Point)),
            r"it is a POINTER\(POINTER\(Point\)\), .* Use OffsetPtr\[POINTER\(Point\)\]",
        ),
        (ctypes.CFUNCTYPE(ctypes.c_int), "it is the address of a function in one process. Store a number"),
        (ctypes.PYFUNCTYPE(None), "it is the address of a function in one process"),
    ],
    ids=["void_p", "char_p", "wchar_p", "py_object", "pointer", "pointer to pointer", "function", "python function"],
)
def test_types_valid_in_one_process_only_are_refused_with_their_path(region, kind, telling):
    subclass = type("Sub", (kind,), {"_type_": kind._type_} if hasattr(kind, "_type_") else {"_flags_": 1})
    holder = structure(("ok", ctypes.c_int), ("bad", kind), name="Holder")
    cases = {
        "Node.bad": structure(("bad", kind), name="Node"),
        "Node.items[].bad": structure(("items", holder * 3), name="Node"),
        "Node.items[]": structure(("items", kind * 3), name="Node"),
        "Node.deep[][].bad": structure(("deep", holder * 2 * 2), name="Node"),
        "Node.inner.bad": structure(("inner", holder), name="Node", _anonymous_=("inner",)),
        "Node.either.bad": structure(
            ("either", structure(("n", ctypes.c_int), ("bad", kind), base=ctypes.Union)), name="Node"
        ),
        "Union.bad": structure(("n", ctypes.c_int), ("bad", kind), base=ctypes.Union, name="Union"),
        "Derived.bad": structure(("more", ctypes.c_int), base=holder, name="Derived"),
        "Derived2.bad": type("Derived2", (holder,), {}),
        "Holder * 2[].bad": holder * 2,
        "Node.next[0].bad": structure(("next", OffsetPtr[holder]), name="Node"),
        "Node.a.many[][0].bad": structure(("a", structure(("many", OffsetPtr[holder] * 2))), name="Node"),
        "Node.sub": structure(("sub", subclass), name="Node"),
    }
    for path, made in cases.items():
        for make in (place, construct):
            with pytest.raises(UnplaceableTypeError, match=telling) as raised:
                make(region, made)
            assert raised.value.path == path
            assert str(raised.value).startswith(f"a region cannot hold {path}: it is ")
            assert isinstance(raised.value, RegionError)
            assert isinstance(raised.value, TypeError)


def test_the_error_names_the_replacement(region):
    with pytest.raises(UnplaceableTypeError) as raised:
        place(region, Raw)
    assert str(raised.value) == (
        "a region cannot hold Raw.next: it is a POINTER(Raw), an address in one process. Use OffsetPtr[Raw]."
    )


def test_an_invalid_target_type_is_refused_on_every_path(region):
    link = OffsetPtr[ctypes.c_char_p]
    with pytest.raises(UnplaceableTypeError, match=r"c_char_p"):
        construct(region, link)
    far = structure(("raw", OffsetPtr[OffsetPtr[Raw]]), name="Far")
    with pytest.raises(UnplaceableTypeError) as raised:
        place(region, far)
    assert raised.value.path == "Far.raw[0][0].next"
    loose = link.from_buffer(region.buf)
    with pytest.raises(UnplaceableTypeError):
        loose.set(None) or loose.set(loose)
    del loose


@pytest.mark.parametrize(
    ("kind", "telling"),
    [
        (int, "it is int, which is not a ctypes type. Describe the memory with ctypes"),
        (5, "it is 5, which is not a ctypes type"),
        (Mutex, r"which is not a ctypes type. Construct it in the region: Mutex\(region, offset\)"),
        (Point(), "which is not a ctypes type"),
        (ctypes.Structure, "it is Structure, which has no size. Give it _fields_"),
        (ctypes.Array, "it is Array, which has no size"),
        (ctypes._SimpleCData, "it is _SimpleCData, which has no size"),
    ],
)
def test_types_without_a_layout_are_refused(region, kind, telling):
    with pytest.raises(UnplaceableTypeError, match=telling):
        place(region, kind)


def test_cycles_and_deep_types_are_checked_once_and_end(region):
    one, two = type("One", (ctypes.Structure,), {}), type("Two", (ctypes.Structure,), {})
    one._fields_ = [("two", OffsetPtr[two]), ("me", OffsetPtr[one] * 2)]
    two._fields_ = [("one", OffsetPtr[one]), ("raw", ctypes.c_void_p)]
    for _ in range(2):
        with pytest.raises(UnplaceableTypeError) as raised:
            place(region, one)
        assert raised.value.path == "One.two[0].raw"


def test_a_structure_gets_its_fields_later(region):
    late = type("Late", (ctypes.Structure,), {})
    user = structure(("late", OffsetPtr[late]))
    construct(region, user)
    late._fields_ = [("n", ctypes.c_int), ("again", OffsetPtr[late])]
    made = construct(region, late, 64, 5)
    made.again = made
    construct(region, user, 0, made)
    assert place(region, user).late.get().again.get().n == 5


# -- types that may ----------------------------------------------------------------------


def test_bit_fields_unions_inheritance_and_packing(region):
    flags = structure(("a", ctypes.c_uint, 3), ("b", ctypes.c_uint, 5))
    either = structure(("whole", ctypes.c_uint32), ("bytes", ctypes.c_ubyte * 4), base=ctypes.Union)
    base = structure(("flags", flags), ("either", either), _anonymous_=("either",))
    kind = structure(("p", OffsetPtr[flags]), base=base)
    made = construct(region, kind, 64)
    made.flags.a, made.whole = 5, 0x01020304
    made.p = made.flags
    there = place(region, kind, 64)
    assert (there.flags.a, there.flags.b, sorted(there.bytes), there.p.get().a) == (5, 0, [1, 2, 3, 4], 5)
    there.flags.b = 31
    assert made.p[0].b == 31


def test_packed_pointers(region):
    kind = structure(("c", ctypes.c_char), ("p", OffsetPtr[Point]), _pack_=1, _layout_="ms")
    made = construct(region, kind, 3, b"x")
    made.p = place(region, Point, 64)
    assert (made.p.distance, made.p.offset, place(region, kind, 3).p.get().x) == (64 - 4, 64, 0)


def test_structures_of_the_other_byte_order(region):
    class Big(ctypes.BigEndianStructure):
        _fields_ = [("n", ctypes.c_uint32), ("p", OffsetPtr["Big"])]

    made = construct(region, Big, 0, 1)
    made.p = made
    assert bytes(region.buf[:4]) == b"\0\0\0\1"
    assert made.p.get().n == 1


def test_custom_assignment_of_a_structure_still_runs(region):
    class Guarded(ctypes.Structure):
        _fields_ = [("link", OffsetPtr["Guarded"]), ("n", ctypes.c_int)]
        calls = 0

        def __setattr__(self, name, value):
            type(self).calls += 1
            super().__setattr__(name, value)

    made = construct(region, Guarded, 0, n=1)
    made.link = made
    assert made.link.get().n == 1
    assert Guarded.calls == 2


def test_types_without_pointers_are_left_as_they_were(region):
    before = dict(vars(Point))
    place(region, Point * 3)
    assert dict(vars(Point)) == before
    assert "__setitem__" not in vars(Point * 3)
    points = construct(region, Point * 3)
    assign(points, (Point * 3)(Point(1, 2), Point(3, 4)))
    assert (points[1].x, points[2].x) == (3, 0)


def test_a_large_array_is_checked_by_its_one_type():
    kind = structure(("p", OffsetPtr[None]), ("n", ctypes.c_int64)) * 1_000_000
    with anonymous_shared_memory(ctypes.sizeof(kind)) as region:
        items = place(region, kind)
        items[999_999].n = 5
        items[999_999].p = items[0]
        assert items[999_999].p.offset == 0
        del items
