"""patch(): make code that imports ``multiprocessing`` use forkshm."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing.context
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm import _interrupts, _multiprocess, _system, processes
from forkshm.context import default_context
from forkshm.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("patch", "patched", "unpatch")

# Names of multiprocessing that are kept, because they work for forkshm's processes, too.
_STAY = frozenset({"current_process", "parent_process", "reducer"})

# Packages whose modules may keep the original names: multiprocessing's own, and the standard library.
_NOT_ASKED = frozenset({"forkshm", "multiprocess", "multiprocessing", *sys.stdlib_module_names} - {"__main__"})

# Modules that bound ``get_context`` of the package when they were imported.
_ASK_FOR_CONTEXT = ("managers", "pool", "sharedctypes")


class _Change(NamedTuple):
    """One name of a module or class, or of ``sys.modules``."""

    owner: Any
    name: str
    theirs: Any
    ours: Any

    def make(self) -> None:
        self._set(self.ours)

    def take_back(self) -> None:
        names = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        if names.get(self.name) is self.ours:  # otherwise other code has replaced it since
            self._set(self.theirs)

    def _set(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


_lock = _interrupts.RLock()
_changes: list[_Change] = []
_depth = 0


def patch() -> tuple[str, ...]:
    """Make code that imports ``multiprocessing`` use forkshm, until `unpatch`.

    Code that imports ``multiprocess`` uses forkshm as well: for example Hugging Face's datasets, pathos and SALib. Call
    `patch` before such libraries are imported, because many of them import ``Pool`` by name.

    The functions and classes of the packages themselves are replaced (``Pool``, ``Process``, ``Queue``,
    ``get_context``, ``set_start_method`` and so on), and so is ``multiprocessing.pool.Pool``. Every later lookup finds
    the replacement, even in modules imported earlier: ``multiprocessing.Pool()``,
    ``from multiprocessing import Pool``, ``multiprocessing.pool.Pool()``.

    These remain the standard library's:

    * Names bound earlier, by ``from multiprocessing import Pool`` or in a class derived from
      ``multiprocessing.Process``. In the same way, names bound while patched remain forkshm's after `unpatch`.
    * Exceptions, which also catch forkshm's exceptions.
    * ``ThreadPool``, and classes of other modules such as ``multiprocessing.queues.Queue``. Objects of forkshm are not
      instances of these.
    * Existing contexts, pools and queues, and the objects they create.

    The start method is forkshm's. Calls nest: each `patch` needs its own `unpatch`.

    Returns:
        Names that could not be replaced, because modules had bound them earlier, such as ``"library.module.Pool"``.
        Import these modules after `patch`.

    Raises:
        ImportError: This Python has no working ``multiprocessing``.

    Fork and threads:
        It affects all threads of this process, and its children with any start method. A spawned child patches itself
        after it has imported the main module and before it unpickles its target and arguments.

    Example:
        >>> import multiprocessing, forkshm
        >>> unreached = forkshm.patch()
        >>> with multiprocessing.Pool(2) as pool:
        ...     print(type(pool).__module__, pool.map(lambda x: x + 1, [1, 2]))
        forkshm.pool [2, 3]
        >>> forkshm.unpatch()

    See Also:
        `patched`, for a block of code.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for package in (multiprocessing, _multiprocess.package()):
                _changes.extend(_find_changes(package))
            for change in _changes:
                change.make()
            processes.first_calls.append(patch)
        _depth += 1
        return tuple(_names_taken_before(_changes))


def unpatch() -> None:
    """Undo one `patch`; undoing the last restores the standard library's ``multiprocessing``.

    A name that other code has replaced in the meantime is left alone.

    Raises:
        RuntimeError: There is no `patch` to undo.

    Fork and threads:
        As for `patch`. In a child it affects only that child.

    See Also:
        `patched`.
    """
    global _depth
    with _lock:
        if _depth == 0:
            raise RuntimeError("cannot unpatch multiprocessing: it is not patched. Call unpatch() once per patch().")
        _depth -= 1
        if _depth == 0:
            for change in _changes:
                change.take_back()
            _changes.clear()
            processes.first_calls.remove(patch)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Return a context manager that calls `patch` at the start of the block and `unpatch` at its end.

    Fork and threads:
        As for `patch`, it affects other threads as well. Blocks of several threads may overlap.

    Example:
        >>> import multiprocessing, forkshm
        >>> with forkshm.patched():
        ...     isinstance(multiprocessing.Queue(), forkshm.Queue)
        True
        >>> isinstance(multiprocessing.Queue(), forkshm.Queue)
        False

    See Also:
        `patch`, which lists what is replaced.
    """
    patch()
    try:
        yield
    finally:
        unpatch()


def _get_context(method: str | None = None) -> Any:
    if method is None or method in default_context.get_all_start_methods():
        return default_context.get_context(method)
    # Other libraries, such as loky, add contexts to the standard library's.
    return multiprocessing.context._default_context.get_context(method)


def _find_changes(package: Any) -> Iterator[_Change]:
    name_of_package = package.__name__
    for name in package.__all__:
        theirs = getattr(package, name)
        if name not in _STAY and not (isinstance(theirs, type) and issubclass(theirs, Exception)):
            ours = _get_context if name == "get_context" else getattr(default_context, name, None)
            if ours is not None:
                yield _Change(package, name, theirs, ours)
    for name in _ASK_FOR_CONTEXT:
        module = importlib.import_module(f"{name_of_package}.{name}")
        yield _Change(module, "get_context", module.get_context, _get_context)

    # ``Pool`` in its own module is kept, because other code there, such as ThreadPool, finds it by that name. Instead,
    # importers get another module, which differs only in this name.
    module_name = f"{name_of_package}.pool"
    theirs = importlib.import_module(module_name)
    pools: Any = types.ModuleType(module_name, theirs.__doc__)
    vars(pools).update(vars(theirs))
    pools.Pool = Pool
    yield _Change(package, "pool", theirs, pools)
    yield _Change(sys.modules, module_name, theirs, pools)

    # The package's own contexts look up the module.
    def pool_of_context(
        self: Any, processes: Any = None, initializer: Any = None, initargs: Any = (), maxtasksperchild: Any = None
    ) -> Any:
        return theirs.Pool(processes, initializer, initargs, maxtasksperchild, context=self.get_context())

    base = importlib.import_module(f"{name_of_package}.context").BaseContext
    yield _Change(base, "Pool", base.Pool, pool_of_context)


def _names_taken_before(changes: list[_Change]) -> Iterator[str]:
    """Yield the names in other modules that are bound to replaced objects, because they were imported before."""
    # By id, because some objects cannot be compared or hashed.
    theirs = {id(change.theirs): change for change in changes if change.owner is not sys.modules}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] in _NOT_ASKED or not isinstance(module, types.ModuleType):
            continue
        for name, value in list(vars(module).items()):
            change = theirs.get(id(value))
            if change is not None and change.name != "pool" and not name.startswith("__"):
                yield f"{module_name}.{name}"


def _in_child() -> None:
    # The thread that may have held the lock does not exist here.
    global _lock
    _lock = _interrupts.RLock()


_system.register_at_fork(after_in_child=_in_child)
