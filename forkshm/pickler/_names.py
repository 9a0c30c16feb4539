"""Which functions and classes of ``__main__`` the other side has too.

cloudpickle sends everything of ``__main__`` by value, with copies of the globals it
uses. A forked process has what was there when it was forked, so that can cross by name:
faster, and with the meaning it has in ``multiprocessing``: the function uses the globals
of the process it runs in, which an initializer may have set, and the class of an
instance is the class that the other side knows.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = (
    "NOTHING_KNOWN",
    "Known",
    "is_known",
    "known_after_import",
    "known_now",
    "known_to_children",
    "register_named",
)

#: Functions and classes by their id; the objects are kept, so that no id is used again.
Known = dict[int, Any]

NOTHING_KNOWN: Known = {}

#: What is looked for by its name; a function that a decorator made an object of is one, too.
named_kinds: tuple[type, ...] = (FunctionType, type)


def register_named(kind: type) -> None:
    """Say that objects of this type are functions: what children have of them crosses by name."""
    global named_kinds
    named_kinds = (*named_kinds, kind)


def known_now() -> Known:
    """Return what a process forked now is going to have."""
    main = sys.modules.get("__main__")
    return {id(thing): thing for thing in list(vars(main).values()) if isinstance(thing, named_kinds)}


def known_to_children(start_method: str | None = None) -> Known:
    """Return what a process started now is going to have; by default, started as is the default."""
    if start_method is None:
        start_method = _multiprocess.default_context.get_start_method(allow_none=True)
    return known_now() if start_method in (None, "fork") else known_after_import()


def known_after_import() -> Known:
    """Return what a process is going to have that imports ``__main__`` anew, as spawned ones do.

    That is what the program defines outside of ``if __name__ == "__main__"``. A notebook or
    an interactive session is not imported: nothing is known.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if main is None or path is None or hasattr(sys, "ps1"):
        return NOTHING_KNOWN
    names = _defined_in(path)
    return {
        id(thing): thing for name, thing in list(vars(main).items()) if name in names and isinstance(thing, named_kinds)
    }


@functools.lru_cache(maxsize=4)
def _defined_in(path: str) -> frozenset[str]:
    with contextlib.suppress(OSError, SyntaxError, ValueError), open(path, "rb") as source:
        return frozenset(_definitions(ast.parse(source.read()).body))
    return frozenset()


def _definitions(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, ast.If):
            if "__name__" not in ast.dump(statement.test):
                yield from _definitions(statement.body)
            yield from _definitions(statement.orelse)
        elif isinstance(statement, (ast.Try, ast.With)):
            yield from _definitions(statement.body)


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
