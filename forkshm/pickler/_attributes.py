"""Reads attributes of objects of any kind."""

from __future__ import annotations

from typing import Any

__all__ = ("attribute_of", "name_of")


def attribute_of(thing: Any, name: str, default: Any = None) -> Any:
    """Return an attribute, or *default* if the object lacks it or raises.

    What an object says of itself decides only how it is sent or described. A property, such as ``nbytes`` of a sparse
    tensor, or a ``__getattr__`` may raise any exception; that must not fail a call that pickle can send.
    """
    try:
        return getattr(thing, name)
    except Exception:
        return default


def name_of(function: Any) -> str:
    """Return the name of a function for messages."""
    # NumPy's functions have a __qualname__ since 2.1.
    for name in ("__qualname__", "__name__"):
        if isinstance(found := attribute_of(function, name), str) and found:
            return found
    return type(function).__name__
