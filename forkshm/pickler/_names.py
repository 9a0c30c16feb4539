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
import importlib
import os
import sys
import weakref
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.pickler._code import global_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = (
    "NO_NAMES",
    "GlobalsOfMain",
    "ImportableNames",
    "changed_globals",
    "importable_after_import",
    "importable_in_children",
    "importable_now",
    "is_importable",
    "is_of_unimported_module",
    "is_unchanged",
    "register_named",
)

#: Functions and classes by their id; the objects are kept, so that no id is used again.
ImportableNames = dict[int, Any]

NO_NAMES: ImportableNames = {}


class _AtFork(dict[int, Any]):
    """What a forked process has, and what each global name of ``__main__`` was bound to then."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__({id(thing): thing for thing in names.values() if isinstance(thing, named_kinds)})
        self.names = {name: _trace_of(value) for name, value in names.items()}
        self.pid = os.getpid()


class _AfterImport(_AtFork):
    """What a process has that imported ``__main__`` anew; what other names are there, nobody knows."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__({name: thing for name, thing in names.items() if isinstance(thing, named_kinds)})


#: Values that are kept as they are: they are small, and what replaces one often has its address.
_ATOMS = (int, float, complex, bool, str, bytes, type(None), ModuleType, weakref.ref)
_LONGEST_ATOM = 1024


class _Trace:
    """A value that can only be told by its address."""

    __slots__ = ("address", "kind")

    def __init__(self, value: Any) -> None:
        self.address = id(value)
        self.kind = type(value)


def _trace_of(value: Any) -> Any:
    """Return what tells later whether a name still has this value, without keeping anything large."""
    if isinstance(value, named_kinds):
        return value
    if isinstance(value, _ATOMS) and (not isinstance(value, (str, bytes)) or len(value) <= _LONGEST_ATOM):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        return _Trace(value)


def _is_same(trace: Any, value: Any) -> bool:
    if trace is value:
        return True
    kind = type(trace)
    if kind is weakref.ref:
        return trace() is value
    if kind is _Trace:
        return bool(trace.address == id(value) and trace.kind is type(value))
    return kind is type(value) and isinstance(value, _ATOMS) and bool(trace == value)


#: What is looked for by its name; a function that a decorator made an object of is one, too.
named_kinds: tuple[type, ...] = (FunctionType, type)


def register_named(kind: type) -> None:
    """Register a type whose objects count as functions: those that children have cross by name."""
    global named_kinds
    named_kinds = (*named_kinds, kind)


def importable_now() -> ImportableNames:
    """Return what a process forked now is going to have."""
    main = sys.modules.get("__main__")
    return _AtFork(dict(vars(main)) if main is not None else {})


def importable_in_children(start_method: str | None = None) -> ImportableNames:
    """Return what a process started now is going to have; by default, started as is the default."""
    if start_method is None:
        start_method = _multiprocess.default_context.get_start_method(allow_none=True)
    return importable_now() if start_method in (None, "fork") else importable_after_import()


def importable_after_import() -> ImportableNames:
    """Return what a process is going to have that imports ``__main__`` anew, as spawned ones do.

    That is what the program defines outside of ``if __name__ == "__main__"``. A notebook or
    an interactive session is not imported: nothing is known.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if main is None or path is None or hasattr(sys, "ps1"):
        return NO_NAMES
    # The __main__.py of a package, a directory or a zip archive is not imported either: multiprocess leaves it out.
    name = getattr(main.__spec__, "name", None) or ""
    if name == "__main__" or name.endswith(".__main__"):
        return NO_NAMES
    names = _defined_in(path)
    return _AfterImport({name: thing for name, thing in list(vars(main).items()) if name in names})


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


def is_importable(thing: Any, importable: ImportableNames) -> bool:
    """Return whether the name of a function or class of ``__main__`` means the same in the receiver."""
    if thing.__module__ != "__main__":
        return False
    if id(thing) in importable and "." not in thing.__qualname__:
        return getattr(sys.modules["__main__"], thing.__qualname__, None) is thing
    found: Any = sys.modules["__main__"]
    for level, name in enumerate(thing.__qualname__.split(".")):
        found = getattr(found, name, None)
        if level == 0 and id(found) not in importable:
            return False
    return found is thing


def is_of_unimported_module(kind: type) -> bool:
    """Return whether a class can be imported by its name from a module that nobody has imported yet.

    ``numpy.recarray`` says that it is of ``numpy.rec``, which NumPy imports when it is first used. cloudpickle takes
    such a class for one that was made at run time, and sends a copy, in which ``super()`` fails.
    """
    name = kind.__module__
    if name in sys.modules or name == "__main__":
        return False
    try:
        found: Any = importlib.import_module(name)
        for part in kind.__qualname__.split("."):
            found = getattr(found, part)
    except Exception:  # there is no such module, or it cannot be imported
        return False
    return found is kind


_MISSING = object()


def _was_bound_anew(name: str, value: Any, importable: _AtFork) -> bool:
    then = importable.names.get(name, _MISSING)
    if then is _MISSING and isinstance(importable, _AfterImport):
        return False
    return not _is_same(then, value)


def is_unchanged(function: FunctionType, importable: ImportableNames) -> bool:
    """Return whether a function that crosses by name uses the same globals there as it does here.

    A global that was bound to something else since the fork (the cell of a notebook was run again, a parameter was
    set) is not what the child has under that name. The functions of ``__main__`` that the function calls are looked
    at as well. A value that was changed in place is not noticed.
    """
    if not isinstance(importable, _AtFork) or importable.pid != os.getpid():
        return True  # nobody knows what the names were bound to; in a child they are what its own code made of them
    main = vars(sys.modules["__main__"])
    functions = [function]
    for called in functions:  # which grows
        for name in global_names(called):
            value = main.get(name, _MISSING)
            if value is _MISSING:
                continue
            if _was_bound_anew(name, value, importable):
                return False
            if type(value) is FunctionType and value.__module__ == "__main__" and value not in functions:
                functions.append(value)
    return True


def changed_globals(importable: ImportableNames) -> Callable[[str, Any], bool]:
    """Return a function that tells of a global name of ``__main__`` whether it was bound anew since the fork."""
    if not isinstance(importable, _AtFork):
        return lambda *_: True

    def is_changed(name: str, value: Any) -> bool:
        if _was_bound_anew(name, value, importable):
            return True
        return type(value) is FunctionType and value.__module__ == "__main__" and not is_unchanged(value, importable)

    return is_changed


class GlobalsOfMain:
    """The globals of a function: some that are sent, and of other names what the receiver's ``__main__`` has."""

    __slots__ = ("names", "sent")

    def __init__(self, sent: dict[str, Any], names: list[str]) -> None:
        self.sent = sent
        self.names = names

    def __reduce__(self) -> Any:
        return globals_of_main, (self.sent, self.names)


def globals_of_main(sent: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the globals that arrived, and those that are here under these names."""
    main = vars(sys.modules["__main__"])
    return {**{name: main[name] for name in names if name in main}, **sent}
