"""Value, Array, RawValue, RawArray: ctypes objects in shared memory."""

from __future__ import annotations

import ctypes
import multiprocessing.reduction
import multiprocessing.sharedctypes
import operator
import weakref
from typing import Any

from forkshm import _interrupts, _multiprocess
from forkshm.sync._lock import RLock
from forkshm.sync.heap import BufferWrapper

__all__ = (
    "Array",
    "RawArray",
    "RawValue",
    "Synchronized",
    "SynchronizedArray",
    "SynchronizedBase",
    "SynchronizedString",
    "Value",
    "copy",
    "is_shared_ctype",
    "rebuild_ctype",
    "reduce_ctype",
    "synchronized",
)

_theirs: Any = _multiprocess.sharedctypes
_standard: Any = multiprocessing.sharedctypes
_types: dict[str, Any] = _theirs.typecode_to_type


def _kind_of(typecode_or_type: Any) -> Any:
    if not isinstance(typecode_or_type, str):
        return typecode_or_type
    try:
        return _types[typecode_or_type]
    except KeyError:
        raise TypeError(
            f"bad typecode {typecode_or_type!r}: use a ctypes type, or one of the type codes {', '.join(_types)}"
        ) from None


def _new(kind: Any) -> Any:
    return rebuild_ctype(kind, BufferWrapper(ctypes.sizeof(kind)), None)


def RawValue(typecode_or_type: Any, *args: Any) -> Any:  # noqa: N802 - the standard library's name
    """Return a ctypes object in shared memory, without a lock.

    Args:
        typecode_or_type: A ctypes type, or a type code of the `array` module.
        args: Arguments of the type; by default all bytes are zero.

    Raises:
        TypeError: There is no such type code.
    """
    made = _new(_kind_of(typecode_or_type))
    made.__init__(*args)
    return made


def RawArray(typecode_or_type: Any, size_or_initializer: Any) -> Any:  # noqa: N802
    """Return a ctypes array in shared memory, without a lock.

    Args:
        typecode_or_type: As for `RawValue`.
        size_or_initializer: The number of items, which are zero, or a sequence of items.

    Raises:
        TypeError: There is no such type code.
    """
    kind = _kind_of(typecode_or_type)
    if isinstance(size_or_initializer, int):
        return _new(kind * size_or_initializer)
    made = _new(kind * len(size_or_initializer))
    made.__init__(*size_or_initializer)
    return made


def Value(typecode_or_type: Any, *args: Any, lock: Any = True, ctx: Any = None) -> Any:  # noqa: N802
    """Return a ctypes object in shared memory, with a lock around each access.

    Args:
        typecode_or_type: As for `RawValue`.
        args: As for `RawValue`.
        lock: An existing lock; True for a new `RLock`, False for none.
        ctx: Ignored; for compatibility.

    Raises:
        AttributeError: *lock* is not a lock.
        RegionCreateError: The kernel refused memory.
        TypeError: There is no such type code.
    """
    return _with_lock(RawValue(typecode_or_type, *args), lock)


def Array(  # noqa: N802
    typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True, ctx: Any = None
) -> Any:
    """Return a ctypes array in shared memory, with a lock around each access.

    Args:
        typecode_or_type: As for `RawValue`.
        size_or_initializer: As for `RawArray`.
        lock: As for `Value`.
        ctx: Ignored; for compatibility.

    Raises:
        AttributeError: *lock* is not a lock.
        RegionCreateError: The kernel refused memory.
        TypeError: There is no such type code.
    """
    return _with_lock(RawArray(typecode_or_type, size_or_initializer), lock)


def _with_lock(made: Any, lock: Any) -> Any:
    if lock is False:
        return made
    if lock in (True, None):
        lock = RLock()
    if not hasattr(lock, "acquire"):
        raise AttributeError(f"{lock!r} has no method 'acquire'")
    return synchronized(made, lock)


def copy(obj: Any) -> Any:
    """Return a copy of a ctypes object in new shared memory."""
    made = _new(type(obj))
    memoryview(made).cast("B")[:] = memoryview(obj).cast("B")
    return made


def synchronized(obj: Any, lock: Any = None, ctx: Any = None) -> Any:
    """Return a wrapper around a ctypes object that acquires a lock for each access."""
    if isinstance(obj, (_theirs.SynchronizedBase, _standard.SynchronizedBase)):
        raise AssertionError(f"cannot synchronize {obj!r}: object already synchronized")
    if isinstance(obj, ctypes._SimpleCData):
        return Synchronized(obj, lock, ctx)
    if isinstance(obj, ctypes.Array):
        kind = SynchronizedString if obj._type_ is ctypes.c_char else SynchronizedArray
        return kind(obj, lock, ctx)
    found = _wrappers.get(type(obj))
    if found is None:
        names = [field[0] for kind in reversed(type(obj).__mro__) for field in vars(kind).get("_fields_", ())]
        properties = {name: _guarded(name) for name in names}
        found = type(f"Synchronized{type(obj).__name__}", (SynchronizedBase,), properties)
        _wrappers[type(obj)] = found
    return found(obj, lock, ctx)


