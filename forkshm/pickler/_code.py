"""Corrections to what cloudpickle makes of classes and code that are sent by value.

* Code keeps its file name. Code without a file (a notebook's cell, a line of an interactive session) is sent with its
  source, so that a traceback of the receiver shows the line.
* The type of a ctypes array arrives as that type.
* A function with a cache (``functools.lru_cache``), a cached property and a weak dict arrive without their caches and
  locks. cloudpickle sends none of them.
* A class written in C without an importable name, such as ``tuple_iterator``, is refused. Its copy would not work.
* A class with ``__slots__`` arrives with slots. Without them its objects would have a ``__dict__``, and could not be
  sent back to the process that has the class itself.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import operator
import os.path
import sys
import types
import typing
import weakref
from typing import Any

import cloudpickle
import cloudpickle.cloudpickle as _cloudpickle

__all__ = ("DECORATED", "LRU_CACHE", "OF_DECORATORS", "global_names", "reduce_array_type", "reduce_code", "with_slots")

LRU_CACHE: Any = type(functools.lru_cache(int))
"""The type of a function with a cache."""
DECORATED = (LRU_CACHE, functools.cached_property, functools.partialmethod, functools.singledispatchmethod)
"""Types of objects that decorators make of functions."""

# Replaces every file name.
_NO_FILE = "<dynamic-code>"
# Longer sources are not sent.
_LONGEST_SOURCE = 256 * 1024

# Flags of a class: made at run time, and without attributes that can be set.
_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8

_reduce_code: Any = cloudpickle.Pickler.dispatch_table[types.CodeType]


def global_names(function: types.FunctionType) -> list[str]:
    """Return the names of globals and builtins that a function uses."""
    return list(_cloudpickle._extract_code_globals(function.__code__))


def _lines_of_name(name: str) -> list[str]:
    """Return the source of a file that does not exist, such as a notebook's cell or a module in an archive."""
    if os.path.exists(name):
        return []  # the receiver reads it
    main = getattr(sys.modules.get("__main__"), "__dict__", {})
    # A loader may refuse the source with any exception.
    with contextlib.suppress(Exception):
        return linecache.getlines(name, main if main.get("__file__") == name else None)
    return []


def _lines_of_code(code: types.CodeType) -> list[str]:
    """Return the source of code that shares its file's name with other code: of ``python -c``, from Python 3.14 on."""
    entry: Any = getattr(linecache, "_interactive_cache", {}).get(_key_of(code))
    return [] if entry is None else entry[2]


def _key_of(code: types.CodeType) -> Any:
    # That of the module linecache.
    return code.co_filename, code.co_qualname, code.co_firstlineno


def reduce_code(code: types.CodeType) -> Any:
    """Send code with the name of its file, and with its source if there is no such file."""
    make, args = _reduce_code(code)
    named = tuple(code.co_filename if isinstance(part, str) and part == _NO_FILE else part for part in args)
    by_name = _lines_of_name(code.co_filename)
    source = by_name or _lines_of_code(code)
    if not source or sum(map(len, source)) > _LONGEST_SOURCE:
        return make, named
    return rebuild_code, (make, named, source, bool(by_name))


def rebuild_code(make: Any, args: tuple[Any, ...], source: list[str], by_name: bool) -> types.CodeType:
    """Return the code that arrived, and make its source available to tracebacks."""
    code: types.CodeType = make(*args)
    name = code.co_filename
    entry = sum(map(len, source)), None, source, name
    cache: Any = linecache.cache if by_name else getattr(linecache, "_interactive_cache", {})
    cache[name if by_name else _key_of(code)] = entry
    return code


def _reduce_cached(function: Any) -> Any:
    """Send a function with a cache: by name if it can be imported, else by value, with an empty cache."""
    found: Any = sys.modules.get(function.__module__) if function.__module__ != "__main__" else None
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is function:
        return function.__qualname__
    return rebuild_cached, (function.__wrapped__, function.cache_parameters()), vars(function)


def rebuild_cached(function: Any, parameters: dict[str, Any]) -> Any:
    """Return the function that arrived, with an empty cache."""
    return functools.lru_cache(**parameters)(function)


def _reduce_cached_property(cached: Any) -> Any:
    # Without the lock that it has up to Python 3.11.
    return functools.cached_property, (cached.func,), {"attrname": cached.attrname, "__doc__": cached.__doc__}


def _reduce_weak_dict(weak: Any) -> Any:
    return type(weak), (dict(weak),)


OF_DECORATORS: dict[type, Any] = {
    LRU_CACHE: _reduce_cached,
    functools.cached_property: _reduce_cached_property,
    # A function with single dispatch has one.
    weakref.WeakKeyDictionary: _reduce_weak_dict,
    weakref.WeakValueDictionary: _reduce_weak_dict,
}
"""For the dispatch table of a pickler."""


def reduce_array_type(kind: Any) -> Any:
    """Send a type such as ``c_double * 3``, which cannot be imported by name. Return None for any other type."""
    if type(kind).__module__ == "_ctypes" and hasattr(kind, "_length_") and kind._type_ * kind._length_ is kind:
        return operator.mul, (kind._type_, kind._length_)
    return None


def with_slots(kind: type, parts: Any) -> Any:
    """Return what cloudpickle sends for a class by value, with its slots where they must be."""
    if not isinstance(parts, tuple) or len(parts) != 6 or parts[0] is not _cloudpickle._make_skeleton_class:
        return parts
    if not kind.__flags__ & _HEAP_TYPE or kind.__flags__ & _IMMUTABLE_TYPE:
        return NotImplemented  # a class written in C cannot be copied; pickle says that it has no importable name
    if "__slots__" not in vars(kind):
        return parts
    make, args, (attributes, slots_of_class), items, pairs, set_state = parts
    constructor, name, bases, keywords, tracker, extra = args
    if typing.NamedTuple in bases:
        return parts  # sets the slots itself, and refuses others
    slots = vars(kind)["__slots__"]
    slots = (slots,) if isinstance(slots, str) else slots if isinstance(slots, dict) else tuple(slots)
    # Made with the class, because only the name can be set afterwards.
    members = {
        name
        for name, value in attributes.items()
        if isinstance(value, types.MemberDescriptorType) and value.__objclass__ is kind
    }
    attributes = {
        name: value
        for name, value in attributes.items()
        if name not in members and name not in ("__slots__", "__dict__")
    }
    keywords = {**keywords, "__slots__": slots}
    return (
        make,
        (constructor, name, bases, keywords, tracker, extra),
        (attributes, slots_of_class),
        items,
        pairs,
        set_state,
    )
