"""Makes ``help()``, signatures, reprs and tracebacks show public names by their public path, and types without quotes.

forkshm's modules have ``from __future__ import annotations``, so annotations are strings, and Python shows them with
quotes: ``processes: 'int | None' = None``. A string subclass whose repr has no quotes avoids that. It takes some 3 ms
of an import.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

__all__ = ("publish",)


def publish(namespace: dict[str, Any]) -> None:
    """Set the ``__module__`` of the classes in ``__all__`` of a package to the package, and show types without quotes.

    Args:
        namespace: The ``globals()`` of the package. Classes of its private modules get its name as ``__module__``.
    """
    package = namespace["__name__"]
    for name in namespace["__all__"]:
        thing = namespace.get(name)
        if isinstance(thing, type) and thing.__module__.startswith(f"{package}._"):
            thing.__module__ = package
        _unquote(thing)


class _Unquoted(str):
    """An annotation."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


# Classes whose methods are unquoted. Most are a base of several public classes.
_unquoted: set[type] = set()


def _unquote(thing: Any) -> None:
    """Show the types in the signatures of a function, or of a class and its methods, without quotes."""
    if not isinstance(thing, type):
        _unquote_function(thing)
        return
    for kind in thing.__mro__:  # ``help()`` shows inherited methods, too
        if kind not in _unquoted and kind.__module__.startswith("forkshm"):
            _unquoted.add(kind)
            for each in vars(kind).values():
                _unquote_function(each)


def _unquote_function(each: Any) -> None:
    if type(each) is not FunctionType:  # it may be a class method, static method or property
        each = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
    function = getattr(each, "__wrapped__", each)
    if type(function) is FunctionType and function.__module__.startswith("forkshm"):
        annotations = function.__annotations__
        for name, value in annotations.items():
            if type(value) is str:
                annotations[name] = _Unquoted(value)
