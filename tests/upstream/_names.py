"""The module that the upstream tests find under the name ``multiprocessing``: forkshm.

Names that forkshm lacks are those of its default context, or of ``multiprocess``, whose private parts the tests
inspect. Only the tests see this: their module has an ``__import__`` of its own.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import sys
import types

import multiprocess  # noqa: TID251 - what is not ours is its

import forkshm
import forkshm.channel
import forkshm.context
from forkshm._multiprocess import context

# Names that other libraries have in a submodule that forkshm lacks, and their place in forkshm.
_ELSEWHERE = {
    "connection": [forkshm.channel],
    "context": [forkshm.context],
    "managers": ["forkshm.pool.manager"],
    "pool": [forkshm],
    "queues": [forkshm.channel],
}

_UPSTREAM = ("multiprocess", "multiprocessing")


class Namespace(types.ModuleType):
    """A module whose names come from the first of several objects that has them."""

    def __init__(self, name, sources):
        super().__init__(name)
        self.__path__ = []
        self._sources = sources

    def __getattr__(self, name):
        if name == "__all__":
            return multiprocess.__all__
        for source in self._sources:
            try:
                found = getattr(source, name)
            except AttributeError:
                continue
            if not _is_of_regions(found):
                return found
        path = f"{self.__name__}.{name}"
        if self.__name__ == "multiprocess":
            try:
                return submodule(name)
            except ModuleNotFoundError:
                pass
        raise AttributeError(f"neither forkshm nor multiprocess has {path}")


def _is_of_regions(found):
    """Return whether this is a lock in a region, whose constructor differs from that of multiprocessing's lock."""
    module = getattr(found, "__module__", None) or ""
    if not isinstance(found, type) or not module.startswith("forkshm.region"):
        return False
    return "region" in inspect.signature(found).parameters


_submodules = {}


def submodule(name):
    """Return ``forkshm.<name>``, completed by ``multiprocess.<name>``."""
    if name not in _submodules:
        sources = []
        try:
            sources.append(importlib.import_module(f"forkshm.{name}"))
        except ModuleNotFoundError as error:
            if error.name != f"forkshm.{name}":
                raise
        sources += [
            importlib.import_module(where) if isinstance(where, str) else where for where in _ELSEWHERE.get(name, ())
        ]
        try:
            theirs = importlib.import_module(f"multiprocess.{name}")
        except ModuleNotFoundError:
            if not sources:
                raise
            return _submodules.setdefault(name, sources[0])  # a submodule of forkshm only
        _submodules[name] = theirs if not sources else Namespace(f"multiprocess.{name}", [*sources, theirs])
    return _submodules[name]


class _Package(Namespace):
    def __getattr__(self, name):
        # A package of forkshm (pool) lacks some names that the other module has.
        if name in _PARTS:
            return submodule(name)
        if name in _LIKE_A_METHOD:
            found = getattr(forkshm, name, None)
            if found is None or _is_of_regions(found):
                return getattr(forkshm.context.default_context, name)
            return found
        return super().__getattr__(name)


_PARTS = frozenset(
    name.removesuffix(".py")
    for name in importlib.import_module("os").listdir(multiprocess.__path__[0])
    if not name.startswith("_") and (name.endswith(".py") or name == "dummy")
)
_LIKE_A_METHOD = frozenset(name for name in dir(context.BaseContext) if not name.startswith("_"))

package = _Package("multiprocess", [forkshm, multiprocess])


def import_ours(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002 - as it is called
    """``__import__`` for the upstream tests."""
    top, _, rest = name.partition(".")
    if level or top not in _UPSTREAM or rest.startswith("tests"):
        return builtins.__import__(name, globals, locals, fromlist, level)
    if rest and name not in sys.modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            sys.modules[name] = submodule(rest)  # where the tests look it up
    if not fromlist or not rest:
        for part in rest.split(".")[:1] if rest else ():
            submodule(part)
        return package
    return submodule(rest)
