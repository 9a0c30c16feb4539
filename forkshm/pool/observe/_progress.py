"""A progress bar, by tqdm or rich, when somebody asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from forkshm.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.pool._driver import Driver
    from forkshm.pool.observe._statistics import PoolStatistics

__all__ = ("Bar", "length_of", "no_bar", "open_bar")


class Bar(Protocol):
    """A bar that shows the progress of a call."""

    def update(self, count: int) -> None:
        """So many more items are done."""

    def close(self) -> None:
        """It is over; what is shown stays."""


class _NoBar:
    def update(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


no_bar = _NoBar()


def open_bar(kind: bool | str, total: int | None, dispatcher: Driver | None = None) -> Bar:
    """Return a bar that shows how many items are done, of how many, how fast, and how long the rest will take.

    Args:
        kind: True or ``"tqdm"``, which is at home in terminals and notebooks, or ``"rich"``; False for none.
        total: How many items there are, if that is known.
        dispatcher: Of the pool whose bytes, copied and shared, are shown beside it.

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
        # True when it was drawn: only then the numbers beside it are worth their price.
        if self._bar.update(count) and (traffic := self._traffic()):
            self._bar.set_postfix_str(traffic, refresh=False)

    def close(self) -> None:
        if traffic := self._traffic():
            self._bar.set_postfix_str(traffic, refresh=False)
        self._bar.close()


class _RichBar:
    def __init__(self, total: int | None, traffic: Callable[[], str]) -> None:
        from rich import progress
        from rich.text import Text

        class Rate(progress.ProgressColumn):
            def render(self, task: Any) -> Text:
                # rich's own speed needs two updates; a quick map has one.
                seconds = task.finished_time or task.elapsed
                return Text(f"{task.completed / seconds:,.1f}/s" if seconds else "")

        class Traffic(progress.ProgressColumn):
            # Several times a second at the most.
            max_refresh = 0.2

            def render(self, task: Any) -> Text:
                return Text(traffic())

        # So narrow that all of it has room in 80 columns.
        bar = progress.BarColumn(bar_width=16)
        columns = [bar, progress.MofNCompleteColumn(), Rate(), progress.TimeRemainingColumn(), Traffic()]
        self._progress = progress.Progress(*columns)
        self._task = self._progress.add_task("forkshm", total=total)
        self._progress.start()

    def update(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.stop()


def length_of(items: object) -> int | None:
    """Return how many items there are, if that is known."""
    try:
        return len(items)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return None
