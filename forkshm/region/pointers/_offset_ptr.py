"""OffsetPtr: a pointer for memory that is mapped at another address in each process.

ctypes is used as the language of layouts only; nothing here calls C.
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
"""The distance that is stored for null, as Boost does: 0 is a pointer to itself."""


class Pointing(Generic[T]):
    """What `OffsetPtr` and `Pointer` have in common."""

    __slots__ = ()
    __iter__ = None  # item access has no end, so there is nothing to iterate over
    __hash__ = None  # type: ignore[assignment]  # what an OffsetPtr points to may change

    def _kind(self) -> Any:
        """Return the type of the target, or None for any; it may be placed."""
        raise NotImplementedError

    def _target(self) -> tuple[int, Mapping | None]:
        """Return the address of the target, 0 for null, and the mapping it should lie in."""
        raise NotImplementedError

    @property
    def address(self) -> int:
        """Address of the target in this process, or 0 for null."""
        return self._target()[0]

    @property
    def offset(self) -> int | None:
        """Where in its region the target lies, in bytes, or None for null.

        This is what ``region.place`` takes.
        """
        address, mapping = self._target()
        return address - mapping.address if address and mapping else None

    def get(self) -> T | None:
        """Return the target, as a ctypes object that shares its memory, or None for null.

        The object keeps the memory mapped while it is alive.

        Raises:
            TypeError: This points to no type in particular: `cast` it.
            WildPointerError: The target does not lie within the region.
            RegionAccessError: The region cannot be written to.
        """
        address, mapping = self._target()
        if not address:
            return None
        found: T = view(self._needed(), address, self._home(mapping))
        return found

    def cast(self, kind: type[U]) -> Pointer[U]:
        """Return a pointer of another type to the same target.

        Args:
            kind: A type of ctypes, or None for any.

        Raises:
            TypeError: *kind* is no type of ctypes.
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
            raise TypeError(f"{self!r} points to no type in particular: cast() it to one first")
        return kind

    def _home(self, mapping: Mapping | None) -> Mapping:
        if mapping is None:
            raise WildPointerError(
                f"{self!r} lies in no region, so what it points to is unknown: place it, or its structure, in a region",
                address=self.address,
            )
        return mapping

    def __bool__(self) -> bool:
        return self._target()[0] != 0

    # -- items and arithmetic, in elements ----------------------------------------------

    def _item(self, index: Any) -> Any:
        """Return an array of the one element at *index*."""
        kind = self._needed()
        address, mapping = self._target()
        index = operator.index(index)
        if not address:
            raise WildPointerError(f"{self!r} is null: it has no item {index}", address=0)
        one = kind * 1
        layout_of(one)  # for its assignment
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
                raise WildPointerError(f"{self!r} is null: it cannot be moved by {count}", address=0)
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
                f"which is no multiple of the {ctypes.sizeof(kind)} bytes of {name_of(kind)}"
            )
        return count

    # -- comparison, by address ---------------------------------------------------------

    def _read(self, other: Any) -> tuple[Any, int, int]:
        """Return what *other* stands for as a target of this pointer: type, address, bytes that have to be there."""
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

    # -- the rest -----------------------------------------------------------------------

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
            f"cannot pickle {self!r}: it means nothing elsewhere; send the region, and the offset of what it points to"
        )


