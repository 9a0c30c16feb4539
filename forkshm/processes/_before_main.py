"""The first actions of a process that is not forked, before it imports ``__main__``.

``multiprocess`` sends such a process a dict with its name, its ``sys.path`` and so on, and then its process object.
``__main__`` is imported in between. So actions that must come before travel in the dict: a `Name` is a string that
also carries objects, which act when they are unpickled.
"""

from __future__ import annotations

import operator
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("Name",)


class _Variable:
    """An environment variable, which is set when this object is unpickled."""

    def __init__(self, name: str, value: str) -> None:
        self._pair = name, value

    def __reduce__(self) -> Any:
        # A C function, because forkshm need not be importable yet.
        return os.putenv, self._pair


class Name(str):
    """The name of a process, with actions that the process takes before it imports ``__main__``.

    Args:
        name: The name; it arrives as a plain string.
        environment: Variables for C libraries. ``os.environ`` of the process is not changed.
    """

    __slots__ = ("_environment",)
    _environment: Mapping[str, str]

    def __new__(cls, name: str, environment: Mapping[str, str]) -> Name:  # noqa: PYI034 - no subclasses
        """Make it."""
        made = super().__new__(cls, name)
        made._environment = environment
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        passengers = [_Variable(*pair) for pair in self._environment.items()]
        return operator.getitem, ([str(self), *passengers, *_passengers_of_tools(str(self))], 0)


def _passengers_of_tools(name: str) -> list[Any]:
    """Return the objects that tools patching ``multiprocessing.spawn`` add to the same dict of the standard library.

    Tools that follow processes, such as ``coverage``, patch functions of the standard library that forkshm does not
    call. An object that such a tool adds acts when it is unpickled.
    """
    spawn = sys.modules.get("multiprocessing.spawn")
    if spawn is None or spawn.get_preparation_data.__code__.co_filename == spawn.prepare.__code__.co_filename:
        return []
    try:
        data = spawn.get_preparation_data(name)
    except RuntimeError:  # this process is itself starting, and the standard library refuses to start another
        return []
    return [value for key, value in data.items() if key not in _PLAIN]


# Keys that the standard library itself has in that dict.
_PLAIN = frozenset(
    {"log_to_stderr", "authkey", "log_level", "name", "sys_path", "sys_argv", "orig_dir", "dir", "start_method"}
    | {"init_main_from_name", "init_main_from_path"}
)
