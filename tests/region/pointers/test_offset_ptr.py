"""OffsetPtr: a pointer that is correct wherever a process maps the region."""

from __future__ import annotations

import copy
import ctypes  # noqa: TID251 - the language of layouts
import gc
import itertools
import os
import pickle
import sys

import pytest
from system import in_pages

from forkshm import MappedRegion, Mode, Pool, anonymous_shared_memory
from forkshm.errors import (
    NotPicklableError,
    RegionBusyError,
    RegionError,
    UnplaceableTypeError,
    WildPointerError,
)
from forkshm.region.pointers._offset_ptr import OffsetPtr, Pointer
from forkshm.region.pointers._place import assign, construct, place

PAGE = os.sysconf("SC_PAGE_SIZE")


class Node(ctypes.Structure):
    """A node of a list."""

    _fields_ = [("value", ctypes.c_int), ("next", OffsetPtr["Node"])]


class Base(ctypes.Structure):
    """The first part of Derived."""

    _fields_ = [("number", ctypes.c_int)]


class Derived(Base):
    """A structure with more fields than Base."""

    _fields_ = [("more", ctypes.c_int)]


class Tree(ctypes.Structure):
    """A structure with pointers in arrays, in a structure, and declared after the class."""


class Pair(ctypes.Structure):
    """Two pointers, for use in other structures."""

    _fields_ = [("left", OffsetPtr[Tree]), ("right", OffsetPtr[Tree])]


Tree._fields_ = [("number", ctypes.c_int), ("pair", Pair), ("many", OffsetPtr[Tree] * 3), ("pairs", Pair * 2)]

IntPtr = OffsetPtr[ctypes.c_int]
# ctypes' name of C's int, which is that of c_long where both have the same size.
INT = ctypes.c_int.__name__


@pytest.fixture
def region():
    with anonymous_shared_memory(PAGE) as made:
        yield made
        gc.collect()


# Not fixtures, which pytest would keep longer than the region.


def ten_numbers(region):
    return construct(region, ctypes.c_int * 10, 1024, *range(10))


def null(region):
    return construct(region, IntPtr, 0)


def stored(region, offset):
    return int.from_bytes(region.buf[offset : offset + 8], sys.byteorder, signed=True)


# -- construction and assignment, as in the tests of Boost's offset_ptr ------------------


def test_a_new_pointer_is_null(region):
    pointer = null(region)
    assert not pointer
    assert pointer.get() is None
    assert pointer == None  # noqa: E711
    assert (pointer.address, pointer.offset, pointer.distance) == (0, None, 1)


def test_null_is_stored_as_the_distance_one(region):
    pointer = null(region)
    assert bytes(region.buf[:8]) == (1).to_bytes(8, sys.byteorder)
    pointer.set(pointer)
    assert stored(region, 0) == 1
    assert ctypes.sizeof(pointer) == ctypes.alignment(pointer) == 8


