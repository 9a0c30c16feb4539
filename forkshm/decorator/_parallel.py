"""@parallel: turn a function into one that can also be mapped over workers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
from typing import TYPE_CHECKING, Any, TypeVar, overload

from forkshm.decorator._function import ParallelFunction
from forkshm.decorator._settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import ParamSpec

    P = ParamSpec("P")

__all__ = ("parallel",)

R = TypeVar("R")
S = TypeVar("S")

_counter = itertools.count()


@overload
def parallel(function: Callable[P, R], /, **options: Any) -> ParallelFunction[P, R]: ...


@overload
def parallel(
    *,
    workers: int | None = None,
    start_method: str | None = None,
    chunksize: int | None = None,
    progress: bool | str = False,
    task_timeout: float | None = None,
    retries: int | None = None,
    initializer: Callable[[], object] | None = None,
    worker_init: Callable[[], S] | None = None,
    worker_exit: Callable[[S], object] | None = None,
    cpu_ids: Sequence[int | Sequence[int]] | None = None,
    ordered: bool = True,
    out: Any = None,
    on_error: str = "raise",
    nested: bool = False,
    cluster: Any = None,
) -> Callable[[Callable[P, R]], ParallelFunction[P, R]]: ...


def parallel(function: Any = None, /, **options: Any) -> Any:  # noqa: D417 - they are the keywords above
    """Return the function with methods that map it over worker processes; use as a decorator, bare or with options.

    A plain call of the decorated function runs in this process, unchanged. The methods ``map``, ``starmap``, ``imap``,
    ``imap_unordered``, ``submit`` and ``amap`` use workers; see `ParallelFunction`. Methods can be decorated, too:
    their object is sent once for each map. Variables that a function closes over are copied once for all workers.

    Args:
        function: The function, if this is called with it: as a decorator without options, or
            ``parallel(function, workers=2)``.
        workers: Number of workers; by default the number of cores that this process may use.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; by default the current start method.
        chunksize: Number of items in one task. By default each worker gets about four tasks; in ``imap``, and if
            *on_error* is not ``"raise"``, a task has one item.
        progress: Show a progress bar: True or ``"tqdm"``, or ``"rich"``.
        task_timeout: Time limit for an item, in seconds; see `Pool`.
        retries: How often a task is repeated after its worker died; see `Pool`.
        initializer: Called in each worker before its first task.
        worker_init: Called once in each process that reads ``function.state``, which is its return value: for example
            a connection, a model or a cache.
        worker_exit: Called with the value that *worker_init* returned when its process ends normally; see `Pool`.
        cpu_ids: Cores that workers may use; see `Pool`.
        ordered: If false, return results in the order in which they arrive.
        out: An array in shared memory that ``map`` and ``starmap`` fill; see `ParallelFunction.map`.
        on_error: ``"raise"`` raises the first exception, ``"return"`` returns exceptions in place of results, and
            ``"skip"`` omits failed items.
        nested: If true, use workers even inside a worker; otherwise a map runs in place there.
        cluster: A Dask cluster, as for `forkshm.Executor`. The workers run on its nodes, *workers* on each node.

    Raises:
        TypeError: The decorated object is not a function, or is a coroutine function.
        ValueError: An option has an invalid value.

    Fork and threads:
        See `ParallelFunction`.

    Example:
        >>> import forkshm
        >>> @forkshm.parallel(workers=2)
        ... def square(x):
        ...     return x * x
        >>> square(3), square.map(range(5)), square.submit(7).result()
        (9, [0, 1, 4, 9, 16], 49)
        >>> square.close()

    See Also:
        ``Parallel`` and ``delayed`` of joblib.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    if (unknown := next((name for name in options if name not in known), None)) is not None:
        raise TypeError(f"@parallel has no option {unknown!r}. The options are {', '.join(known)}.")
    settings = Settings(**options)
    settings.check()
    if function is None:
        return functools.partial(_decorate, settings=settings)
    return _decorate(function, settings=settings)


def _decorate(function: Any, *, settings: Settings) -> Any:
    plain = getattr(function, "__func__", function)  # of a classmethod or staticmethod
    if not callable(plain) or not hasattr(function, "__get__"):
        raise TypeError(
            f"@parallel can decorate only functions and methods, got {function!r}. Options have names, as in "
            "@parallel(workers=4)."
        )
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(
            f"cannot decorate the coroutine function {function!r}: a worker cannot await it. Decorate a plain function."
        )
    return ParallelFunction(function, settings, f"{os.getpid()}-{next(_counter)}")
