"""The engine interface of pandas: run the functions of ``engine=`` calls in the workers of a pool."""

from __future__ import annotations

import functools
import itertools
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


class _Interface:
    """Returns the engine; of the class, an object that says what to do."""

    def __get__(self, engine: Any, kind: type) -> Any:
        return self if engine is None else engine

    def apply(self, **options: Any) -> Any:
        raise TypeError("the engine is a class: pass an object, with engine=forkshm.pandas.Engine(2), for example")

    map = apply


class Engine:
    """Run the functions of pandas' ``apply`` and ``map`` in the workers of a pool.

    Pass it as ``engine=`` to ``DataFrame.apply`` or ``Series.map`` of pandas 3. The rows or columns are divided among
    the workers, and pandas' own ``apply`` or ``map`` makes the arguments of the function and joins its results. So
    arguments, types and indexes are the same as without an engine.

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

    # pandas asks the engine for the object that has `apply` and `map`.
    __pandas_udf__ = _Interface()

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
        options: dict[str, Any] = {"func": func, "args": args, "kwargs": kwargs, "by_row": by_row}
        if isinstance(data, np.ndarray):
            results = self._run(functools.partial(_apply_raw, **options), data, 0 if by_row else 1)
            # pandas turns an array into a frame or series.
            return np.concatenate(results, axis=0 if by_row or results[0].ndim == 1 else 1)
        results = self._run(functools.partial(_apply, **options), data, 0 if by_row else 1)
        if all(isinstance(part, pd.DataFrame) for part in results):
            return _join_rows(results) if by_row else pd.concat(results, axis=1)
        values = itertools.chain.from_iterable(_values(part, by_row=by_row) for part in results)
        # One column is enough for pandas to join the results of rows, and faster.
        return (data.iloc[:, :1] if by_row else data).apply(lambda _: next(values), axis=1 if by_row else 0)

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
        series = pd.Series(data) if isinstance(data, np.ndarray) else data
        na_action = "ignore" if skip_na else None
        # pandas passes the values to the first function, for example each category once.
        values: list[Any] = []

        def take(value: Any) -> Any:
            values.append(value)
            return value

        series.map(take, na_action=na_action)
        parts = self._run(functools.partial(_map, func=func, args=args, kwargs=kwargs), values, 0)
        # pandas compares a missing value by identity.
        results = (np.nan if _is_nan(value) else value for value in itertools.chain.from_iterable(parts))
        mapped = series.map(lambda _: next(results), na_action=na_action)
        return mapped.to_numpy() if isinstance(data, np.ndarray) else mapped

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
        count = data.shape[axis] if hasattr(data, "shape") else len(data)
        size = max(1, math.ceil(count / (_PARTS * self.pool.size)))
        data = getattr(data, "iloc", data)
        parts = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            parts.append(data[part if axis == 0 else (slice(None), part)])
        return self.pool.map(call, parts, chunksize=1, progress=self._progress)


def _apply(part: Any, *, func: Any, args: Any, kwargs: Any, by_row: bool) -> Any:
    """Return the results for a part: as a frame if they are series, else as a list."""
    values: list[Any] = []

    def call(row: Any) -> Any:
        value = func(row, *args, **kwargs)
        # pandas passes one object for all rows, which may be the result.
        values.append(value.copy(deep=False) if isinstance(value, pd.Series) else value)
        return value

    joined = part.apply(call, axis=1 if by_row else 0)
    return joined if isinstance(values[0], pd.Series) else values


def _apply_raw(part: Any, *, func: Any, args: Any, kwargs: Any, by_row: bool) -> Any:
    return pd.DataFrame(part).apply(func, axis=1 if by_row else 0, raw=True, args=args, **kwargs).to_numpy()


def _map(part: list[Any], *, func: Any, args: Any, kwargs: Any) -> list[Any]:
    return [func(value, *args, **kwargs) for value in part]


def _is_nan(value: Any) -> bool:
    return type(value) is float and value != value


def _values(part: Any, *, by_row: bool) -> Any:
    """Return the results for a part as a list."""
    if isinstance(part, pd.DataFrame):
        return [series for _, series in (part.T if by_row else part).items()]
    return part


def _join_rows(parts: list[Any]) -> Any:
    """Return parts of a frame as one, with the types that pandas infers from all rows."""
    if len({(*part.columns, *part.dtypes) for part in parts}) == 1:
        return pd.concat(parts)
    # pandas makes a frame of which the rows are the columns.
    return pd.concat([part.T for part in parts], axis=1).T.infer_objects()


def _call(part: tuple[Any, Any], *, func: Any, args: Any, kwargs: Any) -> Any:
    group, key = part
    # As pandas does, which is how a function learns the key of its group.
    object.__setattr__(group, "name", key)
    return func(group, *args, **kwargs)
