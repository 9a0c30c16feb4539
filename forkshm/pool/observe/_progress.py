"""Progress bars, drawn by tqdm or rich."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from forkshm.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.pool._interfaces import Bar, Driver
    from forkshm.pool._statistics import PoolStatistics

__all__ = ("length_of", "no_bar", "open_bar")


class _NoBar:
    def update(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


no_bar = _NoBar()


def open_bar(kind: bool | str, total: int | None, dispatcher: Driver | None = None) -> Bar:
    """Return a bar that shows the number of finished items, the total, the rate, and the remaining time.

    Args:
        kind: True or ``"tqdm"``, which works in terminals and notebooks, or ``"rich"``; False for none.
        total: The number of items, if it is known.
        dispatcher: The parent's half of a pool, whose copied and shared bytes are shown, too.

    Raises:
        MissingDependencyError: The library is not installed.
        ValueError: There is no such kind.
    """
    if kind is False:
        return no_bar
    if kind not in (True, "tqdm", "rich"):
        raise ValueError(f"progress must be True, False, 'tqdm' or 'rich', got {kind!r}")
    traffic = _traffic_since_now(dispatcher.statistics) if dispatcher is not None else str
    name = "rich" if kind == "rich" else "tqdm"
    try:
        return _RichBar(total, traffic) if kind == "rich" else _TqdmBar(total, traffic)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise MissingDependencyError(
            f"progress={kind!r} needs {name}: pip install 'forkshm[progress]'", extra="progress"
        ) from error


def _traffic_since_now(statistics: Callable[[], PoolStatistics]) -> Callable[[], str]:
    before = statistics()

    def traffic() -> str:
        now = statistics()
        copied, shared = now.bytes_copied - before.bytes_copied, now.bytes_shared - before.bytes_shared
        return f"{copied / 1e6:,.1f} MB copied, {shared / 1e6:,.1f} MB shared"

    return traffic


class _TqdmBar:
    def __init__(self, total: int | None, traffic: Callable[[], str]) -> None:
        from tqdm.auto import tqdm

        self._bar: Any = tqdm(total=total)
        self._traffic = traffic

    def update(self, count: int) -> None:
        # True if the bar was drawn. Only then are the numbers beside it computed.
        if self._bar.update(count) and (traffic := self._traffic()):
            self._bar.set_postfix_str(traffic, refresh=False)

    def close(self) -> None:
        if traffic := self._traffic():
            self._bar.set_postfix_str(traffic, refresh=False)
        self._bar.close()


@functools.cache
def _rich_columns() -> tuple[Callable[[], Any], Callable[[Callable[[], str]], Any]]:
    """Return classes of columns: the rate, and the traffic of a pool.

    They hold nothing of a bar: free-threaded CPython 3.13 keeps every class forever, and what its methods refer to.
    """
    from rich import progress
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: Any) -> Text:
            # rich's own speed needs two updates; a quick map has one.
            seconds = task.finished_time or task.elapsed
            return Text(f"{task.completed / seconds:,.1f}/s" if seconds else "")

    class Traffic(progress.ProgressColumn):
        # At most several times a second.
        max_refresh = 0.2

        def __init__(self, traffic: Callable[[], str]) -> None:
            super().__init__()
            self._traffic = traffic

        def render(self, task: Any) -> Text:
            return Text(self._traffic())

    return Rate, Traffic


class _RichBar:
    def __init__(self, total: int | None, traffic: Callable[[], str]) -> None:
        from rich import progress

        rate, pool_traffic = _rich_columns()
        # Narrow enough that all columns fit into a width of 80.
        bar = progress.BarColumn(bar_width=16)
        columns = [bar, progress.MofNCompleteColumn(), rate(), progress.TimeRemainingColumn(), pool_traffic(traffic)]
        self._progress = progress.Progress(*columns)
        self._task = self._progress.add_task("forkshm", total=total)
        self._progress.start()

    def update(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.stop()


def length_of(items: object) -> int | None:
    """Return the number of items, or None if it is unknown."""
    try:
        return len(items)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return None
