"""Calls as bytes, with the large arrays in them named instead of contained.

The client pickles a call with a `Writer`. An array of at least `LARGE` bytes becomes a name in the stream, and a
`NodeArray` that is moved to each node once. A worker reads the stream with `read`, given the node's arrays by name.
"""

from __future__ import annotations

import collections
import contextlib
import io
import multiprocessing.shared_memory
import pickle
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import cloudpickle

from forkshm.backend import kernel
from forkshm.channel import Connection, Queue, SimpleQueue
from forkshm.errors import (
    NotPicklableError,
    NotUnpicklableError,
    RemoteTraceback,
    UnsupportedError,
    safe_repr,
    set_cause,
)
from forkshm.pickler import (
    REFUSED,
    is_of_unimported_module,
    reduce_array_type,
    reduce_code,
    reduce_exception,
    with_slots,
    without_unpicklable,
)
from forkshm.region import MappedRegion
from forkshm.region.locks import Barrier, Condition, Mutex, RWLock, Semaphore
from forkshm.spmd import Member
from forkshm.sync import Barrier as ClassicBarrier
from forkshm.sync import BufferWrapper, Event, Lock, RLock
from forkshm.sync import Condition as ClassicCondition
from forkshm.sync import Semaphore as ClassicSemaphore
from forkshm.sync.sharedctypes import SynchronizedBase, is_shared_ctype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ("LARGE", "Kept", "NodeArray", "Raised", "Results", "Writer", "known", "loaded", "read")

LARGE = 2**20
"""Minimum bytes of an array that is moved to each node once, instead of with each call."""

# Objects whose memory or kernel object belongs to one machine.
_OF_ONE_MACHINE: tuple[type, ...] = (
    MappedRegion,
    Mutex,
    RWLock,
    Semaphore,
    Condition,
    Barrier,
    Queue,
    SimpleQueue,
    Connection,
    Member,
    Lock,
    RLock,
    ClassicSemaphore,
    ClassicCondition,
    ClassicBarrier,
    Event,
    BufferWrapper,
    SynchronizedBase,
    multiprocessing.shared_memory.SharedMemory,
)


class NodeArray:
    """A copy of an array in sealed shared memory, on the client or on a node.

    Attributes:
        name: Its name in streams. An array has the same name on all nodes.
        array: Its elements. No process can write to them.
    """

    __slots__ = ("__weakref__", "array", "name")

    def __init__(self, name: str, array: Any) -> None:
        self.name = name
        self.array = array
        known[name] = self

    @classmethod
    def copied(cls, name: str, array: Any) -> NodeArray:
        """Return a copy of any array."""
        from forkshm.integrations import numpy

        copy = numpy.empty(array.shape, array.dtype, "F" if _is_fortran(array) else "C")
        if array.flags.forc:
            _bytes_of(copy)[:] = _bytes_of(array)  # also those between the fields of a record
        else:
            copy[...] = array
        return cls(name, _sealed(copy))

    def __sizeof__(self) -> int:
        return int(self.array.nbytes)  # Dask estimates the cost of moves from it

    def __reduce_ex__(self, protocol: Any) -> Any:
        array = self.array
        return _arrive, (
            self.name,
            array.dtype,
            array.shape,
            _is_fortran(array),
            pickle.PickleBuffer(_bytes_of(array)),
        )


known: weakref.WeakValueDictionary[str, NodeArray] = weakref.WeakValueDictionary()
"""The arrays in this process, by name."""


def _arrive(name: str, dtype: Any, shape: tuple[int, ...], is_fortran: bool, elements: Any) -> NodeArray:
    """Return the array of this node that has the elements; create it if the node has none."""
    from forkshm.integrations import numpy

    node = known.get(name)
    if node is None:
        array = numpy.empty(shape, dtype, "F" if is_fortran else "C")
        _bytes_of(array)[:] = memoryview(elements).cast("B")
        node = NodeArray(name, _sealed(array))
    return node


def _bytes_of(array: Any) -> Any:
    """Return the memory of a contiguous array as bytes."""
    return (array.T if _is_fortran(array) else array).reshape(-1).view("u1")


def _is_fortran(array: Any) -> bool:
    return bool(array.flags.f_contiguous and not array.flags.c_contiguous)


def _sealed(array: Any) -> Any:
    with contextlib.suppress(UnsupportedError):  # without seals, the array is still read-only
        array.region.seal()
    array.flags.writeable = False
    return array


class Kept:
    """Keeps an array on one node. Only the name of the array is moved to other nodes, or written to disk."""

    __slots__ = ("node",)

    def __init__(self, node: NodeArray | None) -> None:
        self.node = node

    def __reduce__(self) -> Any:
        return _kept, (None if self.node is None else self.node.name,)


def _kept(name: str | None) -> Kept:
    return Kept(None if name is None else known.get(name))


