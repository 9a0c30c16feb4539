"""Support for tools, such as ``coverage``, that patch ``multiprocessing.process.BaseProcess._bootstrap``.

forkshm's processes derive from ``multiprocess``, whose ``_bootstrap`` is a different function. So a patched one is
called around forkshm's, for a process object of the standard library that only calls forkshm's.
"""

from __future__ import annotations

import multiprocessing.process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("is_followed", "run_with_tools")

_theirs: Any = multiprocessing.process


class _Stage(_theirs.BaseProcess):  # type: ignore[misc]  # a class, which the type checker cannot see
    """A process object whose `run` starts forkshm's; it omits everything else that the standard library does."""

    def __init__(self, begin: Callable[[], int], actor: Any) -> None:
        # Without the counters from which the base class takes name and identity.
        self.__dict__.update(vars(actor))
        self._config = dict(_theirs._current_process._config)
        self._begin = begin
        self._start_method = None
        self.exit_code = 1

    def run(self) -> None:
        self.exit_code = self._begin()

    @staticmethod
    def _after_fork() -> None:
        """Do nothing: forkshm does the work when it introduces the process."""


def is_followed() -> bool:
    """Return whether a tool has patched the function that the standard library calls in a new process."""
    code = getattr(_theirs.BaseProcess._bootstrap, "__code__", None)
    return code is None or code.co_filename != _theirs.BaseProcess.start.__code__.co_filename


def run_with_tools(begin: Callable[[], int], actor: Any) -> int:
    """Call *begin* inside the wrappers that tools have put around the standard library's ``_bootstrap``.

    Args:
        begin: Runs the process *actor* and returns its exit code.
        actor: The process object.

    Returns:
        The exit code of the process.
    """
    if not is_followed():
        return begin()
    stage = _Stage(begin, actor)
    outer = _theirs.BaseProcess._bootstrap(stage, parent_sentinel=None)
    # A failure of the tool shows in its exit code, and in its output.
    return stage.exit_code or int(outer or 0)
