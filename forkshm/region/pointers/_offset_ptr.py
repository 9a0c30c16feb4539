"""OffsetPtr: a pointer in memory that is mapped at a different address in each process.

ctypes is used only to describe layouts; nothing here calls C.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import operator
import sys
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from forkshm.errors import NotPicklableError, RegionAccessError, RegionClosedError, WildPointerError
from forkshm.region._table import Mapping, Mode, mapping_at
from forkshm.region.pointers._layout import CData, Relative, check, is_type, layout_of, name_of

if TYPE_CHECKING:
    from typing import Self

__all__ = ("OffsetPtr", "Pointer")

T = TypeVar("T")
U = TypeVar("U")

NULL = 1
"""The distance stored for null, as in Boost; a distance of 0 is a pointer to itself."""


class Pointing(Generic[T]):
    """Common base of `OffsetPtr` and `Pointer`."""

    __slots__ = ()
    __iter__ = None  # without this, item access would make it iterable without end
    __hash__ = None  # type: ignore[assignment]  # what an OffsetPtr points to may change

    def _kind(self) -> Any:
        """Return the type of the target, which may be placed, or None for any."""
        raise NotImplementedError

    def _target(self) -> tuple[int, Mapping | None]:
        """Return the address of the target, 0 for null, and the mapping that must contain it."""
        raise NotImplementedError

    @property
    def address(self) -> int:
        """Address of the target in this process, or 0 for null."""
        return self._target()[0]

    @property
    def offset(self) -> int | None:
        """Offset of the target in its region, in bytes, or None for null.

        Pass it to ``region.place``.
        """
        address, mapping = self._target()
        return address - mapping.address if address and mapping else None

    def get(self) -> T | None:
        """Return the target as a ctypes object that shares its memory, or None for null.

        The object keeps the memory mapped while it is alive.

        Raises:
            TypeError: The pointer has no target type. Call `cast` first.
            WildPointerError: The target is not within the region.
            RegionAccessError: The region is not writable.
        """
        address, mapping = self._target()
        if not address:
            return None
        found: T = view(self._needed(), address, self._home(mapping))
        return found

    def cast(self, kind: type[U]) -> Pointer[U]:
        """Return a pointer of another type to the same target.

        Args:
            kind: A ctypes type, or None for any.

        Raises:
            TypeError: *kind* is not a ctypes type.
            UnplaceableTypeError: A region cannot hold *kind*.
        """
        address, mapping = self._target()
        if kind is not None:
            check(kind)
        return Pointer(kind, address, mapping)

    def _pointer(self) -> Pointer[T]:
        address, mapping = self._target()
        return Pointer(self._kind(), address, mapping)

    def _needed(self) -> Any:
        kind = self._kind()
        if kind is None:
            raise TypeError(f"cannot read {self!r}: it has no target type. Call cast() first.")
        return kind

    def _home(self, mapping: Mapping | None) -> Mapping:
        if mapping is None:
            raise WildPointerError(
                f"cannot follow {self!r}: it is not in a region. Place it, or its structure, in a region first.",
                address=self.address,
            )
        return mapping

    def __bool__(self) -> bool:
        return self._target()[0] != 0

    # -- items and arithmetic, in elements ----------------------------------------------

    def _item(self, index: Any) -> Any:
        """Return an array of the single element at *index*."""
        kind = self._needed()
        address, mapping = self._target()
        index = operator.index(index)
        if not address:
            raise WildPointerError(f"cannot access item {index} of {self!r}: it is null", address=0)
        one = kind * 1
        layout_of(one)  # sets up its assignment
        return view(one, address + index * ctypes.sizeof(kind), self._home(mapping))

    def __getitem__(self, index: int) -> Any:
        return self._item(index)[0]

    def __setitem__(self, index: int, value: Any) -> None:
        self._item(index)[0] = value

    def __add__(self, count: int) -> Pointer[T]:
        try:
            count = operator.index(count)
        except TypeError:
            return NotImplemented
        return self._moved(count)

    __radd__ = __add__

    def _moved(self, count: int) -> Pointer[T]:
        kind = self._needed()
        address, mapping = self._target()
        if not address:
            if count:
                raise WildPointerError(f"cannot move {self!r} by {count}: it is null", address=0)
            return Pointer(kind, 0, None)
        address += count * ctypes.sizeof(kind)
        mapping = self._home(mapping)
        check_inside(address, 0, mapping, self._describe())
        return Pointer(kind, address, mapping)

    @overload
    def __sub__(self, other: int) -> Pointer[T]: ...

    @overload
    def __sub__(self, other: Pointing[T] | ctypes._CData) -> int: ...

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, (Pointing, CData)):
            return self._difference(other)
        try:
            count = operator.index(other)
        except TypeError:
            return NotImplemented
        return self._moved(-count)

    def _difference(self, other: Any) -> int:
        kind = self._needed()
        theirs, address, _ = self._read(other)
        if theirs is not kind:
            raise TypeError(f"cannot subtract {name_of(theirs)} from {self._describe()}: the types differ")
        mine, mapping = self._target()
        if not mine and not address:
            return 0
        if not mine or not address:
            raise WildPointerError("cannot subtract: one of the pointers is null", address=0)
        mapping = self._home(mapping)
        for end in (mine, address):
            check_inside(end, 0, mapping, self._describe())
        count, rest = divmod(mine - address, ctypes.sizeof(kind) or 1)
        if rest:
            raise ValueError(
                f"cannot subtract: the targets are {mine - address:,} bytes apart, "
                f"which is not a multiple of the {ctypes.sizeof(kind)} bytes of {name_of(kind)}"
            )
        return count

    # -- comparison, by address ---------------------------------------------------------

    def _read(self, other: Any) -> tuple[Any, int, int]:
        """Return *other* as a target of this pointer: type, address, and the number of bytes that must be there."""
        if isinstance(other, Pointing) and not (is_type(self._kind()) and isinstance(other, self._kind())):
            return other._kind(), other._target()[0], 0
        target: Any = other
        return type(target), ctypes.addressof(target), ctypes.sizeof(target)

    def _compare(self, other: Any, how: Any) -> Any:
        if other is None:
            return how(self._target()[0], 0)
        if not isinstance(other, (Pointing, CData)):
            return NotImplemented
        return how(self._target()[0], self._read(other)[1])

    def __eq__(self, other: object) -> bool:
        result: bool = self._compare(other, operator.eq)
        return result

    def __lt__(self, other: Any) -> bool:
        result: bool = self._compare(other, operator.lt)
        return result

    def __le__(self, other: Any) -> bool:
        result: bool = self._compare(other, operator.le)
        return result

    def __gt__(self, other: Any) -> bool:
        result: bool = self._compare(other, operator.gt)
        return result

    def __ge__(self, other: Any) -> bool:
        result: bool = self._compare(other, operator.ge)
        return result

    # -- representation and pickling ----------------------------------------------------

    def _describe(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        address, mapping = self._target()
        if not address:
            return f"<{self._describe()} null>"
        if mapping is None:
            return f"<{self._describe()} outside of every region>"
        inside = 0 <= address - mapping.address <= mapping.size
        return f"<{self._describe()} to offset {address - mapping.address:,}{'' if inside else ', outside its region'}>"

    def __reduce__(self) -> NoReturn:
        raise NotPicklableError(
            f"cannot pickle {self!r}: it is valid in this process only. Send the region and the offset of the target."
        )


class Pointer(Pointing[T]):
    """The location of an object in a region, in this process; the result of arithmetic on an `OffsetPtr`.

    It is immutable, keeps the memory mapped while it is alive, and cannot live in a region itself: assign it to an
    `OffsetPtr`. Two pointers are equal if they have the same target.

    `OffsetPtr.pointer_to`, `OffsetPtr.cast`, and addition to or subtraction from an `OffsetPtr` return one.

    Example:
        >>> import ctypes
        >>> from forkshm import anonymous_shared_memory
        >>> from forkshm.region import place
        >>> region = anonymous_shared_memory(4096)
        >>> numbers = place(region, ctypes.c_int * 10)
        >>> first = OffsetPtr.pointer_to(numbers).cast(ctypes.c_int)
        >>> (first + 3)[0] = 7
        >>> numbers[3], (first + 3) - first, (first + 3).offset
        (7, 3, 12)
        >>> del numbers, first
        >>> region.close()
    """

    __slots__ = ("_address", "_exporter", "_mapping", "_type_")

    def __init__(self, kind: Any, address: int, mapping: Mapping | None) -> None:
        self._type_ = kind
        self._address = address
        self._mapping = mapping
        # Keeps the memory mapped.
        self._exporter = mapping.exporter() if mapping is not None and mapping.exporter is not None else None

    def _kind(self) -> Any:
        return self._type_

    def _target(self) -> tuple[int, Mapping | None]:
        return self._address, self._mapping

    def _describe(self) -> str:
        return f"Pointer[{name_of(self._type_)}]"

    def __hash__(self) -> int:  # type: ignore[override]  # this one does not change
        return hash(self._address)


class OffsetPtr(Relative, Pointing[T]):
    """A pointer that may live in a region: a field of a ctypes structure.

    It stores the distance in bytes from itself to its target, in 8 bytes, so it is correct wherever a process maps the
    region. Null is stored as distance 1. This is the format of ``offset_ptr`` in Boost.Interprocess. The target must be
    in the region of the pointer, which is checked whenever the pointer is set or followed. A pointer that leads
    elsewhere, whatever wrote it, causes an error and never a read.

    ``OffsetPtr[Node]`` is a ctypes type. A structure that points to its own type names it in quotes, or sets
    ``_fields_`` after the class. ``OffsetPtr[None]`` points to anything and is read through `cast`.

    ``node.next = target`` is short for ``node.next.set(target)``. The target is a ctypes object of the region, another
    pointer, or None. Structures that hold pointers can be assigned as well; see `assign`. Both require that the type
    was placed in a region or reached through a pointer before.

    Args:
        target: As for `set`; outside of a region, a pointer can only be null.

    Fork and threads:
        Setting a pointer is one store of 8 bytes. It is not ordered with other writes: use a lock or a channel to
        signal readiness. ``node.next`` is the field and not a copy of it: ``was = node.next.get()`` keeps the current
        target, and ``a.next.swap(b.next)`` exchanges two.

    Example:
        >>> import ctypes
        >>> from forkshm import anonymous_shared_memory
        >>> from forkshm.region import construct
        >>> class Node(ctypes.Structure):
        ...     _fields_ = [("value", ctypes.c_int), ("next", OffsetPtr["Node"])]
        >>> region = anonymous_shared_memory(4096)
        >>> last = construct(region, Node, 1024, value=2)
        >>> first = construct(region, Node, 0, value=1, next=last)
        >>> first.next, first.next.get().value, last.next.get()
        (<OffsetPtr[Node] to offset 1,024>, 2, None)
        >>> first.next.distance, last.next.distance
        (1016, 1)
        >>> del first, last
        >>> region.close()

    See Also:
        ``offset_ptr`` of Boost.Interprocess.
    """

    # The globals at the subscript, for looking up a name.
    _globals: dict[str, Any] | None = None
    # Whether everything that the target's type leads to was checked.
    _checked = False

    if TYPE_CHECKING:
        # Types of a field of a structure: the result of reading it, and the values it accepts.
        def __get__(self, instance: Any, owner: Any = None) -> Self: ...

        def __set__(self, instance: Any, value: T | Pointing[T] | ctypes.Array[Any] | None) -> None: ...

    def __init__(self, target: Any = None) -> None:
        super().__init__()
        self._distance = NULL
        if target is not None:
            self.set(target)

    def __class_getitem__(cls, kind: Any) -> Any:
        if isinstance(kind, str):
            return _pointer_type(cls, kind, sys._getframe(1).f_globals)
        if kind is not None and not is_type(kind):
            raise TypeError(f"cannot make OffsetPtr[{name_of(kind)}]: {name_of(kind)} is not a ctypes type")
        return _known_pointer_type(cls, kind)

    @classmethod
    def resolve(cls, kind: Any) -> None:
        """Declare the type that a name stands for, where the name cannot be found.

        A name is looked up among the structures around the pointer, then in the module with the subscript. Only a type
        that is local to a function needs this call.

        Args:
            kind: A ctypes type.

        Raises:
            TypeError: *kind* is not a ctypes type, or differs from the known type of the target.

        Example:
            >>> Link = OffsetPtr["Later"]
            >>> class Later(ctypes.Structure):
            ...     _fields_ = [("back", Link)]
            >>> Link.resolve(Later)
        """
        if not is_type(kind):
            raise TypeError(f"cannot resolve {cls.__name__} to {name_of(kind)}: it is not a ctypes type")
        if not isinstance(cls._type_, str) and cls._type_ is not kind:
            raise TypeError(f"cannot resolve {cls.__name__} to {name_of(kind)}: it points to {name_of(cls._type_)}")
        cls._type_ = kind
        cls._globals = None

    @classmethod
    def _find(cls, owners: tuple[type, ...]) -> Any:
        name = cls._type_
        if isinstance(name, str):
            found: Any = next((owner for owner in owners if owner.__name__ == name), None)
            if found is None and cls._globals is not None:
                first, *rest = name.split(".")
                found = functools.reduce(lambda a, b: getattr(a, b, None), rest, cls._globals.get(first))
            if found is None:
                return None
            cls.resolve(found)
        return cls._type_

    @classmethod
    def _kind(cls) -> Any:
        if not cls._checked:
            kind = cls._find(())
            if isinstance(cls._type_, str):
                raise TypeError(
                    f"cannot find {cls._type_!r} of {cls.__name__}: the module has no such name. "
                    "Keep the pointer's type in a variable, and call its resolve() with the type."
                )
            if kind is not None:
                check(kind)
            cls._checked = True
        return cls._type_

    def _target(self) -> tuple[int, Mapping | None]:
        distance = self._distance
        if distance == NULL:
            return 0, None
        own = ctypes.addressof(self)
        mapping = mapping_at(own)
        if mapping is None and distance == 0:
            # The pointer is zeros in this process's own memory, as after ``Node()``, and so has no target.
            return 0, None
        return own + distance, mapping

    @property
    def distance(self) -> int:
        """The stored value, in bytes from the pointer to its target; 1 for null."""
        return self._distance

    def set(self, target: Any) -> None:
        """Point to *target*.

        Args:
            target: None, or a ctypes object in the same region: of the pointer's type, of a type derived from it, or an
                array of it. Or a pointer to such an object, whose target is taken. An ``OffsetPtr[OffsetPtr[X]]``,
                however, points *to* an ``OffsetPtr[X]``.

        Raises:
            TypeError: *target* has another type.
            WildPointerError: *target* is outside the region of the pointer, or the pointer is in no region. The pointer
                is unchanged.
            ValueError: *target* is the second byte of the pointer itself, whose distance means null.
        """
        self._point(self._check_target(target))

    def _point(self, address: int) -> None:
        self._distance = address - ctypes.addressof(self) if address else NULL

    def _check_target(self, target: Any) -> int:
        if target is None:
            return 0
        kind = self._kind()
        if not isinstance(target, (Pointing, CData)):
            wanted = f"{name_of(kind)}, a pointer to one" if kind is not None else "a ctypes object, a pointer"
            raise TypeError(f"{type(self).__name__} can point to {wanted}, or None; got {name_of(type(target))}")
        theirs, address, size = self._read(target)
        if not address:
            return 0
        if kind is not None and not fits(theirs, kind):
            raise TypeError(
                f"{type(self).__name__} cannot point to {name_of(theirs)}. Use OffsetPtr[{name_of(theirs)}], "
                f"or cast a pointer to it to {name_of(kind)}."
            )
        own = ctypes.addressof(self)
        mapping = mapping_at(own)
        if mapping is None:
            raise WildPointerError(
                f"cannot set an {type(self).__name__} that is in no region: it can only be null. "
                "Place it, or its structure, in a region first.",
                address=address,
            )
        if isinstance(target, Pointer) and target._mapping is not mapping:
            # The end of one region may be the start of the next.
            refuse_outside(address, 0, mapping, type(self).__name__)
        check_inside(address, size, mapping, type(self).__name__)
        if address - own == NULL:
            raise ValueError(f"{type(self).__name__} cannot point to its own second byte: that distance means null")
        return address

    def swap(self, other: OffsetPtr[T]) -> None:
        """Exchange the targets of two pointers; each may be null.

        Raises:
            TypeError: The pointers have different types.
            WildPointerError: The pointers are in different regions. Nothing was changed.
        """
        mine, theirs = self._check_target(other._pointer()), other._check_target(self._pointer())
        self._point(mine)
        other._point(theirs)

    @staticmethod
    def pointer_to(target: Any, field: str | None = None) -> Pointer[Any]:
        """Return a pointer to an object in a region, or to one of its fields.

        Args:
            target: A ctypes object in a region.
            field: Name of a field, for fields of simple types, whose values ctypes returns as numbers.

        Raises:
            TypeError: *target* is not a ctypes object.
            WildPointerError: *target* is not in a region.

        Example:
            >>> from forkshm import anonymous_shared_memory
            >>> from forkshm.region import place
            >>> class Point(ctypes.Structure):
            ...     _fields_ = [("x", ctypes.c_double), ("y", ctypes.c_double)]
            >>> region = anonymous_shared_memory(4096)
            >>> OffsetPtr.pointer_to(place(region, Point), "y").offset
            8
            >>> region.close()
        """
        if not isinstance(target, CData):
            raise TypeError(f"cannot point to {name_of(type(target))}: pass a ctypes object in a region")
        kind: Any = type(target)
        address = ctypes.addressof(target)
        if field is not None:
            address += getattr(kind, field).offset
            kind = field_type(kind, field)
        mapping = mapping_at(address)
        if mapping is None:
            raise WildPointerError(
                f"cannot point to the {name_of(type(target))} at {address:#x}: it is not in a region. Place it in one.",
                address=address,
            )
        check(kind)
        return Pointer(kind, address, mapping)

    def __iadd__(self, count: int) -> Self:  # type: ignore[override]  # changes this object, returns no Pointer
        self.set(self._moved(operator.index(count)))
        return self

    def __isub__(self, count: int) -> Self:  # type: ignore[override,misc]  # changes this object, returns no Pointer
        self.set(self._moved(-operator.index(count)))
        return self

    # These take precedence over those of ctypes.
    __hash__ = None
    __reduce__ = Pointing.__reduce__
    __repr__ = Pointing.__repr__

    @classmethod
    def _describe(cls) -> str:
        return cls.__name__


def _pointer_type(cls: Any, kind: Any, names: dict[str, Any] | None) -> Any:
    name = kind if isinstance(kind, str) else name_of(kind)
    namespace = {"_type_": kind, "_globals": names, "__doc__": f"A relative pointer to {name}.", "__module__": __name__}
    return type(f"{cls.__name__}[{name}]", (cls,), namespace)


@functools.cache
def _known_pointer_type(cls: Any, kind: Any) -> Any:
    return _pointer_type(cls, kind, None)


def fits(kind: Any, wanted: Any) -> bool:
    """Return whether a pointer to *wanted* may point to a *kind*, which is *wanted* or an array of it."""
    if kind is None:
        return False
    if issubclass(kind, wanted):
        return True
    return issubclass(kind, ctypes.Array) and fits(kind._type_, wanted)


def field_type(kind: Any, name: str) -> Any:
    """Return the type of a field, including fields of anonymous members."""
    for owner in kind.__mro__:
        for found, field_kind, *bits in vars(owner).get("_fields_", ()):
            if found == name:
                if bits:
                    raise TypeError(f"cannot point to {name_of(kind)}.{name}: it is a bit field")
                return field_kind
        for member in vars(owner).get("_anonymous_", ()):
            inner = field_type(kind, member)
            if hasattr(inner, name):
                return field_type(inner, name)
    raise AttributeError(f"{name_of(kind)} has no field {name!r}")


def check_inside(address: int, size: int, mapping: Mapping, what: str) -> None:
    """Raise WildPointerError unless *size* bytes at *address* are in the mapping; the address of its end is allowed."""
    if not 0 <= address - mapping.address <= mapping.size - size:
        refuse_outside(address, size, mapping, what)


def refuse_outside(address: int, size: int, mapping: Mapping, what: str) -> NoReturn:
    """Raise for an address that is outside the mapping."""
    raise WildPointerError(
        f"{what} leads to {f'{size:,} bytes at ' if size else ''}address {address:#x} (offset "
        f"{address - mapping.address:,}), outside the region of {mapping.size:,} bytes at {mapping.address:#x} "
        "that it lies in",
        address=address,
    )


def view(kind: Any, address: int, mapping: Mapping) -> Any:
    """Return the *kind* at an address of a mapping, which stays mapped while the object is alive.

    Raises:
        WildPointerError: The object is not within the mapping.
        RegionAccessError: The mapping is not writable.
    """
    check_inside(address, ctypes.sizeof(kind), mapping, f"a pointer to {name_of(kind)}")
    exporter = mapping.exporter() if mapping.exporter is not None else None
    if exporter is None:
        raise RegionClosedError(f"cannot read {name_of(kind)}: its region was closed in this process")
    check_writable(kind, mapping.mode)
    return kind.from_buffer(exporter, address - mapping.address)


def check_writable(kind: Any, mode: Mode) -> None:
    """Raise RegionAccessError if writing through a ctypes object would kill the process."""
    if mode not in (Mode.read_write, Mode.copy_on_write):
        raise RegionAccessError(
            errno.EACCES,
            f"cannot view {name_of(kind)} in a region that is {mode}: ctypes objects are writable, and a write would "
            "kill this process (SIGSEGV). Map the memory copy_on_write to read it.",
        )
