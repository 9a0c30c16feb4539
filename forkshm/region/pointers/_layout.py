"""Layouts of ctypes types: whether a type may live in a region, and where its pointers are.

ctypes is used only to describe layouts; nothing here calls C.

ctypes copies fields of structures as bytes, but a distance copied as bytes leads nowhere. So when a type is first
placed, its fields and array items that hold pointers get an assignment that recomputes the distances. Everything
else about the type stays as it is.
"""

from __future__ import annotations

import ctypes
import dataclasses
import operator
from typing import TYPE_CHECKING, Any, NoReturn

from forkshm.errors import UnplaceableTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("CData", "Layout", "Relative", "assign", "check", "is_type", "layout_of", "name_of")

CData: Any = ctypes.Structure.__mro__[1]
"""The base class of all ctypes objects, which has no public name."""
_Simple: Any = ctypes.c_int.__mro__[1]
_RawPointer: Any = ctypes.POINTER(ctypes.c_int).__mro__[1]
_Function: Any = ctypes.CFUNCTYPE(None).__mro__[1]


class Relative(ctypes.Structure):
    """The memory of a relative pointer: the distance from the pointer to its target."""

    _fields_ = (("_distance", ctypes.c_int64),)
    _distance: int

    # The type of the target: None for any type, or a name until it is resolved.
    _type_: Any = None

    def set(self, target: Any) -> None:
        """Point to *target*."""
        raise NotImplementedError

    @classmethod
    def _find(cls, owners: tuple[type, ...]) -> Any:
        """Return the type of the target, or None if it is any type or not known yet."""
        raise NotImplementedError

    def _check_target(self, target: Any) -> int:
        """Return the address to point to, 0 for null, or raise if the target is not allowed."""
        raise NotImplementedError

    def _point(self, address: int) -> None:
        """Point to an address that was checked."""
        raise NotImplementedError


_Field: Any = type(vars(Relative)["_distance"])


@dataclasses.dataclass(frozen=True)
class Part:
    """A field, or the items of an array."""

    name: str
    """The name in paths: ``".next"`` or ``"[]"``."""
    offset: int
    """Offset of the first item."""
    count: int
    """Number of items."""
    stride: int
    """Bytes from one item to the next."""
    layout: Layout
    """Layout of an item."""
    owner: type | None = None
    """The structure that declares the field."""
    first: bool = True
    """False for members of a union except the first, which C initializes."""