_OF_CLOUDPICKLE: Any = cloudpickle.Pickler.dispatch_table


class Writer(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """A pickler for calls.

    Args:
        name_of: Called with each large array; returns its name in the stream. By default the stream contains arrays.
        remote: The type of results that stayed on a node, and a function that returns the name of one.
        share_globals: Functions of one module that are sent by value have one namespace in the reader's process.
        buffer_callback: Called with each large buffer, as by `pickle.Pickler`. By default the stream contains them.
    """

    # Whether this writes an exception of a chain. The chain is written by the exception that begins it.
    _in_chain = False
    # Code keeps its file and lines, so that tracebacks show them.
    dispatch_table: ClassVar[Any] = collections.ChainMap(
        {types.CodeType: reduce_code, **REFUSED}, *_OF_CLOUDPICKLE.maps
    )

    def __init__(
        self,
        name_of: Callable[[Any], str] | None = None,
        remote: tuple[type, Callable[[Any], str]] | None = None,
        *,
        share_globals: bool = False,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
    ) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=5, buffer_callback=buffer_callback)
        self._name_of = name_of
        self._remote = remote
        self._share_globals = share_globals
        self._namespaces: dict[int, _Namespace] = {}
        numpy = sys.modules.get("numpy")
        self._array_type: Any = None if numpy is None else numpy.ndarray

    def write(self, thing: Any) -> bytes:
        """Return *thing* as bytes."""
        self._file.seek(0)
        self._file.truncate()
        self.clear_memo()
        self._namespaces.clear()
        self.dump(thing)
        return self._file.getvalue()

    def persistent_id(self, obj: Any) -> Any:
        """Return the name of a large array or a remote result; None for other objects."""
        array_type = self._array_type
        if array_type is not None and self._name_of is not None and isinstance(obj, array_type):
            if obj.nbytes >= LARGE and not obj.dtype.hasobject and _is_plain(type(obj), array_type):
                return self._name_of(obj)
        elif self._remote is not None and isinstance(obj, self._remote[0]):
            return self._remote[1](obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Refuse objects that cannot be shared between machines."""
        if isinstance(obj, _OF_ONE_MACHINE) or is_shared_ctype(obj):
            raise UnsupportedError(
                f"cannot send a {type(obj).__qualname__} to a cluster: its memory is shared by the processes of one "
                "machine only. Pass an array, of which each node gets a copy, and return changed values.",
                capability="cluster",
            )
        if isinstance(obj, BaseException):
            return reduce_exception(obj, None if self._in_chain else self._dump_of_chain)
        if isinstance(obj, type):
            if is_of_unimported_module(obj):
                return NotImplemented
            return reduce_array_type(obj) or with_slots(obj, super().reducer_override(obj))
        if (
            self._array_type is not None
            and _is_plain(type(obj), self._array_type)
            and obj.__array_interface__["data"][1]
        ):
            # Copies are writable. Out of a read-only buffer, pickle would make a read-only array.
            return obj.copy("K").__reduce_ex__(5)
        if type(obj) is types.FunctionType and self._share_globals:
            return self._with_namespace(obj, super().reducer_override(obj))
        return super().reducer_override(obj)

    def _dump_of_chain(self, error: BaseException) -> bytes:
        writer = Writer()
        writer._in_chain = True
        return writer.write(error)

    def _with_namespace(self, function: types.FunctionType, parts: Any) -> Any:
        """Return the reduction of a function that is sent by value, with the namespace of its module."""
        name = function.__globals__.get("__name__")
        if type(parts) is not tuple or name is None:
            return parts
        make, (code, start, *others), (state, slots), *rest = parts
        namespace = self._namespaces.get(id(start))
        if namespace is None:
            namespace = self._namespaces[id(start)] = _Namespace(name, start)
        slots = {**slots, "__globals__": _Sent(name, slots["__globals__"])}
        return make, (code, namespace, *others), (state, slots), *rest


def _is_plain(kind: type, array_type: type) -> bool:
    """Return whether an array of this type is fully described by its elements."""
    return kind is array_type or (kind.__module__.startswith("forkshm.") and kind.__name__ == "SharedArray")


class _Namespace:
    """The globals of a module that the reader's process cannot import."""

    def __init__(self, name: str, start: dict[str, Any]) -> None:
        self.name = name
        self.start = start

    def __reduce__(self) -> Any:
        return _namespace, (self.name, self.start)


class _Sent:
    """Globals that a function refers to."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values

    def __reduce__(self) -> Any:
        return _news, (self.name, self.values)


# The namespaces of modules of the client in this process, and the globals in them that arrived last, by module.
_namespaces: dict[str, dict[str, Any]] = {}
_arrived: dict[str, dict[str, Any]] = {}


def _namespace(name: str, start: dict[str, Any]) -> dict[str, Any]:
    return _namespaces.setdefault(name, start)


def _news(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the globals that arrived, without those that this process has set itself."""
    namespace, arrived = _namespaces[name], _arrived.setdefault(name, {})
    missing = object()
    news = {key: value for key, value in values.items() if namespace.get(key, missing) is arrived.get(key, missing)}
    arrived.update(news)
    return news


class _Reader(pickle.Unpickler):
    def __init__(self, stream: bytes | memoryview, values: Mapping[str, Any], buffers: Iterable[Any]) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._values = values

    def persistent_load(self, pid: Any) -> Any:
        return self._values[pid]


def read(stream: bytes | memoryview, values: Mapping[str, Any], buffers: Iterable[Any] = ()) -> Any:
    """Return the object that a `Writer` wrote; *values* has the arrays and results by name."""
    return _Reader(stream, values, buffers).load()


class Raised:
    """An exception raised by a call, and its traceback as text. Dask's pickler could not rebuild every exception.

    Args:
        error: The exception. It is sent without its parts that cannot be pickled.
        text: The traceback; None if the call did not raise the exception itself.
        call: The name of the call, if its worker did not return.
    """

    def __init__(self, error: BaseException, text: str | None, call: str | None = None) -> None:
        self.text = text
        self.call = call
        self._error = _exception_as_bytes(error)

    def open(self) -> BaseException:
        """Return the exception, with the traceback as its cause."""
        try:
            error: BaseException = read(self._error, {})
        except Exception as reason:
            error = NotUnpicklableError(
                f"a call raised an exception that cannot be unpickled on the client: {safe_repr(reason)}"
            )
        if self.text is not None:
            traceback = RemoteTraceback(self.text)
            traceback.__cause__ = error.__cause__
            set_cause(error, traceback)
        return error


def _exception_as_bytes(error: BaseException) -> bytes:
    write = Writer().write
    try:
        return write(error)
    except BaseException as refusal:  # a __reduce__ may raise anything
        reason = safe_repr(refusal)
    with contextlib.suppress(BaseException):
        rest = without_unpicklable(error, write)
        if rest is not None:
            return write(rest)
    return write(NotPicklableError(f"a call raised {safe_repr(error)}, which cannot be sent: {reason}"))


class Results:
    """The results of a group, on their way from a worker to the client or to another node.

    The node passes them on without unpickling them. Dask's serializers would drop the class of an array.

    Args:
        items: A tuple of one value for each result, or a `Raised`.

    Attributes:
        frames: Where each item is, the pickled items, and their large buffers.
    """

    __slots__ = ("frames",)

    def __init__(self, items: list[Any]) -> None:
        numbers: dict[tuple[int, int], int] = {}
        buffers: list[memoryview] = []
        used: list[int] = []

        def take(buffer: pickle.PickleBuffer) -> None:
            raw = buffer.raw()
            number = numbers.setdefault((kernel.address_of(raw), raw.nbytes), len(buffers))
            if number == len(buffers):
                buffers.append(raw)
            used.append(number)

        writer = Writer(buffer_callback=take)
        streams, places = [], []
        for item in items:
            # Each by itself, so that an item which cannot be unpickled leaves the others alone.
            streams.append(writer.write(item))
            places.append((len(streams[-1]), tuple(used)))
            used.clear()
        self.frames: list[Any] = [pickle.dumps(places), b"".join(streams), *buffers]

    @classmethod
    def arrived(cls, *frames: Any) -> Results:
        """Return the results that arrived."""
        results = cls.__new__(cls)
        results.frames = list(frames)
        return results

    def __reduce__(self) -> Any:
        places, streams, *buffers = self.frames
        return Results.arrived, (bytes(places), bytes(streams), *map(pickle.PickleBuffer, buffers))

    def __sizeof__(self) -> int:
        return sum(memoryview(frame).nbytes for frame in self.frames)

    def open(self) -> list[Any]:
        """Return the items, with memory of their own if it arrived read-only.

        An item that cannot be unpickled in this process is a `Raised`.
        """
        places, streams, *views = [memoryview(frame) for frame in self.frames]
        buffers = [bytearray(view) if view.readonly else view for view in views]
        items: list[Any] = []
        end = 0
        for length, used in pickle.loads(places):
            start, end = end, end + length
            try:
                items.append(read(streams[start:end], {}, [buffers[number] for number in used]))
            except Exception as reason:
                error = NotUnpicklableError(
                    f"the result of a call arrived, and unpickling it raised {safe_repr(reason)}"
                )
                error.__cause__ = reason
                items.append(Raised(error, None))
        return items


# Names are unique, so equal streams have equal arrays.
_functions: dict[bytes, Any] = {}


def loaded(stream: bytes, values: Mapping[str, Any]) -> Any:
    """Return the function that *stream* holds; cache the last one for the next chunk of its map."""
    if stream not in _functions:
        function = read(stream, values)
        _functions.clear()
        _functions[stream] = function
    return _functions[stream]
