"""Which functions and classes of ``__main__`` the receiver has too.

cloudpickle sends everything of ``__main__`` by value, with copies of the globals it uses. A forked process has all that
existed at the fork, so functions and classes can be sent by name. This is faster, and means the same as in
``multiprocessing``: a function uses the globals of the process it runs in, which an initializer may have set, and the
class of an instance is the receiver's class.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib
import os
import sys
import weakref
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.pickler._code import DECORATED, LRU_CACHE, global_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = (
    "NO_NAMES",
    "GlobalsOfMain",
    "ImportableNames",
    "changed_globals",
    "file_of_main",
    "importable_after_import",
    "importable_in_children",
    "importable_now",
    "is_importable",
    "is_of",
    "is_of_unimported_module",
    "is_unchanged",
    "left_to_receiver",
    "register_named",
)

ImportableNames = dict[int, Any]
"""Functions and classes by their id; the objects are kept, so that no id is used again."""

NO_NAMES: ImportableNames = {}


def is_of(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value is of one of these types, without asking the value.

    ``isinstance`` reads its ``__class__``. That of a proxy, such as Flask's ``request``, may raise any exception.
    """
    return issubclass(type(value), kinds)


class _AtFork(dict[int, Any]):
    """The names that a forked process has, and the value of each global name of ``__main__`` at the fork."""

    # Whether they are those of children that this process forks, which begin with its values.
    is_of_children = False

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__({id(thing): thing for thing in names.values() if is_of(thing, named_kinds)})
        self.names = {name: _trace_of(value) for name, value in names.items()}
        self.pid = os.getpid()
        # By the id of a function or class in this dict: the names that it uses. Filled while none is rebound.
        self.used: dict[int, _UsedNames] = {}


class _AfterImport(_AtFork):
    """The names that a process has which imported ``__main__`` again; it may have others, too."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__({name: thing for name, thing in names.items() if is_of(thing, named_kinds)})


# Values that are kept as they are: they are small, and a new value often gets the same address.
_ATOMS = (int, float, complex, bool, str, bytes, type(None), ModuleType, weakref.ref)
_LONGEST_ATOM = 1024


class _Trace:
    """A value that can be identified only by its address."""

    __slots__ = ("address", "kind")

    def __init__(self, value: Any) -> None:
        self.address = id(value)
        self.kind = type(value)


def _trace_of(value: Any) -> Any:
    """Return an object that tells later whether a name still has this value, without keeping anything large."""
    if is_of(value, named_kinds):
        return value
    if is_of(value, _ATOMS) and (not is_of(value, (str, bytes)) or len(value) <= _LONGEST_ATOM):
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
    return kind is type(value) and is_of(value, _ATOMS) and bool(trace == value)


named_kinds: tuple[type, ...] = (FunctionType, type, LRU_CACHE)
"""Types of objects that are found by name. A decorator can make a function an object of another type."""


def register_named(kind: type) -> None:
    """Register a type whose objects count as functions: they are sent by name if children have them."""
    global named_kinds
    named_kinds = (*named_kinds, kind)


def importable_now() -> _AtFork:
    """Return the names that a process forked now will have."""
    main = sys.modules.get("__main__")
    return _AtFork(dict(vars(main)) if main is not None else {})


def importable_in_children(start_method: str | None = None) -> ImportableNames:
    """Return the names that a process started now will have; by default with the default start method."""
    if start_method is None:
        start_method = _multiprocess.default_context.get_start_method(allow_none=True)
    if start_method not in (None, "fork"):
        return importable_after_import()
    names = importable_now()
    names.is_of_children = True
    return names


def importable_after_import() -> ImportableNames:
    """Return the names that a process will have which imports ``__main__`` again, such as a spawned one.

    These are the names that the program defines outside of ``if __name__ == "__main__"``. A notebook or an interactive
    session is not imported, so none are known.
    """
    main = sys.modules.get("__main__")
    path = file_of_main()
    if main is None or path is None or hasattr(sys, "ps1"):
        return NO_NAMES
    # multiprocess does not import the __main__.py of a package, a directory or a zip archive either.
    # A program that pdb runs has no __spec__.
    name = getattr(getattr(main, "__spec__", None), "name", None) or ""
    if name == "__main__" or name.endswith(".__main__"):
        return NO_NAMES
    names = _defined_in(path)
    return _AfterImport({name: thing for name, thing in list(vars(main).items()) if name in names})


def file_of_main() -> str | None:
    """Return the file of ``__main__``, or None if another process cannot read the program from it.

    That is so of a program on standard input, on another fd (``python <(generate)``), and of one whose file was
    deleted. Functions and classes of such a program are sent by value, as those of ``python -c`` are.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is None or getattr(main, "__spec__", None) is not None or getattr(sys, "frozen", False):
        return path
    first_directory: str | None = _multiprocess.process.ORIGINAL_DIR  # type: ignore[attr-defined]
    whole = os.path.join(first_directory or "", path)
    is_readable = os.path.isfile(whole) and not whole.startswith(("/dev/fd/", "/dev/stdin", "/proc/"))
    return path if is_readable else None


# CPython before 3.13 may raise SystemError while another thread parses, too: both count in one variable (gh-106905).
_PARSED_AT_MOST = 100


@functools.lru_cache(maxsize=4)
def _defined_in(path: str) -> frozenset[str]:
    with contextlib.suppress(OSError, SyntaxError, ValueError), open(path, "rb") as source:
        text = source.read()
        for _ in range(_PARSED_AT_MOST):
            with contextlib.suppress(SystemError):
                return frozenset(_definitions(ast.parse(text).body))
    return frozenset()


