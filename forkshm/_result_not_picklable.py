"""The error of a result that cannot be pickled, as ``multiprocessing``'s.

In a module of its own because the class' bases take milliseconds to import, and most programs
never meet it.
"""

from __future__ import annotations

import multiprocessing.pool

from forkshm.errors import NotPicklableError, safe_repr

__all__ = ("ResultNotPicklableError",)


class ResultNotPicklableError(NotPicklableError, multiprocessing.pool.MaybeEncodingError):  # type: ignore[name-defined, misc]  # not in its stubs
    """What a task returned cannot be sent; found as ``forkshm.ResultNotPicklableError``.

    Attributes:
        exc: What pickling it raised, as text.
        value: What it was, as text.
    """

    def __init__(self, kind: str, error: Exception) -> None:
        self.exc = safe_repr(error)
        try:
            reason = str(error)
        except Exception:
            reason = self.exc
        Exception.__init__(self, f"the result of a task, a {kind}, cannot be sent: {reason}")
        self.value = kind

    def __str__(self) -> str:
        return str(self.args[0])


# Where users find it, see `forkshm.__getattr__`; pickle looks for it there, too.
ResultNotPicklableError.__module__ = "forkshm"
