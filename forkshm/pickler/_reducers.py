"""The types that are sent in a way of their own.

Each type has a pair of functions: ``reduce_x`` here and ``rebuild_x`` at the other end. A buffer inside shared memory
needs no entry, because its address is recognized.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing.reduction
import pickle
import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.errors import RegionGoneError
from forkshm.pickler._attributes import attribute_of
from forkshm.region import MappedRegion, Mode, own_parts, region_at

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("find", "register", "register_lazy")

_reducers: dict[type, Callable[[Any], Any]] = {}
dispatch_table = _reducers
"""For picklers that take a table instead of calling `find`: the same dict."""
_lazy: dict[str, str] = {
    "numpy": "forkshm.integrations.numpy",
    "pandas": "forkshm.integrations.pandas",
    "pyarrow": "forkshm.integrations.pyarrow",
    "torch": "forkshm.integrations.torch",
}
# Reducers of a class and its subclasses.
_families: dict[type, Callable[[Any], Any]] = {}
_member_of: weakref.WeakKeyDictionary[type, Callable[[Any], Any] | None] = weakref.WeakKeyDictionary()


def register(kind: type, reduce: Callable[[Any], Any]) -> None:
    """Register *reduce* for objects of exactly this type.

    It returns what ``__reduce__`` would return, or NotImplemented to let pickle do it.
    """
    _reducers[kind] = reduce


def register_lazy(package: str, integration: str) -> None:
    """Import module *integration* when the first object of *package* is sent."""
    _lazy[package] = integration


def register_family(base: type, reduce: Callable[[Any], Any]) -> None:
    """Register *reduce* for types derived from *base* that have no reducer of their own."""
    _families[base] = reduce
    _member_of.clear()


def _find_in_families(kind: type) -> Callable[[Any], Any] | None:
    try:
        return _member_of[kind]
    except KeyError:
        found = next((reduce for base, reduce in _families.items() if issubclass(kind, base)), None)
        _member_of[kind] = found
        return found


# Keys of dicts and not sets, because all threads look here. Without the GIL, each lookup in a set takes its lock. In a
# process that is forked meanwhile the lock may be held forever (CPython 3.13). Lookups in dicts take no lock.
_plain: dict[type, None] = dict.fromkeys((int, float, bool, type(None), complex))
_plain_or_text: dict[type, None] = dict.fromkeys((*_plain, str, bytes))
_simple: dict[type, None] = dict.fromkeys(_plain)
plain_kinds = _plain.keys()
"""Types whose objects pickle to a few bytes, and contain nothing that needs forkshm's pickler."""
plain_or_text_kinds = _plain_or_text.keys()
"""`plain_kinds`, and types whose objects are as small while they are short."""
simple_kinds = _simple.keys()
"""Types that a plain pickler with these reducers sends correctly, without cloudpickle."""


# For some types, a function that returns whether an object is simple.
simple_when: dict[type, Callable[[Any], bool]] = {}


def register_plain(*kinds: type) -> None:
    """Register types whose objects pickle to a few bytes, and contain nothing that needs forkshm's pickler."""
    for known in (_plain, _plain_or_text, _simple):
        known.update(dict.fromkeys(kinds))


# For some types, a function that returns the bytes of an object in memory of its own, or -1 if it may be a view.
own_bytes_of: dict[type, Callable[[Any], int]] = {}


def register_simple(
    *kinds: type, when: Callable[[Any], bool] | None = None, own_bytes: Callable[[Any], int] | None = None
) -> None:
    """Register types whose objects and their parts do not need cloudpickle.

    Their reducers must not return NotImplemented then.

    Args:
        kinds: The types themselves, without their subclasses.
        when: Returns whether this is true of an object; by default it is true of all.
        own_bytes: Returns the number of bytes of an object in memory of its own, or -1 if the object is a view.
    """
    _simple.update(dict.fromkeys(kinds))
    if own_bytes is not None:
        own_bytes_of.update(dict.fromkeys(kinds, own_bytes))
    if when is not None:
        simple_when.update(dict.fromkeys(kinds, when))


MIN_BUNDLE = 32
"""The parts of a smaller container are not bundled."""
bundler: Callable[..., Any] | None = None
"""Makes few objects of a container of many, with the reducers that its objects need; None until it is needed."""
in_stream_table: dict[type, Callable[[Any], Any]] = {}


def register_bundler(bundle: Callable[..., Any], in_stream: dict[type, Callable[[Any], Any]]) -> None:
    """Register *bundle*, which returns the replacement of a large list, tuple or dict."""
    global bundler
    bundler = bundle
    in_stream_table.update(in_stream)


