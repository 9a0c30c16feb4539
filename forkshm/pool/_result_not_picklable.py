"""The error of a result that cannot be pickled, derived from that of ``multiprocessing``.

It has a module of its own because the base classes take milliseconds to import, and most programs never need it.
"""

from __future__ import annotations

import multiprocessing.pool

from forkshm.errors import NotPicklableError, safe_repr

__all__ = ("ResultNotPicklableError",)


class ResultNotPicklableError(NotPicklableError, multiprocessing.pool.MaybeEncodingError):  # type: ignore[name-defined, misc]  # not in its stubs
    """The result of a task cannot be pickled; available as ``forkshm.ResultNotPicklableError``.

    Attributes:
        exc: The exception of the pickler, as text.
        value: The type of the result, as text.
    """

    def __init__(self, kind: str, error: Exception) -> None:
        self.exc = safe_repr(error)
        try:
            reason = str(error)
        except Exception:
            reason = self.exc
        if kind == "coroutine":
            reason += ". A worker calls a function and does not await it: call asyncio.run(...) in the function."
        Exception.__init__(self, f"the result of a task, a {kind}, cannot be sent: {reason}")
        self.value = kind

    def __str__(self) -> str:
        return str(self.args[0])


# The public path, see `forkshm.__getattr__`; pickle looks it up there, too.
ResultNotPicklableError.__module__ = "forkshm"