class Pointer(Pointing[T]):
    """Where something in a region is, in this process: what arithmetic on an `OffsetPtr` gives.

    It does not change, it keeps the memory mapped while it is alive, and it cannot live
    in a region itself: assign it to an `OffsetPtr`. Two of them are equal if they have
    the same target.

    You get one from `OffsetPtr.pointer_to`, `OffsetPtr.cast`, and from adding to or
    subtracting from an `OffsetPtr`.

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
        # What keeps the memory mapped.
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

    What is stored is the distance in bytes from the pointer itself to its target, in 8
    bytes, so it is right wherever each process maps the region; null is stored as
    distance 1. That is the form of Boost.Interprocess' ``offset_ptr``. The target has
    to lie in the region of the pointer, which is checked whenever one is set or
    followed: a pointer that leads elsewhere, whoever wrote it, is an error and no read.

    ``OffsetPtr[Node]`` is a type of ctypes. A structure that points to its own kind
    names it in quotes, or sets ``_fields_`` after the class; ``OffsetPtr[None]`` points
    to anything and is read through `cast`.

    ``node.next = target`` is ``node.next.set(target)``: for a target that is a ctypes
    object of the region, another pointer, or None. Structures that hold pointers can be
    assigned as well, see `assign`. This needs the type to be known to the library, which
    it is as soon as it was placed in a region or reached through a pointer.

    Args:
        target: As for `set`; only a pointer within a region can be anything but null.

    Fork and threads:
        Setting one is one store of 8 bytes. It is not ordered with other writes: use a
        lock or a channel to say "ready". Read as a field, ``node.next`` is the field and
        no copy of it: ``was = node.next.get()`` keeps what it pointed to, and
        ``a.next.swap(b.next)`` exchanges two.

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

    # Where the subscript stands, to look up a name.
    _globals: dict[str, Any] | None = None
    # Whether all that the type of the target leads to was checked.
    _checked = False

    if TYPE_CHECKING:
        # As a field of a structure: what it gives, and what may be assigned to it.
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
            raise TypeError(f"cannot make OffsetPtr[{name_of(kind)}]: {name_of(kind)} is no type of ctypes")
        return _known_pointer_type(cls, kind)

    @classmethod
    def resolve(cls, kind: Any) -> None:
        """Declare which type a name stands for, where it cannot be found.

        A name is looked up among the structures around the pointer, then where the
        subscript stands. Only a type that is local to a function needs this.

        Args:
            kind: A type of ctypes.

        Raises:
            TypeError: *kind* is no type of ctypes, or the type of the target is known
                and another.

        Example:
            >>> Link = OffsetPtr["Later"]
            >>> class Later(ctypes.Structure):
            ...     _fields_ = [("back", Link)]
            >>> Link.resolve(Later)
        """
        if not is_type(kind):
            raise TypeError(f"cannot resolve {cls.__name__} to {name_of(kind)}, which is no type of ctypes")
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
                    f"cannot find {cls._type_!r} of {cls.__name__}: it is no name of the module; "
                    "keep the pointer's type in a variable and call its resolve() with the type"
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
            # Zeros in this process' own memory, as of ``Node()``: there is nothing to point to.
            return 0, None
        return own + distance, mapping

    @property
    def distance(self) -> int:
        """What is stored: bytes from the pointer to its target, and 1 for null."""
        return self._distance

    def set(self, target: Any) -> None:
        """Point to *target*.

        Args:
            target: A ctypes object in the same region, of the pointer's type, of one
                derived from it, or an array of it; or a pointer to such; or None. An
                ``OffsetPtr[OffsetPtr[X]]`` points *to* an ``OffsetPtr[X]``; in all other
                cases a pointer gives its own target.

        Raises:
            TypeError: *target* is of another type.
            WildPointerError: *target* lies outside the region of the pointer, or the
                pointer lies in none. The pointer is as it was.
            ValueError: *target* is the second byte of the pointer itself, the distance of
                which is null's.
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
                f"{type(self).__name__} cannot point to {name_of(theirs)}: use OffsetPtr[{name_of(theirs)}], "
                f"or cast a pointer to it to {name_of(kind)}"
            )
        own = ctypes.addressof(self)
        mapping = mapping_at(own)
        if mapping is None:
            raise WildPointerError(
                f"an {type(self).__name__} that lies in no region can only be null: "
                "place it, or its structure, in a region first",
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
            TypeError: They point to different types.
            WildPointerError: They lie in different regions. Nothing was changed.
        """
        mine, theirs = self._check_target(other._pointer()), other._check_target(self._pointer())
        self._point(mine)
        other._point(theirs)

    @staticmethod
    def pointer_to(target: Any, field: str | None = None) -> Pointer[Any]:
        """Return a pointer to an object in a region, or to one of its fields.

        Args:
            target: A ctypes object in a region.
            field: Name of a field of it; for fields of simple types, which ctypes gives as
                numbers.

        Raises:
            TypeError: *target* is no ctypes object.
            WildPointerError: It lies in no region.

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
            raise TypeError(f"expected a ctypes object in a region, got {name_of(type(target))}")
        kind: Any = type(target)
        address = ctypes.addressof(target)
        if field is not None:
            address += getattr(kind, field).offset
            kind = field_type(kind, field)
        mapping = mapping_at(address)
        if mapping is None:
            raise WildPointerError(
                f"the {name_of(type(target))} at {address:#x} lies in no region: place() or construct() it in one",
                address=address,
            )
        check(kind)
        return Pointer(kind, address, mapping)

    def __iadd__(self, count: int) -> Self:  # type: ignore[override]  # in place, and not a Pointer
        self.set(self._moved(operator.index(count)))
        return self

    def __isub__(self, count: int) -> Self:  # type: ignore[override,misc]  # in place, and not a Pointer
        self.set(self._moved(-operator.index(count)))
        return self

    # Before those of ctypes.
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
    """Return whether a pointer to *wanted* may point to a *kind*: it is one, or an array of them."""
    if kind is None:
        return False
    if issubclass(kind, wanted):
        return True
    return issubclass(kind, ctypes.Array) and fits(kind._type_, wanted)


def field_type(kind: Any, name: str) -> Any:
    """Return the type of a field, of an anonymous member's as well."""
    for owner in kind.__mro__:
        for found, field_kind, *bits in vars(owner).get("_fields_", ()):
            if found == name:
                if bits:
                    raise TypeError(f"cannot point to {name_of(kind)}.{name}, which is bits of a field")
                return field_kind
        for member in vars(owner).get("_anonymous_", ()):
            inner = field_type(kind, member)
            if hasattr(inner, name):
                return field_type(inner, name)
    raise AttributeError(f"{name_of(kind)} has no field {name!r}")


def check_inside(address: int, size: int, mapping: Mapping, what: str) -> None:
    """Raise WildPointerError unless *size* bytes at *address* lie in the mapping; its end does."""
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
    """Return the *kind* at an address of a mapping, which stays mapped as long as that is alive.

    Raises:
        WildPointerError: It does not lie in the mapping.
        RegionAccessError: The mapping cannot be written to.
    """
    check_inside(address, ctypes.sizeof(kind), mapping, f"a pointer to {name_of(kind)}")
    exporter = mapping.exporter() if mapping.exporter is not None else None
    if exporter is None:
        raise RegionClosedError(f"cannot read {name_of(kind)}: its region was closed in this process")
    check_writable(kind, mapping.mode)
    return kind.from_buffer(exporter, address - mapping.address)


def check_writable(kind: Any, mode: Mode) -> None:
    """Raise RegionAccessError where a write through a ctypes object would end the process."""
    if mode not in (Mode.read_write, Mode.copy_on_write):
        raise RegionAccessError(
            errno.EACCES,
            f"cannot view {name_of(kind)} in a region that is {mode}: a ctypes object can be written to, which would "
            "end this process with SIGSEGV; map the memory copy_on_write to read it",
        )
