"""The engine interface of pandas: run the functions of ``engine=`` calls in the workers of a pool."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from forkshm.errors import MissingDependencyError
from forkshm.pool import Pool

try:
    import numpy as np
    import pandas as pd
except ModuleNotFoundError as error:
    if error.name not in ("numpy", "pandas"):
        raise
    raise MissingDependencyError(
        "forkshm.pandas needs pandas: pip install 'forkshm[pandas]'", extra="pandas"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = ("Engine",)

# Parts for each worker: enough that one part with slow rows does not keep the other workers waiting for long.
_PARTS = 4


class Engine:
    """Run the functions of pandas' ``apply`` and ``map`` in the workers of a pool.

    Pass it as ``engine=`` to ``DataFrame.apply`` or ``Series.map`` of pandas 3. The rows or columns are divided among
    the workers. Each worker calls pandas' own ``apply`` or ``map`` for its part, so functions get the same arguments as
    without an engine. The parts are joined as pandas joins its own.

    Use it as a context manager, or end the pool with `close`. A pool passed as *workers* stays open.

    Args:
        workers: Number of workers, by default the number of cores this process may use; or a `Pool` to use.
        progress: Show a bar: True or ``"tqdm"``, or ``"rich"``. It counts parts.
        options: Options of `Pool`.

    Raises:
        MissingDependencyError: pandas is not installed.
        TypeError: *options* are given together with a pool.

    Fork and threads:
        As for `Pool`: any thread may use it, a forked child may not.

    Example:
        >>> import pandas as pd
        >>> from forkshm.pandas import Engine
        >>> frame = pd.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]})
        >>> with Engine(2) as engine:
        ...     frame.apply(lambda row: int(row.prod()), axis=1, engine=engine).tolist()
        [4, 10, 18]

    See Also:
        ``pandas.DataFrame.apply``, ``pandas.api.executors.BaseExecutionEngine``.
    """

    def __init__(self, workers: int | Pool | None = None, *, progress: bool | str = False, **options: Any) -> None:
        self._owns_pool = not isinstance(workers, Pool)
        if not isinstance(workers, Pool):
            workers = Pool(workers, **options)
        elif options:
            raise TypeError(f"an Engine of a pool takes no options, got {', '.join(options)}: pass them to Pool")
        self.pool = workers
        self._progress = progress

    def __repr__(self) -> str:
        return f"<forkshm.pandas.Engine of {self.pool!r}>"

    @property
    def __pandas_udf__(self) -> Self:
        # pandas asks the engine for the object that has `apply` and `map`.
        return self

    def apply(
        self,
        data: Any,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        decorator: Any,
        axis: int | str,
    ) -> Any:
        """Return what ``data.apply`` returns; called by pandas.

        Args:
            data: A frame, or an array if the caller passed ``raw=True``.
            func: The function to call.
            args: Its arguments after the row or column.
            kwargs: Its keyword arguments.
            decorator: This engine.
            axis: 1 or ``"columns"`` for rows, any other value for columns.

        Raises:
            TypeError: *func* is not a function, so pandas would need all rows at once.
            WorkerDiedError: A worker died.
            BaseException: *func* raised it.
        """
        if not callable(func):
            raise TypeError(f"an engine can only call functions, got {func!r}: omit engine= for names, lists and dicts")
        by_row = axis in (1, "columns")
        raw = isinstance(data, np.ndarray)
        call = functools.partial(_apply_raw if raw else _apply, func=func, args=args, kwargs=kwargs, by_row=by_row)
        results = self._run(call, data, 0 if by_row else 1)
        if raw:
            # pandas turns an array into a frame or series.
            return np.concatenate(results, axis=0 if by_row or results[0].ndim == 1 else 1)
        if isinstance(results[0], pd.Series):
            return pd.concat(results)
        return pd.concat(results, axis=0 if by_row else 1)

    def map(
        self,
        data: Any,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        decorator: Any,
        skip_na: bool,
    ) -> Any:
        """Return what ``data.map`` returns; called by pandas. See `apply`."""
        call = functools.partial(_map, func=func, args=args, kwargs=kwargs, na_action="ignore" if skip_na else None)
        if not len(data):
            return call(data)
        results = self._run(call, data, 0)
        return np.concatenate(results) if isinstance(data, np.ndarray) else pd.concat(results)

    def groupby_apply(self, groups: Any, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``groups.apply(func, *args, **kwargs)`` with the groups divided among the workers.

        pandas accepts no engine for this operation.

        Args:
            groups: The result of ``DataFrame.groupby`` or ``Series.groupby``, by one key or several.
            func: Called with each group, which has all columns except the keys, as pandas passes it.
            args: Its further arguments.
            kwargs: Its keyword arguments.

        Returns:
            What ``groups.apply`` returns.

        Example:
            >>> import pandas as pd
            >>> from forkshm.pandas import Engine
            >>> frame = pd.DataFrame({"k": ["x", "y", "x"], "v": [1, 2, 3]})
            >>> with Engine(2) as engine:
            ...     sums = engine.groupby_apply(frame.groupby("k"), lambda group: int(group["v"].sum()))
            >>> sums.to_dict()
            {'x': 4, 'y': 2}
        """
        # pandas passes the groups to the first function, and puts the results of the second one together.
        parts: list[tuple[Any, Any]] = []
        groups.apply(lambda group: parts.append((group, group.name)))
        call = functools.partial(_call, func=func, args=args, kwargs=kwargs)
        results = iter(self.pool.map(call, parts, progress=self._progress) if parts else ())
        return groups.apply(lambda _: next(results)) if parts else groups.apply(func, *args, **kwargs)

    def close(self) -> None:
        """End the workers, unless the pool was passed in. Closing twice is allowed."""
        if self._owns_pool:
            self.pool.close()
            self.pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._owns_pool:
            self.pool.terminate()
        self.close()

    def _run(self, call: Callable[[Any], Any], data: Any, axis: int) -> list[Any]:
        count = data.shape[axis]
        size = max(1, math.ceil(count / (_PARTS * self.pool.size)))
        parts = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            where = part if axis == 0 else (slice(None), part)
            parts.append(data[where] if isinstance(data, np.ndarray) else data.iloc[where])
        return self.pool.map(call, parts, chunksize=1, progress=self._progress)


def _apply(part: Any, *, func: Any, args: Any, kwargs: Any, by_row: bool) -> Any:
    return part.apply(func, axis=1 if by_row else 0, args=args, **kwargs)


def _apply_raw(part: Any, *, func: Any, args: Any, kwargs: Any, by_row: bool) -> Any:
    return np.apply_along_axis(func, 1 if by_row else 0, part, *args, **kwargs)


def _map(part: Any, *, func: Any, args: Any, kwargs: Any, na_action: Any) -> Any:
    call = functools.partial(func, *args, **kwargs) if args or kwargs else func
    if isinstance(part, np.ndarray):
        return pd.Series(part).map(call, na_action=na_action).to_numpy()
    return part.map(call, na_action=na_action)


def _call(part: tuple[Any, Any], *, func: Any, args: Any, kwargs: Any) -> Any:
    group, key = part
    # As pandas does, which is how a function learns the key of its group.
    object.__setattr__(group, "name", key)
    return func(group, *args, **kwargs)