_wrappers: weakref.WeakKeyDictionary[type, type[Any]] = weakref.WeakKeyDictionary()


# -- pickling: ctypes objects have no forkshm class ------------------------------------------


def reduce_ctype(obj: Any) -> Any:
    """Reduce a ctypes object: as a descriptor if its memory was allocated here, else by value."""
    wrapper = getattr(obj, "_wrapper", None)
    if isinstance(wrapper, BufferWrapper):
        return _rebuild, (_describe(type(obj)), wrapper)
    for library in (_theirs, _standard):
        if wrapper is not None and type(wrapper) is library.heap.BufferWrapper:
            return library.reduce_ctype(obj)
    reduced = obj.__reduce__()  # raises if the object contains pointers
    return (_rebuild_copy, (_describe(type(obj)), bytes(obj))) if isinstance(obj, ctypes.Array) else reduced


def is_shared_ctype(obj: Any) -> bool:
    """Return whether *obj* is a ctypes object whose memory was allocated here."""
    return isinstance(obj, _CDATA) and isinstance(getattr(obj, "_wrapper", None), BufferWrapper)


# The base class of all ctypes objects, which has no public name.
_CDATA = ctypes._SimpleCData.__mro__[-2]


def _describe(kind: Any) -> Any:
    """Return a type, or the item type and length of an array type, which has no importable name."""
    return (_describe(kind._type_), kind._length_) if issubclass(kind, ctypes.Array) else kind


def _rebuild(described: Any, wrapper: BufferWrapper) -> Any:
    return rebuild_ctype(_type_of(described), wrapper, None)


def _rebuild_copy(described: Any, data: bytes) -> Any:
    kind = _type_of(described)
    _register(kind)
    return kind.from_buffer_copy(data)


def _type_of(described: Any) -> Any:
    return _type_of(described[0]) * described[1] if isinstance(described, tuple) else described


def _register(kind: Any) -> None:
    for pickler in (_multiprocess.reduction.ForkingPickler, multiprocessing.reduction.ForkingPickler):
        pickler.register(kind, reduce_ctype)


def rebuild_ctype(kind: Any, wrapper: Any, length: int | None) -> Any:
    """Return the object of type *kind* that lies in the received memory."""
    if length is not None:
        kind = kind * length
    _register(kind)
    made = kind.from_buffer(wrapper.create_memoryview())
    made._wrapper = wrapper
    return made


# -- wrappers -----------------------------------------------------------------------------------


def _guarded(name: str) -> property:
    """Return a property that accesses the object's attribute with the lock held."""

    def get(self: Any) -> Any:
        with self._lock:
            return getattr(self._obj, name)

    def put(self: Any, value: Any) -> None:
        with self._lock:
            setattr(self._obj, name, value)

    return property(get, put)


class SynchronizedBase(_interrupts.Entered, _standard.SynchronizedBase, _theirs.SynchronizedBase):  # type: ignore[misc]
    """A ctypes object in shared memory, and its lock."""

    # `Entered` needs a C function.
    __exit__ = property(operator.attrgetter("_lock.__exit__"))

    def __init__(self, obj: Any, lock: Any = None, ctx: Any = None) -> None:
        self._obj = obj
        self._lock = lock if lock is not None else RLock()
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __reduce__(self) -> Any:
        # The lock comes first, because plain pickle refuses it with the more helpful error.
        return _rebuild_synchronized, (self._lock, self._obj)


def _rebuild_synchronized(lock: Any, obj: Any) -> Any:
    return synchronized(obj, lock)


class Synchronized(SynchronizedBase, _standard.Synchronized, _theirs.Synchronized):  # type: ignore[misc]
    """A number in shared memory, and its lock: what `Value` returns."""

    @property
    def value(self) -> Any:
        """The number."""
        with self._lock:
            return self._obj.value

    @value.setter
    def value(self, value: Any) -> None:
        with self._lock:
            self._obj.value = value


class SynchronizedArray(SynchronizedBase, _standard.SynchronizedArray, _theirs.SynchronizedArray):  # type: ignore[misc]
    """An array in shared memory, and its lock: what `Array` returns."""


class SynchronizedString(SynchronizedArray, _standard.SynchronizedString, _theirs.SynchronizedString):  # type: ignore[misc]
    """An array of characters in shared memory, and its lock."""

    value = _guarded("value")
    raw = _guarded("raw")
