"""Annotations of functions and classes that are sent by value, on CPython 3.14 and newer.

There, annotations are evaluated when they are first read (PEP 649). cloudpickle reads those of a function, which fails
if a name is defined for type checkers only. It leaves out those of a class that nobody has read yet. Annotations that
cannot be evaluated are sent as strings, which is what ``from __future__ import annotations`` makes of all of them.
"""

from __future__ import annotations

import importlib
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("reduce_function", "with_annotations")

_ARE_LAZY = sys.version_info >= (3, 14)


def reduce_function(reduce: Callable[[Any], Any], function: FunctionType) -> Any:
    """Return what *reduce* returns for *function*, also if its annotations cannot be evaluated."""
    try:
        return reduce(function)
    except Exception:
        annotations = _annotations_of(function)
        if annotations is None:
            raise
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__dict__.update(function.__dict__)
    for name in ("__kwdefaults__", "__module__", "__qualname__", "__doc__"):
        setattr(copy, name, getattr(function, name))
    copy.__annotations__ = annotations
    return reduce(copy)


def with_annotations(kind: type, parts: Any) -> Any:
    """Return *parts*, which cloudpickle sends for a class by value, with the annotations of the class."""
    if isinstance(parts, tuple) and vars(kind).get("__annotate_func__") is not None:
        attributes = parts[2][0]
        annotations = _annotations_of(kind)
        if annotations is not None and "__annotations_cache__" not in attributes:
            attributes["__annotations__"] = annotations
    return parts


def _annotations_of(thing: Any) -> dict[str, Any] | None:
    """Return the annotations of a function or class, or None if they cannot be had."""
    if not _ARE_LAZY:
        return None
    try:
        return dict(thing.__annotations__)
    except Exception:
        annotationlib: Any = importlib.import_module("annotationlib")
        try:
            return dict(annotationlib.get_annotations(thing, format=annotationlib.Format.STRING))
        except Exception:
            return None
