"""Let ``help()`` and ``inspect.signature`` show types without quotes, in interactive sessions.

Modules here have ``from __future__ import annotations``, so annotations are strings, and Python before 3.14 shows them
as such: ``processes: 'int | None' = None``. A string whose repr has no quotes reads as it should. Programs that nobody
types into pay nothing for it.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

__all__ = ("is_interactive", "unquote")


class _Unquoted(str):
    """An annotation."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def is_interactive() -> bool:
    """Return whether somebody types into this process: a prompt, IPython, or a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or "IPython" in sys.modules


def unquote(thing: Any) -> None:
    """Show the types in the signatures of a function, or of a class and its methods, without quotes."""
    for each in vars(thing).values() if isinstance(thing, type) else [thing]:
        # Of methods that are bound, static or of a class, and of properties.
        function = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or not function.__module__.startswith("forkshm"):
            continue
        annotations = function.__annotations__
        for name, value in list(annotations.items()):
            if type(value) is str:
                annotations[name] = _Unquoted(value)
