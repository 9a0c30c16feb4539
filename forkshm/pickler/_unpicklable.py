"""Finds the part of an object that cannot be pickled, after pickling has failed.

The object is pickled again, by a pickler that notes every object it visits. Pickling goes depth first and ends with the
error, so the last noted object is the unpicklable part. Then the shortest path to it is searched for, through the same
parts that pickling visits.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import pickle
import types
from typing import TYPE_CHECKING, Any

from forkshm._system import path_of
from forkshm.errors import NotPicklableError, PoolClosedError, add_note, safe_repr
from forkshm.pickler._attributes import attribute_of
from forkshm.pickler._collect import Collector
from forkshm.pickler._exceptions import without_unpicklable
from forkshm.pickler._names import NO_NAMES, ImportableNames
from forkshm.pickler._pack import Payload, _Nowhere, _Pickler, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ("explain", "pack_exception")

# Errors that the current object causes; others come from the kernel, or from elsewhere.
_BLAMED = (TypeError, ValueError, AttributeError, RuntimeError, pickle.PicklingError)
# Number of objects to visit before the search is given up.
_FAR = 100_000


def explain(error: Exception, things: Mapping[str, Any], importable: ImportableNames = NO_NAMES) -> None:
    """Add to the message of *error* which part of *things* could not be pickled.

    The type and all other attributes stay. If the part is not found, the message stays, too.

    Args:
        error: What pickling them raised.
        things: The objects, by the names that the caller uses, for example ``"args"``.
        importable: The names of ``__main__`` that are sent by name.
    """
    if not isinstance(error, _BLAMED) or isinstance(error, RecursionError):
        return
    if isinstance(error, PoolClosedError):  # pickling an argument may use the pool
        return
    pickler = _Noting(importable)
    try:
        pickler.dump(list(things.values()))
    except Exception as again:
        if type(again) is not type(error) or pickler.last is None:
            return
    else:
        return
    unpicklable = pickler.last
    where = None
    with contextlib.suppress(Exception):  # the class of a proxy may raise, for example
        where = _path(things, unpicklable, pickler.reduced)
    where = where or f"in {' and '.join(things)}"
    found = f"{where}: {path_of(type(unpicklable))}"
    if len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({found})",)
    else:
        add_note(error, f"What cannot be pickled is {found}")


def pack_exception(error: BaseException, who: str, importable: ImportableNames = NO_NAMES) -> Payload:
    """Pickle an exception, if need be without its parts that cannot be pickled.

    If nothing of it can be sent, the payload is a `NotPicklableError` that says what *who* raised.
    """

    def dump(thing: Any) -> None:
        pickler = _Pickler(_Nowhere(), pickle.HIGHEST_PROTOCOL, buffer_callback=_NoCollector())
        pickler.collector, pickler.importable = _NoCollector(), importable
        pickler.dump(thing)

    try:
        return pack(error, importable=importable)
    except BaseException as refusal:  # a __reduce__ may raise anything
        reason = safe_repr(refusal)
    with contextlib.suppress(BaseException):
        rest = without_unpicklable(error, dump)
        if rest is not None:
            return pack(rest, importable=importable)
    return pack(NotPicklableError(f"{who} raised {safe_repr(error)}, which cannot be sent: {reason}"))


class _NoCollector(Collector):
    """Accepts every buffer and ignores it."""

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        return False


class _Noting(_Pickler):
    """Notes the objects that it visits, and how each is pickled."""

    def __init__(self, importable: ImportableNames) -> None:
        self.collector = _NoCollector()
        super().__init__(_Nowhere(), pickle.HIGHEST_PROTOCOL, buffer_callback=self.collector)
        self.importable = importable
        self.last: Any = None
        # By id: the object, kept alive so that the id is not used again, and its parts.
        self.reduced: dict[int, tuple[Any, Any]] = {}

    def reducer_override(self, thing: Any) -> Any:
        self.last = thing
        parts = super().reducer_override(thing)
        if parts is NotImplemented and not isinstance(thing, (type, types.FunctionType)):
            # Called here instead of by pickle, so that it is called once and the parts are known.
            reduce = self.dispatch_table.get(type(thing))
            parts = reduce(thing) if reduce else thing.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        self.reduced[id(thing)] = thing, parts
        return parts


def _path(roots: Mapping[str, Any], unpicklable: Any, reduced: dict[int, tuple[Any, Any]]) -> str | None:
    """Return the shortest path to the unpicklable part, for example ``"args[0].model._lock"``."""
    ways = [(thing, name) for name, thing in roots.items()]
    found = {id(thing) for thing, _ in ways}
    for thing, way in ways:  # the list grows meanwhile
        if thing is unpicklable:
            return way
        for step, part in _parts(thing, reduced):
            if id(part) not in found and not isinstance(part, _ATOMS):
                found.add(id(part))
                ways.append((part, way + step))
        if len(ways) > _FAR:
            break
    return None


_ATOMS = (int, float, complex, str, bytes, bytearray, type(None), types.ModuleType, types.CodeType)


def _parts(thing: Any, reduced: dict[int, tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield each part of *thing*, after the source text that leads to it."""
    if isinstance(thing, dict):
        for key, value in list(thing.items()):
            yield f"[{_short(key)}]", value
            yield f" key {_short(key)}", key
    elif isinstance(thing, (list, tuple, collections.deque)):
        fields = attribute_of(thing, "_fields", ())
        for index, value in enumerate(thing):
            yield (f".{fields[index]}" if index < len(fields) else f"[{index}]"), value
    elif isinstance(thing, (set, frozenset)):
        for value in list(thing):
            yield f" member {_short(value)}", value
    elif isinstance(thing, BaseException):
        for index, value in enumerate(thing.args):
            yield f".args[{index}]", value
        yield from ((f".{name}", value) for name, value in vars(thing).items())
    else:
        yield from _parts_of_callable(thing)
    if id(thing) in reduced:
        yield from _parts_of_reduced(thing, reduced[id(thing)][1])