@dataclasses.dataclass
class Layout:
    """The parts of a type that matter for pointers."""

    kind: Any
    """The type."""
    parts: tuple[Part, ...] = ()
    """The parts that hold pointers."""
    union: bool = False
    """Whether the parts overlap, as in a union."""
    checked: bool = False
    """Whether everything that its pointers lead to was also checked."""

    @property
    def has_pointers(self) -> bool:
        """Whether the type holds a pointer."""
        return bool(self.parts) or issubclass(self.kind, Relative)

    def pointers(self, base: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield the offset and the type of each pointer; in a union, only those of the first member, as in C."""
        if issubclass(self.kind, Relative):
            yield base, self.kind
        for part in self.parts:
            if part.first:
                for number in range(part.count):
                    yield from part.layout.pointers(base + part.offset + number * part.stride)

    def kinds(self, path: str, owners: tuple[type, ...] = ()) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
        """Yield each pointer's path, its type, and the structures around it, innermost first."""
        if issubclass(self.kind, Relative):
            yield path, self.kind, owners
        for part in self.parts:
            around = owners if part.owner is None else (self.kind, part.owner, *owners)
            yield from part.layout.kinds(path + part.name, around)

    def union_with_pointers(self, path: str) -> str | None:
        """Return the path of a union that holds a pointer, or None."""
        if self.union and self.parts:
            return path
        return next(
            (found for part in self.parts if (found := part.layout.union_with_pointers(path + part.name))), None
        )


# Types are kept forever, like those that ctypes.POINTER creates.
_layouts: dict[Any, Layout] = {}


def is_type(kind: Any) -> bool:
    """Return whether *kind* is a ctypes type."""
    return isinstance(kind, type) and issubclass(kind, CData)


def name_of(kind: Any) -> str:
    """Return *kind* as it is written in source code."""
    if isinstance(kind, type) and issubclass(kind, ctypes.Array) and hasattr(kind, "_type_"):
        return f"{name_of(kind._type_)} * {kind._length_}"
    if isinstance(kind, type) and issubclass(kind, _RawPointer) and hasattr(kind, "_type_"):
        return f"POINTER({name_of(kind._type_)})"
    return str(getattr(kind, "__name__", kind))


def layout_of(kind: Any, path: str = "") -> Layout:
    """Return the layout of *kind*, and make assignments to its fields compute distances.

    Args:
        kind: A ctypes type.
        path: The path that led to it, for the error.

    Raises:
        UnplaceableTypeError: Part of the type is meaningless in another process.
    """
    layout = _layouts.get(kind) if isinstance(kind, type) else None
    if layout is None:
        layout = _read(kind, path or name_of(kind))
        if ctypes.sizeof(kind):  # otherwise it may get its fields later
            _layouts[kind] = layout
    return layout


def check(kind: Any) -> Layout:
    """Return the layout of *kind*, after also checking everything its pointers lead to.

    Raises:
        UnplaceableTypeError: Part of the type is meaningless in another process.
    """
    whole = layout_of(kind)
    if whole.checked:
        return whole
    complete = True
    seen = {kind}
    todo = [(whole, name_of(kind))]
    while todo:
        layout, path = todo.pop()
        for where, pointer, owners in layout.kinds(path):
            target = pointer._find(owners)
            complete &= not isinstance(pointer._type_, str)
            if target is not None and target not in seen:
                seen.add(target)
                todo.append((layout_of(target, f"{where}[0]"), f"{where}[0]"))
    whole.checked = complete
    return whole


def _read(kind: Any, path: str) -> Layout:
    if not is_type(kind):
        instead = "Describe the memory with ctypes"
        if hasattr(kind, "attach"):
            instead = f"Construct it in the region: {kind.__name__}(region, offset)"
        _refuse(path, f"is {name_of(kind)}, which is not a ctypes type", instead)
    if issubclass(kind, Relative):
        return Layout(kind)
    if issubclass(kind, _RawPointer):
        target = getattr(kind, "_type_", None)
        _refuse(path, f"is a {name_of(kind)}, an address in one process", f"Use OffsetPtr[{name_of(target)}]")
    if issubclass(kind, _Function):
        _refuse(path, "is the address of a function in one process", "Store a number that stands for it")
    if issubclass(kind, _Simple):
        return _read_simple(kind, path)
    try:
        ctypes.sizeof(kind)
    except TypeError:
        _refuse(path, f"is {name_of(kind)}, which has no size", "Give it _fields_")
    if issubclass(kind, ctypes.Array):
        array: Any = kind
        items = layout_of(array._type_, f"{path}[]")
        if not items.has_pointers:
            return Layout(kind)
        _assign_by_items(kind)
        return Layout(kind, (Part("[]", 0, array._length_, ctypes.sizeof(array._type_), items),))
    return _read_fields(kind, path)


# The reason and the advice for each ``_type_`` of a simple type that is refused.
_PRIVATE = {
    "P": ("is a c_void_p, an address in one process", "Use OffsetPtr[None]"),
    "z": ("is a c_char_p, an address in one process", "Use OffsetPtr[c_char], or keep the text in c_char * n"),
    "Z": ("is a c_wchar_p, an address in one process", "Use OffsetPtr[c_wchar], or keep the text in c_wchar * n"),
    "X": ("is a BSTR, an address in one process", "Keep the text in c_wchar * n"),
    "O": ("is a Python object, which exists in one process only", "Keep its bytes in c_ubyte * n"),
}


def _read_simple(kind: Any, path: str) -> Layout:
    code = getattr(kind, "_type_", None)
    if not isinstance(code, str):
        _refuse(path, f"is {name_of(kind)}, which has no size", "Use c_int, c_double or the like")
    if code in _PRIVATE:
        _refuse(path, *_PRIVATE[code])
    return Layout(kind)


def _read_fields(kind: Any, path: str) -> Layout:
    parts = []
    union = issubclass(kind, ctypes.Union)
    names: set[str] = set()
    for owner in reversed(kind.__mro__):
        for name, field_kind, *_ in vars(owner).get("_fields_", ()):
            layout = layout_of(field_kind, f"{path}.{name}")
            if layout.has_pointers:
                first = not union or not names
                parts.append(Part(f".{name}", getattr(owner, name).offset, 1, 0, layout, owner, first))
                _assign_by_field(owner, name, layout)
            names.add(name)
    return Layout(kind, tuple(parts), union)


def _refuse(path: str, what: str, instead: str) -> NoReturn:
    raise UnplaceableTypeError(f"a region cannot hold {path}: it {what}. {instead}.", path=path)


# -- assignment -------------------------------------------------------------------------


class FieldWithPointers:
    """A field that holds pointers; assignments to it recompute their distances."""

    __slots__ = ("_field", "_is_pointer")

    def __init__(self, field: Any, *, is_pointer: bool) -> None:
        self._field = field
        self._is_pointer = is_pointer

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._field if instance is None else self._field.__get__(instance, owner)

    def __set__(self, instance: Any, value: Any) -> None:
        place = self._field.__get__(instance, type(instance))
        if self._is_pointer:
            place.set(value)
        else:
            assign(place, value)


def _assign_by_field(owner: type, name: str, layout: Layout) -> None:
    field = vars(owner)[name]
    # A property of the user's class may have this name, or the field may have been replaced before.
    if isinstance(field, _Field):
        setattr(owner, name, FieldWithPointers(field, is_pointer=issubclass(layout.kind, Relative)))
    if name in getattr(owner, "_anonymous_", ()):
        # ctypes repeats the fields of an anonymous member in the structure around it.
        for part in layout.parts:
            if part.name[1:] in vars(owner):
                _assign_by_field(owner, part.name[1:], part.layout)


def _assign_by_items(kind: Any) -> None:
    def set_item(self: Any, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            places = self[index]
            values = list(value)
            if len(places) != len(values):
                raise ValueError(f"cannot assign {len(values)} items to a slice of {len(places)}")
        else:
            places, values = [self[index]], [value]
        # The values may be parts of this array, so all of them are read first.
        for write in [_assignment(place, value) for place, value in zip(places, values, strict=True)]:
            write()

    if "__setitem__" not in vars(kind):
        kind.__setitem__ = set_item


def assign(destination: Any, source: Any) -> None:
    """Copy a structure, union or array in a region, so that the pointers of the copy have the same targets.

    Once a type was placed in a region, ``destination.field = structure`` and ``array[i] = structure`` do this by
    themselves. Copying only the bytes is wrong: a pointer is a distance, and the copy is elsewhere.

    Args:
        destination: The ctypes object in a region to copy to.
        source: An object of the same type in the same region; or one outside of regions whose pointers are null; or a
            tuple of arguments for such an object.

    Raises:
        TypeError: The types differ, or contain a union that holds a pointer: which of its members to copy is unknown.
        WildPointerError: A pointer would lead outside the region of *destination*. Nothing was changed.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> from forkshm.region import OffsetPtr
        >>> from forkshm.region import construct
        >>> class Named(ctypes.Structure):
        ...     _fields_ = [("number", OffsetPtr[ctypes.c_int])]
        >>> region = anonymous_shared_memory(4096)
        >>> number = construct(region, ctypes.c_int, 0, 42)
        >>> one = construct(region, Named, 64, number)
        >>> two = construct(region, Named, 512)
        >>> assign(two, one)
        >>> two.number[0], one.number.distance, two.number.distance
        (42, -64, -512)
        >>> del number, one, two
        >>> region.close()
    """
    _assignment(destination, source)()


def _assignment(destination: Any, source: Any) -> Callable[[], None]:
    """Return a function that writes *source* as it is now."""
    kind = type(destination)
    layout = layout_of(kind)
    if issubclass(kind, Relative):
        address = destination._check_target(source)
        return lambda: destination._point(address)
    if isinstance(source, tuple):
        source = _made(kind, layout, source)
    if not isinstance(source, kind):
        raise TypeError(f"expected {name_of(kind)}, got {name_of(type(source))}")
    if union := layout.union_with_pointers(name_of(kind)):
        raise TypeError(
            f"cannot copy {name_of(kind)}: {union} is a union that holds a pointer, so it is unknown which member is "
            "meant. Assign the members one by one."
        )
    data = bytes(source)[: ctypes.sizeof(kind)]
    targets = [
        (offset, pointer.from_buffer(destination, offset)._check_target(pointer.from_buffer(source, offset)._pointer()))
        for offset, pointer in layout.pointers()
    ]

    def write() -> None:
        (ctypes.c_char * len(data)).from_buffer(destination).raw = data
        for (offset, pointer), (_, address) in zip(layout.pointers(), targets, strict=True):
            pointer.from_buffer(destination, offset)._point(address)

    return write


def _made(kind: Any, layout: Layout, values: tuple[Any, ...]) -> Any:
    made = kind()
    set_null(made, layout)
    made.__init__(*values)
    return made


def set_null(view: Any, layout: Layout) -> None:
    """Make every pointer of a zero-filled object null."""
    for offset, pointer in layout.pointers():
        pointer.from_buffer(view, offset)._point(0)


def checked_offset(offset: Any) -> int:
    """Return *offset* as an int, or raise if it is invalid."""
    number = operator.index(offset)
    if number < 0:
        raise ValueError(f"offset must not be negative, got {number:,}")
    return number
