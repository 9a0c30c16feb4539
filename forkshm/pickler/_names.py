"""Which functions and classes of ``__main__`` the other side has too.

cloudpickle sends everything of ``__main__`` by value, with copies of the globals it
uses. A forked process has what was there when it was forked, so that can cross by name:
faster, and with the meaning it has in ``multiprocessing``: the function uses the globals
of the process it runs in, which an initializer may have set, and the class of an
instance is the class that the other side knows.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

__all__ = ("NOTHING_KNOWN", "Known", "is_known", "known_now")

#: Functions and classes by their id; the objects are kept, so that no id is used again.
Known = dict[int, Any]

NOTHING_KNOWN: Known = {}


def known_now() -> Known:
    """Return what a process forked now is going to have."""
    main = sys.modules.get("__main__")
    return {id(thing): thing for thing in list(vars(main).values()) if isinstance(thing, (FunctionType, type))}


def is_known(thing: Any, known: Known) -> bool:
    """Tell whether the name of a function or class of ``__main__`` means the same there."""
    if thing.__module__ != "__main__":
        return False
    if id(thing) in known and "." not in thing.__qualname__:
        return getattr(sys.modules["__main__"], thing.__qualname__, None) is thing
    found: Any = sys.modules["__main__"]
    for level, name in enumerate(thing.__qualname__.split(".")):
        found = getattr(found, name, None)
        if level == 0 and id(found) not in known:
            return False
    return found is thing