def find(kind: type) -> Callable[[Any], Any] | None:
    """Return the reducer of a type, or None."""
    if unfinished:
        complete()
    reduce = _reducers.get(kind)
    if reduce is None and _lazy:
        package = _package_of(kind)
        if package in _lazy:
            _integrate(package)
            reduce = _reducers.get(kind)
    if reduce is None:
        # Registered by the standard library, or by others, for objects that processes send each other.
        reduce = _OF_MULTIPROCESS.get(kind) or _OF_MULTIPROCESSING.get(kind)
        if reduce is not None and _package_of(kind) in _OURS:
            return None
        if _families and (reduce is None or _package_of(reduce) == "forkshm"):
            return _find_in_families(kind) or reduce
    return reduce


unfinished: dict[str, bool] = {}
"""Packages whose integration is being imported. An interrupted import leaves no module, but left reducers here."""


def complete() -> None:
    """Import the integrations whose import was interrupted."""
    for package in list(unfinished):
        _integrate(package)


def _integrate(package: str) -> None:
    """Import the module that sends the objects of a package. An interrupted call is repeated by the next one."""
    integration = _lazy.get(package)
    if integration is not None:
        unfinished[package] = True
        try:
            importlib.import_module(integration)
        except ImportError:
            _lazy.pop(package, None)
            unfinished.pop(package, None)
            raise
        _lazy.pop(package, None)
    unfinished.pop(package, None)


def _package_of(kind: Any) -> str:
    module: Any = kind.__module__
    return module.partition(".")[0] if isinstance(module, str) else ""  # some factories and extensions omit it


# Libraries whose own way is not used: PyTorch registers one with the standard library. It opens a socket, or a file in
# /dev/shm, for each tensor, and needs the sender to stay alive.
_OURS = frozenset({"torch"})
_OF_MULTIPROCESS: dict[type, Callable[[Any], Any]] = _multiprocess.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_OF_MULTIPROCESSING: dict[type, Callable[[Any], Any]] = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]


def reduce_region(region: MappedRegion) -> tuple[Any, ...]:
    """Send a region. Its bytes are recognized by their address, so none are copied.

    Only the pages of a ``copy_on_write`` region that were written are copied.

    Raises:
        RegionGoneError: The file of a ``copy_on_write`` region was truncated after it was mapped.
    """
    if region.mode is not Mode.copy_on_write:
        return rebuild_region, (pickle.PickleBuffer(region.buf),)
    view = region.buf
    own = [(start, pickle.PickleBuffer(view[start:end])) for start, end in own_parts(region)]
    try:
        shared = MappedRegion(region, Mode.read_only, region.offset, region.size)
    except ValueError as error:
        raise RegionGoneError(
            f"cannot send a copy_on_write region: {error}. It was truncated after it was mapped. Map it again."
        ) from error
    return rebuild_private, (pickle.PickleBuffer(shared.buf), own)


def rebuild_region(buffer: memoryview) -> MappedRegion:
    """Return the region whose bytes arrived."""
    region = region_at(kernel.address_of(buffer))
    if region is None:
        raise RegionGoneError("the memory of a region did not arrive as shared memory")
    return region


def rebuild_private(buffer: memoryview, own: list[tuple[int, memoryview]]) -> MappedRegion:
    """Return a ``copy_on_write`` region of the memory that arrived, with the sender's changes."""
    shared = rebuild_region(buffer)
    region = MappedRegion(shared, Mode.copy_on_write, shared.offset, shared.size)
    view = region.buf
    for start, data in own:
        view[start : start + len(data)] = data
    return region


def reduce_method(method: MethodType) -> Any:
    """Send a bound method by its name, or as a function and an object if the name leads to another function.

    multiprocessing always sends the name. Then ``super().run`` arrives as the method of the subclass, and private
    methods, decorated methods and functions bound by hand are not found.
    """
    owner, function = method.__self__, method.__func__
    name = attribute_of(function, "__name__")
    found = attribute_of(owner, name) if isinstance(name, str) else None
    if type(found) is MethodType and found.__func__ is function and found.__self__ is owner:
        return getattr, (owner, name)
    return MethodType, (function, owner)


def reduce_partial(partial: functools.partial[Any]) -> Any:
    """Send a partial function with its attributes, which multiprocessing leaves out."""
    return partial.__reduce__()


register(MappedRegion, reduce_region)
register_simple(MappedRegion)
register(MethodType, reduce_method)
register(functools.partial, reduce_partial)