def _definitions(body: list[Any]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):  # of a class that a call makes, such as a namedtuple
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
        elif isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            yield from _definitions(statement.orelse)
        else:
            for part in ("body", "handlers", "cases", "orelse", "finalbody"):
                yield from _definitions(getattr(statement, part, []))


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
    """Return whether a class can be imported by name from a module that is not imported yet.

    ``numpy.recarray`` claims to be in ``numpy.rec``, which NumPy imports when it is first used. cloudpickle takes such
    a class for one that was made at run time, and sends a copy, in which ``super()`` fails.
    """
    name = kind.__module__
    if name in sys.modules or name == "__main__":
        return False
    try:
        found: Any = importlib.import_module(name)
        for part in kind.__qualname__.split("."):
            found = getattr(found, part)
    except Exception:  # the module does not exist, or cannot be imported
        return False
    return found is kind


_MISSING = object()


def _was_bound_anew(name: str, value: Any, importable: _AtFork) -> bool:
    then = importable.names.get(name, _MISSING)
    if then is _MISSING and isinstance(importable, _AfterImport):
        return False
    return not _is_same(then, value)


class _UsedNames:
    """The global names of ``__main__`` that a function or class uses, itself or through functions that it calls."""

    __slots__ = ("by_classes", "by_functions", "is_complete")

    def __init__(self, thing: Any, main: dict[str, Any]) -> None:
        functions: set[str] = set()
        classes: set[str] = set()
        self.is_complete = True  # whether all names have a value now
        is_class = is_of(thing, type)
        found = [(thing, is_class)]
        seen = {(id(thing), is_class)}
        for part, is_of_class in found:  # the list grows meanwhile
            parts = list(_parts_with_code(part))
            if type(part) is FunctionType and part.__globals__ is main:
                names = global_names(part)
                (classes if is_of_class else functions).update(names)
                self.is_complete &= all(name in main or hasattr(builtins, name) for name in names)
                parts += [main[name] for name in names if name in main]
            for inner in parts:
                step = inner, is_of_class or is_of(inner, type)
                if is_of(inner, _WITH_CODE) and (id(inner), step[1]) not in seen:
                    seen.add((id(inner), step[1]))
                    found.append(step)
        self.by_functions = functions
        self.by_classes = classes


# Types of objects that contain functions.
_WITH_CODE = (FunctionType, type, staticmethod, classmethod, property, *DECORATED)


def _parts_with_code(thing: Any) -> Iterator[Any]:
    """Yield the parts of a function, class or decorated function of ``__main__`` that may contain functions."""
    if is_of(thing, FunctionType):
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
    elif is_of(thing, type):
        if thing.__module__ == "__main__":
            yield from (*thing.__bases__, *vars(thing).values())
    elif is_of(thing, property):
        yield from (thing.fget, thing.fset, thing.fdel)
    else:
        yield from (getattr(thing, name, None) for name in ("__wrapped__", "func", "__func__"))


def is_unchanged(thing: Any, importable: ImportableNames) -> bool:
    """Return whether a function or class that is sent by name means the same there as it does here.

    A global that was rebound since the fork (a notebook's cell was run again, a parameter was set) has another value in
    the child. The functions of ``__main__`` that a function calls are checked as well. A value that was changed in
    place is not noticed.

    A class has changed only if its methods use a function or class that was rebound. Sending a class makes another
    class in the receiver, without what an initializer has set there, so a rebound value is not reason enough.
    """
    if not isinstance(importable, _AtFork) or importable.pid != os.getpid():
        return True  # the old values are unknown; a child's own code may have set the names
    main = vars(sys.modules["__main__"])
    used = importable.used.get(id(thing))
    is_new = used is None
    if used is None:
        used = _UsedNames(thing, main)
    for name in used.by_functions:
        if name in main and _was_bound_anew(name, main[name], importable):
            return False
    for name in used.by_classes:
        if (
            name in main
            and is_of(main[name], named_kinds)
            and is_of(importable.names.get(name, main[name]), named_kinds)
            and _was_bound_anew(name, main[name], importable)
        ):
            return False
    if is_new and used.is_complete and id(thing) in importable:
        importable.used[id(thing)] = used
    return True


def changed_globals(importable: ImportableNames) -> Callable[[str, Any], bool]:
    """Return a function that returns whether a global name of ``__main__`` was rebound since the fork."""
    if not isinstance(importable, _AtFork):
        return lambda *_: True

    def is_changed(name: str, value: Any) -> bool:
        if _was_bound_anew(name, value, importable):
            return True
        return is_of(value, named_kinds) and value.__module__ == "__main__" and not is_unchanged(value, importable)

    return is_changed


def left_to_receiver(names: dict[str, Any], importable: ImportableNames) -> list[str]:
    """Return which globals of ``__main__`` a function that is sent by value finds in the receiver.

    These are numbers, texts and None that were not rebound since the fork: an initializer may have set the receiver's.
    """
    if not isinstance(importable, _AtFork) or not importable.is_of_children or importable.pid != os.getpid():
        return []
    then = importable.names
    return [
        name
        for name, value in names.items()
        if name in then and is_of(value, _ATOMS) and _is_same(then[name], value) and not name.startswith("__")
    ]


class GlobalsOfMain:
    """The globals of a function: some are sent, others are those of the receiver's ``__main__``."""

    __slots__ = ("names", "sent")

    def __init__(self, sent: dict[str, Any], names: list[str]) -> None:
        self.sent = sent
        self.names = names

    def __reduce__(self) -> Any:
        return globals_of_main, (self.sent, self.names)


def globals_of_main(sent: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the globals that arrived, together with this process's globals of these names."""
    main = vars(sys.modules["__main__"])
    return {**{name: main[name] for name in names if name in main}, **sent}