def test_a_pointer_stores_the_distance_from_itself_to_its_target(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    assert stored(region, 0) == pointer.distance == 1024
    behind = construct(region, IntPtr, 2048, numbers)
    assert stored(region, 2048) == behind.distance == -1024
    assert pointer == behind
    assert pointer.address == behind.address == region.address + 1024
    assert pointer.offset == behind.offset == 1024


def test_a_pointer_to_itself_is_the_distance_zero_and_not_null(region):
    own = construct(region, OffsetPtr[None], 64)
    own.set(OffsetPtr.pointer_to(own))
    assert (stored(region, 64), bool(own), own.address) == (0, True, region.address + 64)
    assert own.cast(OffsetPtr[None]).get().distance == 0


def test_a_pointer_can_point_to_its_own_structure(region):
    node = construct(region, Node, 0)
    node.next = node
    assert node.next.distance == -Node.next.offset
    assert node.next.get().next == node


def test_a_pointer_cannot_point_to_its_own_second_byte(region):
    own = construct(region, OffsetPtr[ctypes.c_ubyte], 64)
    start = OffsetPtr.pointer_to(own).cast(ctypes.c_ubyte)
    for count in (0, 2, 7, -1):
        own.set(start + count)
        assert own.offset == 64 + count
    with pytest.raises(ValueError, match="own second byte: that distance means null"):
        own.set(start + 1)
    assert own.offset == 63


def test_zeros_are_pointers_to_themselves_in_a_region_and_null_elsewhere(region):
    assert place(region, Node).next == place(region, Node).next
    assert place(region, Node).next.distance == 0
    assert place(region, Node).next
    elsewhere = Node()
    assert not elsewhere.next
    assert elsewhere.next.get() is None


def test_a_copy_of_a_pointer_has_the_same_target_and_another_distance(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    other = construct(region, IntPtr, 512, pointer)
    assert other == pointer
    assert (pointer.distance, other.distance) == (1024, 512)
    pointer.set(None)
    assert other == numbers
    other.set(pointer)
    assert not other


def test_a_pointer_in_no_region_can_only_be_null(region):
    numbers = ten_numbers(region)
    loose = IntPtr()
    assert not loose
    assert loose.distance == 1
    with pytest.raises(WildPointerError, match=rf"OffsetPtr\[{INT}\] that is in no region: it can only be null"):
        loose.set(numbers)
    with pytest.raises(WildPointerError):
        IntPtr(numbers)
    loose.set(None)
    loose._distance = 8
    with pytest.raises(WildPointerError, match="outside of every region>: it is not in a region"):
        loose.get()


@pytest.mark.parametrize("wrong", [5, 0, "x", b"12345678", object(), [1], region])
def test_invalid_targets_are_refused(region, wrong):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    with pytest.raises(TypeError, match=rf"OffsetPtr\[{INT}\] can point to {INT}, a pointer to one, or None; got "):
        pointer.set(wrong)
    assert pointer == numbers


def test_a_pointer_to_another_type_is_refused(region):
    pointer = null(region)
    double = construct(region, ctypes.c_double, 512)
    with pytest.raises(TypeError, match=r"cannot point to c_double. Use OffsetPtr\[c_double\], or cast"):
        pointer.set(double)
    with pytest.raises(TypeError, match="cannot point to c_double"):
        pointer.set(OffsetPtr.pointer_to(double))
    with pytest.raises(TypeError, match="cannot point to None"):
        pointer.set(construct(region, OffsetPtr[None], 256, double))
    pointer.set(OffsetPtr.pointer_to(double).cast(ctypes.c_int))
    assert pointer.offset == 512


def test_a_pointer_accepts_derived_types_but_not_base_types(region):
    derived, base = construct(region, Derived, 512, 1, 2), construct(region, Base, 1024, 3)
    pointer = construct(region, OffsetPtr[Base], 0, derived)
    assert pointer.get().number == 1
    down = construct(region, OffsetPtr[Derived], 8)
    with pytest.raises(TypeError, match=r"OffsetPtr\[Derived\] cannot point to Base"):
        down.set(base)
    down.set(pointer.cast(Derived))
    assert down.get().more == 2


def test_an_array_is_a_target_of_a_pointer_to_its_items(region):
    pointer = null(region)
    matrix = construct(region, ctypes.c_int * 3 * 2, 512, (1, 2, 3), (4, 5, 6))
    pointer.set(matrix)
    assert [pointer[index] for index in range(6)] == [1, 2, 3, 4, 5, 6]
    pointer.set(matrix[1])
    assert pointer.get().value == 4
    rows = construct(region, OffsetPtr[ctypes.c_int * 3], 8, matrix)
    assert list(rows[1]) == [4, 5, 6]


def test_a_pointer_to_a_pointer_takes_the_address_of_a_pointer_and_copies_its_own_kind(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    outer = construct(region, OffsetPtr[IntPtr], 8, pointer)
    assert (outer.offset, pointer.offset) == (0, 1024)
    assert outer.get().get().value == outer[0][0] == 0
    other = construct(region, OffsetPtr[IntPtr], 16, outer)
    assert other.offset == 0
    outer[0] = OffsetPtr.pointer_to(numbers).cast(ctypes.c_int) + 5
    assert pointer[0] == 5
    assert outer == pointer
    assert outer[0] == pointer.cast(ctypes.c_int)
    assert outer != numbers


def test_swap_exchanges_targets_null_too(region):
    numbers, pointer = ten_numbers(region), null(region)
    other = construct(region, IntPtr, 512, numbers)
    pointer.swap(other)
    assert pointer == numbers
    assert not other
    assert pointer.distance == 1024
    pointer.swap(pointer)
    assert pointer == numbers


# -- arithmetic --------------------------------------------------------------------------


def test_adding_moves_by_elements_and_gives_a_pointer(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    moved = pointer + 3
    assert isinstance(moved, Pointer)
    assert (moved.address - pointer.address, moved[0], moved.get().value) == (12, 3, 3)
    assert (3 + pointer) == moved == (moved + 2) - 2
    assert moved != pointer
    pointer.set(moved)
    assert pointer[0] == 3


def test_a_pointer_moves_in_place(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    same = pointer
    pointer += 4
    assert pointer is same
    assert (pointer[0], stored(region, 0)) == (4, 1024 + 16)
    pointer -= 3
    assert pointer[0] == 1
    moved = pointer + 0
    moved += 1
    assert (moved[0], pointer[0]) == (2, 1)


def test_a_field_moves_in_place(region):
    class Cursor(ctypes.Structure):
        _fields_ = [("pad", ctypes.c_int), ("at", IntPtr)]

    numbers = construct(region, ctypes.c_int * 4, 512, 7, 8, 9, 10)
    cursor = construct(region, Cursor, 0, at=numbers)
    cursor.at += 2
    assert cursor.at[0] == 9
    cursor.at -= 1
    assert cursor.at[0] == 8


def test_a_difference_is_in_elements(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    end = pointer + 10
    assert end - pointer == 10
    assert pointer - end == -10
    assert pointer - pointer == 0
    other = construct(region, IntPtr, 512, pointer + 4)
    assert other - pointer == 4
    node = construct(region, Node * 3, 2048)
    assert OffsetPtr.pointer_to(node[2]) - node[0] == 2


def test_the_end_of_a_region_can_be_pointed_to_and_not_read(region):
    pointer = null(region)
    last = PAGE // 4 - 1
    pointer.set(OffsetPtr.pointer_to(place(region, ctypes.c_int)))
    pointer += last
    assert pointer[0] == 0
    pointer += 1
    assert pointer.offset == PAGE
    with pytest.raises(
        WildPointerError, match=rf"4 bytes at address 0x[0-9a-f]+ \(offset {PAGE:,}\), outside the region"
    ):
        pointer.get()
    with pytest.raises(WildPointerError):
        pointer[0]
    assert pointer[-1] == 0
    with pytest.raises(WildPointerError):
        pointer + 1
    with pytest.raises(WildPointerError):
        pointer += 1
    assert pointer.offset == PAGE
    with pytest.raises(WildPointerError):
        pointer - (last + 2)


def test_differences_that_mean_nothing_are_refused(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    nothing = construct(region, IntPtr, 8)
    assert nothing - nothing == 0
    with pytest.raises(WildPointerError, match="one of the pointers is null"):
        pointer - nothing
    with pytest.raises(TypeError, match=rf"cannot subtract c_double from OffsetPtr\[{INT}\]"):
        pointer - construct(region, ctypes.c_double, 512)
    odd = OffsetPtr.pointer_to(numbers).cast(ctypes.c_ubyte) + 2
    with pytest.raises(ValueError, match=f"2 bytes apart, which is not a multiple of the 4 bytes of {INT}"):
        odd.cast(ctypes.c_int) - pointer
    with anonymous_shared_memory(PAGE) as other, pytest.raises(WildPointerError):
        pointer - place(other, ctypes.c_int)


def test_arithmetic_of_null_is_refused_except_by_zero(region):
    pointer = null(region)
    assert not pointer + 0
    assert not pointer - 0
    for act in (lambda: pointer + 1, lambda: pointer - 1, lambda: pointer[0], lambda: pointer.__setitem__(0, 1)):
        with pytest.raises(WildPointerError, match="it is null") as raised:
            act()
        assert raised.value.address == 0


@pytest.mark.parametrize("wrong", [1.5, "1", None])
def test_only_integers_move_a_pointer(region, wrong):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    for act in (lambda: pointer + wrong, lambda: pointer - wrong, lambda: wrong + pointer, lambda: pointer[wrong]):
        with pytest.raises(TypeError):
            act()


# -- item access -------------------------------------------------------------------------


def test_items_are_read_and_written_in_elements(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    pointer += 5
    assert (pointer[0], pointer[4], pointer[-5]) == (5, 9, 0)
    pointer[1] = 60
    pointer[-1] = 40
    assert list(numbers[4:7]) == [40, 5, 60]
    pointer.get().value = 50
    assert numbers[5] == 50


def test_an_item_is_a_structure_that_shares_its_memory(region):
    nodes = construct(region, Node * 3, 512)
    pointer = construct(region, OffsetPtr[Node], 0, nodes)
    pointer[1].value = 11
    assert nodes[1].value == 11
    nodes[1].next = nodes[2]
    pointer[0] = pointer[1]
    assert nodes[0].next == nodes[2]
    pointer[2] = Node(5)
    assert (nodes[2].value, nodes[2].next.get()) == (5, None)


def test_a_pointer_is_not_iterable(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    with pytest.raises(TypeError, match="not iterable"):
        iter(pointer)


# -- comparison --------------------------------------------------------------------------


def test_pointers_are_compared_by_target(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    same, later = construct(region, IntPtr, 8, numbers), construct(region, IntPtr, 16, pointer + 1)
    assert pointer == same
    assert not pointer != same
    assert pointer != later
    assert pointer < later
    assert pointer <= later
    assert pointer <= same
    assert later > pointer
    assert later >= pointer
    assert same >= pointer
    assert not pointer < same
    assert not pointer > same
    assert pointer + 1 == later
    assert pointer + 2 > later
    assert pointer == numbers
    assert numbers == pointer
    assert pointer < OffsetPtr.pointer_to(later) if pointer.address < ctypes.addressof(later) else True


def test_null_comes_before_everything(region):
    numbers, pointer = ten_numbers(region), null(region)
    other = construct(region, IntPtr, 8, numbers)
    assert pointer < other
    assert pointer == construct(region, OffsetPtr[Node], 16)
    assert pointer == None  # noqa: E711
    assert other != None  # noqa: E711
    assert other > None
    assert pointer <= None
    assert pointer != 0
    assert pointer != "x"
    with pytest.raises(TypeError):
        pointer < 5  # noqa: B015


def test_an_offset_ptr_is_unhashable_and_a_pointer_is_hashable(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    with pytest.raises(TypeError, match="unhashable"):
        hash(pointer)
    assert len({pointer + 1, pointer + 1, pointer + 2}) == 2


# -- casts, void -------------------------------------------------------------------------


def test_a_cast_reads_the_same_bytes_as_another_type(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    numbers[0] = 0x01020304
    seen = pointer.cast(ctypes.c_ubyte)
    assert sorted(seen[index] for index in range(4)) == [1, 2, 3, 4]
    assert seen == pointer
    assert list(pointer.cast(ctypes.c_int * 10).get())[1:] == list(range(1, 10))
    with pytest.raises(UnplaceableTypeError):
        pointer.cast(int)
    with pytest.raises(UnplaceableTypeError):
        pointer.cast(ctypes.c_void_p)


def test_a_pointer_to_anything_must_be_cast_before_use(region):
    numbers = ten_numbers(region)
    anything = construct(region, OffsetPtr[None], 0, numbers)
    assert anything
    assert anything == numbers
    assert anything.offset == 1024
    for act in (anything.get, lambda: anything[0], lambda: anything + 1, lambda: anything - anything):
        with pytest.raises(TypeError, match="it has no target type"):
            act()
    assert anything.cast(ctypes.c_int)[3] == 3
    anything.set(construct(region, Node, 64))
    assert anything.cast(Node).get().value == 0
    anything.set(construct(region, IntPtr, 128, numbers))
    assert anything == numbers
    assert anything.cast(None) == numbers
    anything.set(None)
    assert anything.get() is None


def test_pointer_to_finds_objects_and_fields(region):
    derived = construct(region, Derived, 64, 1, 2)
    assert OffsetPtr.pointer_to(derived).get().more == 2
    field = OffsetPtr.pointer_to(derived, "more")
    assert (field.offset, field[0], repr(field)) == (68, 2, f"<Pointer[{INT}] to offset 68>")
    assert OffsetPtr.pointer_to(derived, "number")[0] == 1
    with pytest.raises(AttributeError):
        OffsetPtr.pointer_to(derived, "nothing")
    with pytest.raises(WildPointerError, match=rf"the {INT} at 0x[0-9a-f]+: it is not in a region"):
        OffsetPtr.pointer_to(ctypes.c_int())
    with pytest.raises(TypeError, match="cannot point to int: pass a ctypes object in a region"):
        OffsetPtr.pointer_to(5)


def test_pointer_to_finds_fields_of_anonymous_members_and_refuses_bits(region):
    class Inner(ctypes.Structure):
        _fields_ = [("pad", ctypes.c_int), ("x", ctypes.c_double)]

    class Outer(ctypes.Structure):
        _anonymous_ = ("inner",)
        _fields_ = [("n", ctypes.c_int), ("inner", Inner), ("bits", ctypes.c_int, 3)]

    outer = construct(region, Outer, 0)
    outer.x = 2.5
    assert OffsetPtr.pointer_to(outer, "x")[0] == 2.5
    with pytest.raises(TypeError, match=r"Outer.bits: it is a bit field"):
        OffsetPtr.pointer_to(outer, "bits")


# -- types -------------------------------------------------------------------------------


def test_a_type_is_made_once():
    assert OffsetPtr[Node] is OffsetPtr[Node]
    assert OffsetPtr[Node] is not OffsetPtr[Tree]
    assert issubclass(OffsetPtr[Node], OffsetPtr)
    assert OffsetPtr[Node].__name__ == "OffsetPtr[Node]"
    assert OffsetPtr[ctypes.c_int * 3].__name__ == f"OffsetPtr[{INT} * 3]"


@pytest.mark.parametrize("wrong", [int, 5, (Node,), object()])
def test_only_types_of_ctypes_can_be_pointed_to(wrong):
    with pytest.raises(TypeError, match="is not a ctypes type"):
        OffsetPtr[wrong]


def test_a_structure_names_itself(region):
    class Local(ctypes.Structure):
        _fields_ = [("value", ctypes.c_int), ("next", OffsetPtr["Local"])]

    one, two = construct(region, Local, 0, 1), construct(region, Local, 64, 2)
    one.next = two
    assert type(one.next.get()) is Local
    assert one.next.get().value == 2


def test_a_name_is_found_around_the_pointer_and_in_its_module(region):
    class Leaf(ctypes.Structure):
        _fields_ = [("owner", OffsetPtr["Whole"]), ("node", OffsetPtr["Node"])]

    class Whole(ctypes.Structure):
        _fields_ = [("number", ctypes.c_int), ("leaves", Leaf * 2)]

    whole, node = construct(region, Whole, 0, 9), construct(region, Node, 512, 3)
    whole.leaves[1].owner = whole
    whole.leaves[1].node = node
    assert whole.leaves[1].owner.get().number == 9
    assert whole.leaves[1].node.get().value == 3


def test_a_derived_structure_keeps_the_pointer_to_its_base(region):
    class More(Node):
        _fields_ = [("more", ctypes.c_int)]

    more = construct(region, More, 0, value=1, more=2)
    more.next = more
    assert type(more.next.get()) is Node
    assert more.next.get().value == 1


def test_a_name_that_is_nowhere_says_so_and_can_be_resolved(region):
    link = OffsetPtr["Elsewhere"]

    class User(ctypes.Structure):
        _fields_ = [("link", link)]

    def elsewhere():
        class Elsewhere(ctypes.Structure):
            _fields_ = [("x", ctypes.c_int)]

        return Elsewhere

    kind = elsewhere()
    user = construct(region, User, 0)
    with pytest.raises(TypeError, match="cannot find 'Elsewhere' of OffsetPtr"):
        user.link = construct(region, kind, 64, 8)
    link.resolve(kind)
    user.link = construct(region, kind, 64, 8)
    assert user.link.get().x == 8
    with pytest.raises(TypeError, match="it points to Elsewhere"):
        link.resolve(Node)
    with pytest.raises(TypeError, match="not a ctypes type"):
        link.resolve(int)


# -- assignment of objects with pointers -------------------------------------------------


def test_assigning_a_pointer_field_keeps_the_target(region):
    """ctypes alone would copy the distance, which leads to another target."""
    one, two, three = (construct(region, Node, offset) for offset in (0, 256, 1024))
    one.next = three
    two.next = one.next
    assert two.next == one.next == three
    assert (one.next.distance, two.next.distance) == (1024 - 8, 768 - 8)
    two.next = None
    assert not two.next
    two.next = OffsetPtr.pointer_to(one)
    assert two.next == one
    for wrong in (5, Base(), b"x"):
        with pytest.raises(TypeError):
            two.next = wrong
    assert two.next == one


def test_assigning_items_of_an_array_of_pointers_keeps_the_targets(region):
    tree = construct(region, Tree, 0)
    leaves = [construct(region, Tree, offset) for offset in (512, 1024, 2048)]
    tree.many[0] = leaves[0]
    tree.many[1:] = leaves[1:]
    assert [pointer.offset for pointer in tree.many] == [512, 1024, 2048]
    tree.many[0] = tree.many[2]
    assert [pointer.offset for pointer in tree.many] == [2048, 1024, 2048]
    tree.many[0:3] = [leaves[0], None, tree.many[0]]
    assert [pointer.offset for pointer in tree.many] == [512, None, 2048]
    tree.many[0:2] = tree.many[1:3]
    assert [pointer.offset for pointer in tree.many] == [None, 2048, 2048]
    tree.many[-1] = None
    assert not tree.many[2]
    with pytest.raises(ValueError, match="cannot assign 1 items to a slice of 2"):
        tree.many[:2] = [None]
    with pytest.raises(IndexError):
        tree.many[3] = None
    with pytest.raises(TypeError):
        tree.many[1] = 5
    assert tree.many[1].offset == 2048


def test_assigning_whole_arrays_and_structures_keeps_the_targets(region):
    one, two, leaf = (construct(region, Tree, offset) for offset in (0, 512, 2048))
    one.pair.left, one.many[1], one.pairs[1].right, one.number = leaf, one, leaf, 3
    two.pair = one.pair
    two.many = one.many
    two.pairs[0] = one.pairs[1]
    two.pairs[1] = one.pair
    assert (two.pair.left.offset, two.pair.right.offset) == (2048, None)
    assert [pointer.offset for pointer in two.many] == [None, 0, None]
    assert (two.pairs[0].right.offset, two.pairs[1].left.offset) == (2048, 2048)
    two.pairs[1] = (None, None)
    assert two.pairs[1].left.get() is None
    with pytest.raises(WildPointerError, match="is in no region: it can only be null"):
        two.pair = (one, None)
    assert two.pair.left == leaf
    with pytest.raises(TypeError, match="expected Pair, got Node"):
        two.pair = Node()


def test_the_copy_of_a_structure_has_the_targets_of_the_original(region):
    """Copying the bytes by hand changes the targets, as in C++."""
    one, leaf = construct(region, Tree, 0, 5), construct(region, Tree, 2048)
    one.pair.left, one.many[2], one.pair.right = leaf, one, leaf
    copied, raw = construct(region, Tree, 512), construct(region, Tree, 1024)
    assign(copied, one)
    ctypes.memmove(ctypes.addressof(raw), ctypes.addressof(one), ctypes.sizeof(one))
    assert copied.number == raw.number == 5
    assert copied.pair.left == one.pair.left == copied.pair.right == leaf
    assert copied.many[2] == one
    assert raw.pair.left.offset == 2048 + 1024
    assert raw.many[2] == raw
    assert not raw.many[0]
    assert not copied.many[0]
    assign(one, one)
    assert one.many[2] == one


def test_moving_a_structure_with_its_targets_keeps_the_distances(region):
    """Therefore a whole region can be copied, or mapped anywhere."""
    one, two = construct(region, Node, 0, 1), construct(region, Node, 64, 2)
    one.next = two
    with anonymous_shared_memory(PAGE) as other:
        other.buf[512:1024] = region.buf[0:512]
        assert place(other, Node, 512).next.get().value == 2
        assert place(other, Node, 512).next.offset == 512 + 64
        gc.collect()


def test_nothing_is_copied_when_a_target_would_be_out_of_reach(region):
    with anonymous_shared_memory(PAGE) as other:
        source, target = construct(region, Node, 0, 7), construct(other, Node, 0, 1)
        source.next = source
        with pytest.raises(WildPointerError, match=r"OffsetPtr\[Node\] leads to"):
            assign(target, source)
        assert (target.value, target.next.get()) == (1, None)
        source.next = None
        assign(target, source)
        assert target.value == 7
        del source, target


def test_a_structure_of_this_process_can_be_copied_into_a_region(region):
    nodes = construct(region, Node * 2, 0)
    nodes[0] = Node(3)
    nodes[1] = Node(4, None)
    assert [(node.value, node.next.get()) for node in nodes] == [(3, None), (4, None)]
    broken = Node.from_buffer_copy(bytes([1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]))
    with pytest.raises(WildPointerError):
        nodes[0] = broken
    assert nodes[0].value == 3


def test_a_union_with_a_pointer_is_not_copied_as_a_whole(region):
    class Either(ctypes.Union):
        _fields_ = [("node", OffsetPtr[Node]), ("number", ctypes.c_int64)]

    class Holder(ctypes.Structure):
        _anonymous_ = ("either",)
        _fields_ = [("kind", ctypes.c_int), ("either", Either)]

    one, two = construct(region, Holder, 0), construct(region, Holder, 64)
    assert not one.node
    one.node = place(region, Node, 512)
    two.node = one.node
    assert (one.node.offset, two.either.node.offset) == (512, 512)
    with pytest.raises(TypeError, match=r"cannot copy Holder: Holder.either is a union that holds a pointer"):
        assign(two, one)
    with pytest.raises(TypeError, match="members one by one"):
        two.either = one.either


def test_a_placed_type_can_be_used_in_other_types(region):
    class Early(ctypes.Structure):
        _fields_ = [("at", OffsetPtr[Node])]

    node = construct(region, Node, 512)
    construct(region, Early, 0, node)

    class Outer(ctypes.Structure):
        _anonymous_ = ("early",)
        _fields_ = [("early", Early), ("array", Early * 2)]

    class Sub(Early):
        _fields_ = (("more", OffsetPtr[Node]),)

    outer, sub = construct(region, Outer, 64, (None,)), construct(region, Sub, 256)
    outer.at = node
    outer.array[1] = outer.early
    assert outer.array[1].at == node
    sub.at = outer.at
    sub.more = sub.at
    assert sub.more == sub.at == node
    assert Early.at.offset == 0
    assert Early.at.size == 8


# -- wild pointers -----------------------------------------------------------------------


@pytest.mark.parametrize("distance", [PAGE, PAGE - 3, -1, 2**40, -(2**40), 2**63 - 1, -(2**63)], ids=in_pages)
def test_a_pointer_that_leads_outside_its_region_is_not_followed(region, distance):
    pointer = null(region)
    pointer._distance = distance
    assert pointer
    with pytest.raises(WildPointerError, match=rf"outside the region of {PAGE:,} bytes at 0x[0-9a-f]+") as raised:
        pointer.get()
    assert isinstance(raised.value, (RegionError, ValueError))
    assert raised.value.address == region.address + distance
    with pytest.raises(WildPointerError):
        pointer[0]
    with pytest.raises(WildPointerError):
        pointer[0] = 1
    assert "to offset" in repr(pointer)
    if not 0 <= distance <= PAGE:
        assert "outside its region" in repr(pointer)
        with pytest.raises(WildPointerError):
            construct(region, IntPtr, 64, pointer)


def test_a_target_in_another_region_is_refused(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    with anonymous_shared_memory(PAGE) as other:
        there = place(other, ctypes.c_int)
        with pytest.raises(WildPointerError, match=f"outside the region of {PAGE:,} bytes"):
            pointer.set(there)
        with pytest.raises(WildPointerError):
            pointer.set(OffsetPtr.pointer_to(there))
        with pytest.raises(WildPointerError):
            pointer.set(ctypes.c_int(5))
        del there
    assert pointer == numbers


@pytest.mark.needs("touching_regions")
def test_the_start_of_the_next_region_is_not_the_end_of_this_one(region):
    with (
        MappedRegion(region, size=PAGE) as low,
        anonymous_shared_memory(2 * PAGE) as memory,
    ):
        # Two adjacent mappings of adjacent parts.
        address = memory.address
        memory.close()
        first = MappedRegion(low, size=PAGE, address=address)
        second = MappedRegion(low, size=PAGE, address=address + PAGE)
        pointer = construct(first, IntPtr, 0)
        start, end = OffsetPtr.pointer_to(place(second, ctypes.c_int)), OffsetPtr.pointer_to(place(first, ctypes.c_int))
        end += PAGE // 4
        assert start == end
        pointer.set(end)
        for wrong in (start, place(second, ctypes.c_int)):
            with pytest.raises(WildPointerError):
                pointer.set(wrong)
        del pointer, start, end, wrong
        first.close()
        second.close()


def test_pointers_are_bounded_by_a_region_of_part_of_an_object(region):
    one, far = construct(region, Node, 0, 1), construct(region, Node, PAGE // 2, 2)
    one.next = far
    with MappedRegion(region, size=PAGE // 4) as part:
        node = place(part, Node)
        assert node.value == 1
        with pytest.raises(WildPointerError, match=f"outside the region of {PAGE // 4:,} bytes"):
            node.next.get()
        del node


# -- how long memory stays mapped --------------------------------------------------------


def test_a_target_reached_through_a_pointer_keeps_the_memory_mapped():
    region = anonymous_shared_memory(PAGE)
    first, last = construct(region, Node, 0, 1), construct(region, Node, 512, 2)
    first.next = last
    address = region.address
    del region, last
    gc.collect()
    node = first.next.get()
    del first
    gc.collect()
    assert node.value == 2
    node.next = node
    link = node.next
    del node
    gc.collect()
    assert link.get().value == 2
    assert link.address == address + 512


@pytest.mark.parametrize(
    "reach",
    [
        lambda node: node,
        lambda node: node.next,
        lambda node: node.next.get(),
        lambda node: node.next[0],
        lambda node: node.next + 0,
        lambda node: node.next.cast(ctypes.c_int),
        OffsetPtr.pointer_to,
    ],
    ids=["object", "pointer", "get", "item", "sum", "cast", "pointer_to"],
)
def test_a_region_with_live_targets_cannot_be_closed(reach):
    region = anonymous_shared_memory(PAGE)
    node = construct(region, Node)
    node.next = node
    held = reach(node)
    del node
    gc.collect()
    with pytest.raises(RegionBusyError, match="1 view of it is alive"):
        region.close()
    assert held is not None
    del held
    gc.collect()
    region.close()


# -- other addresses, other processes ----------------------------------------------------


def test_two_mappings_at_different_addresses_see_the_same_structure(region):
    one, two = construct(region, Node, 0, 1), construct(region, Node, 1024, 2)
    one.next = two
    with MappedRegion(region) as other:
        assert other.address != region.address
        there = place(other, Node)
        assert there.next.get().value == 2
        assert there.next.address == other.address + 1024
        assert there.next.offset == one.next.offset == 1024
        there.next.get().next = there
        assert two.next == one
        with pytest.raises(WildPointerError):
            there.next = one
        del there


def test_a_copy_on_write_mapping_has_pointers_of_its_own(region):
    one, two = construct(region, Node, 0, 1), construct(region, Node, 1024, 2)
    one.next = two
    with MappedRegion(region, Mode.copy_on_write) as other:
        there = place(other, Node)
        assert there.next.get().value == 2
        there.next = there
        assert there.next.get().value == 1
        assert one.next == two
        del there


def test_a_forked_child_maps_elsewhere_walks_and_changes(region, in_child):
    nodes = construct(region, Node * 3, 0, (1,), (2,), (3,))
    nodes[0].next = nodes[1]
    here = region.address

    def child():
        with MappedRegion(region) as mine:
            assert mine.address != here
            node = place(mine, Node)
            assert node.next.get().value == 2
            third = place(mine, Node * 3)[2]
            node.next.get().next = third
            node.next.get().value = 20
            third.next = node
            del node, third
        return 0

    assert in_child(child) == 0
    assert nodes[0].next.get().value == 20
    assert nodes[1].next == nodes[2]
    assert nodes[2].next == nodes[0]


def double_all(region, offset):
    node, count = place(region, Node, offset), 0
    while node is not None:
        node.value *= 2
        node, count = node.next.get(), count + 1
    return os.getpid(), region.address, count


@pytest.mark.usefixtures("_warm_up")
def test_a_worker_walks_a_list_built_by_another_process(region):
    nodes = [construct(region, Node, 64 * number, number) for number in range(1, 6)]
    for node, following in itertools.pairwise(nodes):
        node.next = following
    with Pool(1) as pool:
        pid, _, count = pool.apply(double_all, (region, 64))
    assert pid != os.getpid()
    assert count == 5
    assert [node.value for node in nodes] == [2, 4, 6, 8, 10]


STRANGER = """
import ctypes, sys
from forkshm import MappedRegion
from forkshm.region.pointers._offset_ptr import OffsetPtr
from forkshm.region.pointers._place import place

class Node(ctypes.Structure):
    _fields_ = [("value", ctypes.c_int), ("next", OffsetPtr["Node"])]

with open(sys.argv[1], "r+b") as file:
    region = MappedRegion(file)
node = place(region, Node, 128)
while node is not None:
    print(node.value)
    node.value += 1
    node = node.next.get()
"""


def test_pointers_in_a_file_are_read_by_a_stranger(run_script, tmp_path):
    path = tmp_path / "list"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, MappedRegion(file) as region:
        last = construct(region, Node, 2048, 20)
        construct(region, Node, 128, 10, last)
        del last
        assert run_script(STRANGER, path).split() == ["10", "20"]
        assert place(region, Node, 128).next.get().value == 21


def test_a_list_of_ten_thousand_nodes():
    count = 10_000
    with anonymous_shared_memory(count * ctypes.sizeof(Node)) as region:
        nodes = construct(region, Node * count)
        order = [number * 7919 % count for number in range(count)]
        assert len(set(order)) == count
        for number, following in itertools.pairwise(order):
            nodes[number].next = nodes[following]
        for position, number in enumerate(order):
            nodes[number].value = position
        with MappedRegion(region) as other:
            node, walked = place(other, Node, order[0] * ctypes.sizeof(Node)), []
            while node is not None:
                walked.append(node.value)
                node = node.next.get()
        assert walked == list(range(count))
        del nodes


# -- representation and pickling ---------------------------------------------------------


def test_the_repr_of_a_pointer_shows_its_target(region):
    numbers, pointer = ten_numbers(region), null(region)
    assert repr(pointer) == f"<OffsetPtr[{INT}] null>"
    pointer.set(numbers)
    assert repr(pointer) == f"<OffsetPtr[{INT}] to offset 1,024>"
    assert repr(pointer + 1) == f"<Pointer[{INT}] to offset 1,028>"
    assert repr(OffsetPtr[None]()) == "<OffsetPtr[None] null>"
    loose = IntPtr()
    loose._distance = 5
    assert repr(loose) == f"<OffsetPtr[{INT}] outside of every region>"


def test_a_pointer_does_not_travel(region):
    numbers, pointer = ten_numbers(region), null(region)
    pointer.set(numbers)
    for thing in (pointer, pointer + 1):
        with pytest.raises(NotPicklableError, match="Send the region and the offset"):
            pickle.dumps(thing)
        with pytest.raises(NotPicklableError):
            copy.copy(thing)
