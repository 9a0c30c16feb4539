"""Makes ``help()``, reprs and tracebacks show public names by their public path, and types without quotes.

forkshm's modules have ``from __future__ import annotations``, so annotations are strings, and Python before 3.14 shows
them with quotes: ``processes: 'int | None' = None``. A string subclass whose repr has no quotes avoids that. Programs
that are not interactive skip this.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

__all__ = ("is_interactive", "publish", "unquote")


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
        if is_interactive():
            unquote(thing)


class _Unquoted(str):
    """An annotation."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def is_interactive() -> bool:
    """Return whether this process is interactive: a prompt, IPython, or a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or "IPython" in sys.modules


def unquote(thing: Any) -> None:
    """Show the types in the signatures of a function, or of a class and its methods, without quotes."""
    # ``help()`` shows inherited methods, too.
    kinds = thing.__mro__ if isinstance(thing, type) else ()
    for each in [each for kind in kinds for each in vars(kind).values()] or [thing]:
        # Also unwrap class methods, static methods and properties.
        function = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or not function.__module__.startswith("forkshm"):
            continue
        annotations = function.__annotations__
        for name, value in list(annotations.items()):
            if type(value) is str:
                annotations[name] = _Unquoted(value)
