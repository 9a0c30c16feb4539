"""What a process that is started anew does first of all: before it imports ``__main__``.

``multiprocess`` sends such a process a dict with its name, its ``sys.path`` and so on, and then its process object.
``__main__`` is imported in between. So whatever must come before that travels in the dict: a `Name` is a string that
unpickles its passengers on the way.
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
    """An environment variable, which is set where this is unpickled."""

    def __init__(self, name: str, value: str) -> None:
        self._pair = name, value

    def __reduce__(self) -> Any:
        # By a function of C: forkshm need not be importable yet.
        return os.putenv, self._pair


class Name(str):
    """The name of a process, with what the process does before it imports ``__main__``.

    Args:
        name: The name; it arrives as a plain string.
        environment: Variables that C libraries will find. ``os.environ`` of the process is not changed.
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
    """Return what tools that patched ``multiprocessing.spawn`` add to the same dict of the standard library.

    Tools that follow processes, such as ``coverage``, patch the standard library's functions, which forkshm does not
    call. An object that such a tool adds does its work where it is unpickled.
    """
    spawn = sys.modules.get("multiprocessing.spawn")
    if spawn is None or spawn.get_preparation_data.__code__.co_filename == spawn.prepare.__code__.co_filename:
        return []
    try:
        data = spawn.get_preparation_data(name)
    except RuntimeError:  # a process is starting that the standard library would not let start another
        return []
    return [value for key, value in data.items() if key not in _PLAIN]


# What the standard library itself has in that dict.
_PLAIN = frozenset(
    {"log_to_stderr", "authkey", "log_level", "name", "sys_path", "sys_argv", "orig_dir", "dir", "start_method"}
    | {"init_main_from_name", "init_main_from_path"}
)
