"""Layer 6. get_context(): the door shaped like multiprocessing."""

from __future__ import annotations

import multiprocessing.context
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.errors import UnsupportedError
from forkshm.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ("ForkContext", "Process", "get_context")

#: A process, as ``multiprocessing.Process``; on Linux it is forked.
Process = _multiprocess.context.ForkProcess


class ForkContext(_multiprocess.context.ForkContext, multiprocessing.context.BaseContext):
    """The context whose processes are forked, and whose pools are forkshm's.

    It is an instance of the base class of ``multiprocess`` and of that of
    ``multiprocessing``, so libraries that check accept it.
    """

    Process = Process

    def Pool(  # type: ignore[override]  # noqa: N802 - the standard library's name
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        *,
        born_shared: bool = False,
    ) -> Pool:
        """Return a `forkshm.Pool` whose workers this context starts."""
        return Pool(processes, initializer, initargs, maxtasksperchild, context=self, born_shared=born_shared)


_fork = ForkContext()


def get_context(method: str | None = None) -> ForkContext:
    """Return the context of a start method.

    Args:
        method: ``"fork"``, or None for the default, which on Linux is fork on every
            version of Python.

    Raises:
        UnsupportedError: The method is spawn or forkserver, which forkshm has not yet.
        ValueError: There is no such method.
    """
    if method in (None, "fork"):
        return _fork
    if method in ("spawn", "forkserver"):
        raise UnsupportedError(f"forkshm has no start method {method!r} yet: use 'fork'", capability=method)
    raise ValueError(f"cannot find context for {method!r}: the start method of forkshm is 'fork'")
