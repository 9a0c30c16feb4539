"""Modules that the fork server imports before it forks, and the handling of modules that cannot be imported.

``multiprocess`` passes the names to the fork server as the source text of a list, and ignores names that cannot be
imported. A `Named` list has a different source text. It creates a `Checked` list in the fork server, which imports each
name when the iteration reaches it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, TypeAlias

from forkshm import _multiprocess

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ("Checked", "Named", "OnError", "set_forkserver_preload")

OnError: TypeAlias = Literal["ignore", "warn", "fail"]
"""Treatment of a name that cannot be imported."""


class Named(list[str]):
    """The names in the process that starts the fork server."""

    def __init__(self, names: Iterable[str], on_error: OnError) -> None:
        super().__init__(names)
        self._on_error = on_error

    def __repr__(self) -> str:
        checked = f"__import__({__name__!r}, fromlist=['Checked']).Checked"
        return f"{checked}({list(self)!r}, {self._on_error!r})"


class Checked(list[str]):
    """The names in the fork server; each is imported when the iteration reaches it."""

    def __init__(self, names: Iterable[str], on_error: OnError) -> None:
        super().__init__(names)
        self._on_error = on_error

    def __iter__(self) -> Iterator[str]:
        for name in super().__iter__():
            try:
                __import__(name)
            except ImportError as error:
                if self._on_error == "fail":
                    raise
                warnings.warn(f"the fork server cannot import {name!r}: {error}", ImportWarning, stacklevel=2)
                continue
            yield name


def set_forkserver_preload(module_names: Iterable[str], *, on_error: OnError = "ignore") -> None:
    """Set the modules that the fork server imports before it forks, as ``multiprocessing`` of Python 3.15 does.

    Args:
        module_names: Names of modules.
        on_error: What to do if a module cannot be imported. "ignore" skips it, "warn" emits an ImportWarning, and
            "fail" ends the fork server, so that starting a process raises.

    Raises:
        ValueError: *on_error* is not one of these.
        TypeError: A name is not a string.
    """
    if on_error not in ("ignore", "warn", "fail"):
        raise ValueError(f"on_error must be 'ignore', 'warn' or 'fail', got {on_error!r}")
    names = list(module_names)
    _multiprocess.fork_server().set_forkserver_preload(names if on_error == "ignore" else Named(names, on_error))
