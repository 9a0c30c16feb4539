"""Tools that follow processes by patching ``multiprocessing.process.BaseProcess._bootstrap``, ``coverage`` for example.

Our processes are those of ``multiprocess``, whose ``_bootstrap`` is another function. So a patched one is called around
ours, for a process object of the standard library that does nothing of its own but call ours.
"""

from __future__ import annotations

import multiprocessing.process
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("is_followed", "run_with_tools")

_theirs: Any = multiprocessing.process


class _Stage(_theirs.BaseProcess):  # type: ignore[misc]  # a class, which the type checker cannot see
    """A process object whose `run` starts ours; what the standard library does around it is left out."""

    def __init__(self, begin: Callable[[], int], actor: Any) -> None:
        # Without the counters that the base class takes its name and identity from.
        self.__dict__.update(vars(actor))
        self._config = dict(_theirs._current_process._config)
        self._begin = begin
        self._start_method = None
        self.exit_code = 1

    def run(self) -> None:
        self.exit_code = self._begin()

    @staticmethod
    def _after_fork() -> None:
        """Forkshm does what is to be done, when it introduces the process."""


def is_followed() -> bool:
    """Return whether a tool has patched what the standard library calls in a new process."""
    code = getattr(_theirs.BaseProcess._bootstrap, "__code__", None)
    return code is None or code.co_filename != _theirs.BaseProcess.start.__code__.co_filename


def run_with_tools(begin: Callable[[], int], actor: Any) -> int:
    """Call *begin* inside what tools have put around the standard library's ``_bootstrap``; return its result.

    Args:
        begin: Runs the process *actor* and returns its exit code.
        actor: The process object.
    """
    if not is_followed():
        return begin()
    stage = _Stage(begin, actor)
    if getattr(actor, "ignores_interrupts", False):
        # A handler that the parent installed is not a worker's. One that the tool installs here is.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    outer = _theirs.BaseProcess._bootstrap(stage, parent_sentinel=None)
    # What went wrong in the tool shows in its exit code, and in what it printed.
    return stage.exit_code or int(outer or 0)