def _parts_of_callable(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, types.FunctionType):
        yield from _parts_of_function(thing)
    elif isinstance(thing, types.MethodType):
        yield ".__self__", thing.__self__
        yield ".__func__", thing.__func__
    elif isinstance(thing, functools.partial):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    elif isinstance(thing, (staticmethod, classmethod)):
        yield ".__func__", thing.__func__
    elif isinstance(thing, property):
        yield from ((".fget", thing.fget), (".fset", thing.fset))
    elif isinstance(thing, types.CellType):
        try:
            yield ".cell_contents", thing.cell_contents
        except ValueError:  # an empty cell
            return


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".__closure__[{name!r}]", cell.cell_contents
        except ValueError:
            continue
    for index, value in enumerate(function.__defaults__ or ()):
        yield f".__defaults__[{index}]", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f".__kwdefaults__[{name!r}]", value
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield f".__globals__[{name!r}]", function.__globals__[name]
    for name, value in function.__dict__.items():
        yield f".{name}", value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _parts_of_reduced(thing: Any, parts: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, type):
        for name, value in list(vars(thing).items()):
            yield f".{name}", value
    if not isinstance(parts, tuple):
        return
    padded: tuple[Any, ...] = (*parts, None, None)
    args, state = padded[1], padded[2]
    # The state of most objects is their __dict__, or that and their __slots__.
    for attributes in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if isinstance(attributes, dict):
            for name, value in attributes.items():
                yield f".{name}", value
    for index, value in enumerate(args if isinstance(args, tuple) else ()):
        yield f".__reduce__()[1][{index}]", value
    if state is not None and not isinstance(state, dict):
        yield ".__reduce__()[2]", state


def _short(key: Any) -> str:
    if isinstance(key, (str, int, float, bytes, bool, type(None))):
        text = repr(key)
        return text if len(text) <= 40 else text[:37] + "..."
    return f"<{type(key).__qualname__}>"
