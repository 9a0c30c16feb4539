"""A progress bar, by tqdm or rich, when somebody asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from forkshm.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.pool import Pool

__all__ = ("Bar", "no_bar", "open_bar")


class Bar(Protocol):
    """What shows how far a call is."""

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


def open_bar(kind: bool | str, total: int | None, pool: Pool | None = None) -> Bar:
    """Return a bar.

    Args:
        kind: True or ``"tqdm"``, which is at home in terminals and notebooks, or ``"rich"``; False for none.
        total: How many items there are, if that is known.
        pool: Whose bytes, copied and shared, are shown beside it.

    Raises:
        MissingDependencyError: The library is not installed.
        ValueError: There is no such kind.
    """
    if kind is False:
        return no_bar
    if kind not in (True, "tqdm", "rich"):
        raise ValueError(f"progress must be True, False, 'tqdm' or 'rich', got {kind!r}")
    traffic = _traffic_since_now(pool) if pool is not None else str
    name = "rich" if kind == "rich" else "tqdm"
    try:
        return _RichBar(total, traffic) if kind == "rich" else _TqdmBar(total, traffic)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise MissingDependencyError(
            f"progress={kind!r} needs {name}: pip install 'forkshm[progress]'", extra="progress"
        ) from error


def _traffic_since_now(pool: Pool) -> Callable[[], str]:
    before = pool.statistics()

    def traffic() -> str:
        now = pool.statistics()
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

        columns = [*progress.Progress.get_default_columns(), progress.MofNCompleteColumn()]
        self._progress = progress.Progress(*columns, progress.TextColumn("{task.fields[traffic]}"))
        self._task = self._progress.add_task("forkshm", total=total, traffic="")
        self._progress.start()
        self._traffic = traffic

    def update(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.update(self._task, traffic=self._traffic())
        self._progress.stop()
