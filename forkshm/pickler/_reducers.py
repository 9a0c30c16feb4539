"""Which types cross in a way of their own.

Each has a pair of functions, ``reduce_x`` here and ``rebuild_x`` at the other end. A
buffer inside shared memory needs no entry: it is recognised by its address.
"""

from __future__ import annotations

import importlib
import multiprocessing.reduction
import pickle
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.errors import RegionGoneError
from forkshm.region import MappedRegion, Mode, own_parts, region_at

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("find", "register", "register_lazy")

_reducers: dict[type, Callable[[Any], Any]] = {}
#: For picklers that take a table instead of asking `find`: the same dict.
dispatch_table = _reducers
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

    It returns what ``__reduce__`` would, or NotImplemented for pickle's own way.
    """
    _reducers[kind] = reduce


def register_lazy(package: str, integration: str) -> None:
    """Import module *integration* when the first object of *package* is to be sent."""
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


#: Types whose objects pickle to a few bytes, and of which nothing needs our pickler.
plain_kinds: set[type] = {int, float, bool, type(None), complex}
#: The same, and types whose objects are so while they are short.
plain_or_text_kinds: set[type] = plain_kinds | {str, bytes}
#: Types that a plain pickler with these reducers sends right, without cloudpickle.
simple_kinds: set[type] = set(plain_kinds)


# For some types, which of their objects are simple.
simple_when: dict[type, Callable[[Any], bool]] = {}


def register_plain(*kinds: type) -> None:
    """Register types whose objects pickle to a few bytes, and of which nothing needs our pickler."""
    plain_kinds.update(kinds)
    plain_or_text_kinds.update(kinds)
    simple_kinds.update(kinds)


def register_simple(*kinds: type, when: Callable[[Any], bool] | None = None) -> None:
    """Register types whose objects, and what is in them, do not need cloudpickle.

    Their reducers must not return NotImplemented then.

    Args:
        kinds: The types themselves; subclasses are others.
        when: Tells for which objects that is so; by default for all.
    """
    simple_kinds.update(kinds)
    if when is not None:
        simple_when.update(dict.fromkeys(kinds, when))


#: A container of fewer things is not looked into.
MIN_BUNDLE = 32
#: Makes few objects of a container of many, and the reducers for what can be sent without; None until it is needed.
bundler: Callable[..., Any] | None = None
in_stream_table: dict[type, Callable[[Any], Any]] = {}


def register_bundler(bundle: Callable[..., Any], in_stream: dict[type, Callable[[Any], Any]]) -> None:
    """Register *bundle*, which returns what is sent in place of large lists, tuples and dicts; see there."""
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
        # What the standard library, or others, registered for objects that processes pass each other.
        reduce = _OF_MULTIPROCESS.get(kind) or _OF_MULTIPROCESSING.get(kind)
        if reduce is not None and _package_of(kind) in _OURS:
            return None
        if reduce is None and _families:
            return _find_in_families(kind)
    return reduce


#: Packages whose integration is being imported. One that was interrupted is no module, and left reducers here.
unfinished: dict[str, bool] = {}


def complete() -> None:
    """Import the integrations whose import was interrupted."""
    for package in list(unfinished):
        _integrate(package)


def _integrate(package: str) -> None:
    """Import what knows how the objects of a package are sent. An interrupted call is repeated by the next one."""
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


def _package_of(kind: type) -> str:
    module: Any = kind.__module__
    return module.partition(".")[0] if isinstance(module, str) else ""  # some factories and extensions leave it out


#: Libraries whose objects cross in our way: PyTorch registers one with the standard library, which
#: opens a socket, or a file in /dev/shm, for each tensor, and needs the sender to live on.
_OURS = frozenset({"torch"})
_OF_MULTIPROCESS: dict[type, Callable[[Any], Any]] = _multiprocess.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_OF_MULTIPROCESSING: dict[type, Callable[[Any], Any]] = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]


def reduce_region(region: MappedRegion) -> tuple[Any, ...]:
    """Send a region: its bytes are recognised by their address, so none is copied.

    But for the pages of a ``copy_on_write`` region that were written: they are copied.
    """
    if region.mode is not Mode.copy_on_write:
        return rebuild_region, (pickle.PickleBuffer(region.buf),)
    view = region.buf
    own = [(start, pickle.PickleBuffer(view[start:end])) for start, end in own_parts(region)]
    shared = MappedRegion(region, Mode.read_only, region.offset, region.size)
    return rebuild_private, (pickle.PickleBuffer(shared.buf), own)


def rebuild_region(buffer: memoryview) -> MappedRegion:
    """Return the region whose bytes arrived."""
    region = region_at(kernel.address_of(buffer))
    if region is None:
        raise RegionGoneError("the memory of a region did not arrive as shared memory")
    return region


def rebuild_private(buffer: memoryview, own: list[tuple[int, memoryview]]) -> MappedRegion:
    """Return a ``copy_on_write`` region of the memory that arrived, with what was written to the sender's."""
    shared = rebuild_region(buffer)
    region = MappedRegion(shared, Mode.copy_on_write, shared.offset, shared.size)
    view = region.buf
    for start, data in own:
        view[start : start + len(data)] = data
    return region


register(MappedRegion, reduce_region)
register_simple(MappedRegion)
