"""Tasks of a map: what workers run, and how the results are put in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forkshm.backend import kernel
from forkshm.channel import Kind
from forkshm.decorator._settings import executor_of, is_worker
from forkshm.errors import RemoteTraceback, remote_text, set_cause, without_frames
from forkshm.pool import IMapIterator, ResultSink, delivering, first_of
from forkshm.pool.observe import open_bar
from forkshm.region import Mode, mapping_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from forkshm.decorator._settings import Settings
    from forkshm.pool import Answer, Pool, Task

__all__ = (
    "Guarded",
    "Into",
    "Raised",
    "by_arrival",
    "check_shared",
    "on_cluster",
    "one_by_one",
    "sorted_out",
    "tasks_of",
)


class Raised:
    """An exception that stands in place of a result."""

    def __init__(self, error: BaseException, text: str | None = None) -> None:
        self.error = error
        self.text = text

    def get(self) -> BaseException:
        """Return the exception, with the worker's traceback as its cause."""
        if self.text is not None:
            set_cause(self.error, RemoteTraceback(self.text))
        return self.error


class Guarded:
    """Call a function, and return its exception instead of raising it."""

    def __init__(self, function: Callable[..., Any], *, starred: bool) -> None:
        self.function = function
        self.starred = starred

    def __call__(self, item: Any) -> Any:
        try:
            return self.function(*item) if self.starred else self.function(item)
        except Exception as error:
            if not is_worker():
                return Raised(error)
            text = remote_text(error)
            # The traceback's frames keep the arguments alive.
            without_frames(error)
            return Raised(error, text)


class Into:
    """Call a function, and store its result at the item's index of *out*."""

    def __init__(self, function: Callable[..., Any], out: Any, *, starred: bool) -> None:
        self.function = function
        self.out = out
        self.starred = starred

    def __call__(self, index: int, item: Any) -> None:
        self.out[index] = self.function(*item) if self.starred else self.function(item)


class _ByArrival(ResultSink):
    """Collects the answers to the chunks of one map as they arrive."""

    def __init__(self, chunksize: int) -> None:
        super().__init__()
        self.chunksize = chunksize
        self.arrived: dict[int, Answer] = {}

    def deliver(self, task: Task, answer: Answer) -> None:
        with delivering:
            if not task.is_delivered:
                self.arrived[task.position] = answer
                task.is_delivered = True


def tasks_of(pool: Pool, function: Any, items: Sequence[Any], settings: Settings, *, starred: bool) -> list[Task]:
    """Return the tasks of a map; their sink is not set yet."""
    chunksize = settings.chunksize
    if settings.on_error != "raise":
        function, starred = Guarded(function, starred=starred), False
        chunksize = chunksize or 1  # a worker that dies then fails one item; tiny tasks are still sent together
    return pool._map(Kind.STARMAP if starred else Kind.MAP, function, items, chunksize)[1]


def by_arrival(
    pool: Pool, function: Any, items: Sequence[Any], settings: Settings, *, starred: bool
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the position and the results of each chunk, as they arrive."""
    tasks = tasks_of(pool, function, items, settings, starred=starred)
    sink = _ByArrival(len(tasks[0].arguments) if tasks else 1)
    for task in tasks:
        task.sink = sink
    lengths = [len(task.arguments) for task in tasks]
    bar = open_bar(settings.progress, len(items), pool._dispatcher)
    try:
        if tasks:
            pool._dispatcher.submit(tasks, waited_for=True)
        for _ in lengths:
            pool._dispatcher.drive(lambda: bool(sink.arrived))
            position = first_of(sink.arrived)
            success, values = pool._dispatcher.open(sink.arrived.pop(position))
            yield position, values if success else [Raised(values)] * lengths[position]
            bar.update(lengths[position])
    finally:
        bar.close()
        # After an interrupt, the remaining results are not needed.
        pool._dispatcher.cancel([task for task in tasks if not task.is_delivered])


def sorted_out(chunks: Iterable[tuple[int, list[Any]]], settings: Settings) -> list[Any]:
    """Return the results in the requested order, with errors handled as requested."""
    came = list(chunks)
    if settings.ordered:
        came.sort(key=lambda chunk: chunk[0])
    return list(_as_wanted((value for _, values in came for value in values), settings))


def _as_wanted(values: Iterable[Any], settings: Settings) -> Iterator[Any]:
    for value in values:
        if not isinstance(value, Raised):
            yield value
        elif settings.on_error == "raise":
            raise value.get()
        elif settings.on_error == "return":
            yield value.get()


def one_by_one(values: Iterator[Any], settings: Settings, total: int | None, pool: Pool | None) -> Iterator[Any]:
    def guarded() -> Iterator[Any]:
        while True:
            try:
                value = next(values)
            except StopIteration:
                return
            except Exception as error:  # raised for a whole chunk, or by the input
                value = Raised(error)
            yield value
            bar.update(1)

    bar = open_bar(settings.progress, total, None if pool is None else pool._dispatcher)
    try:
        yield from _as_wanted(guarded(), settings)
    finally:
        bar.close()
        if isinstance(values, IMapIterator):
            values.cancel()
        elif settings.cluster is not None:
            values.close()  # type: ignore[attr-defined]  # a generator


def on_cluster(
    function: Any, items: Iterable[Any], settings: Settings, *, starred: bool, buffersize: int | None = None
) -> Iterator[Any]:
    """Yield the results of a map over the nodes of a cluster, in order, with a `Raised` for each exception."""
    executor: Any = executor_of(settings)
    calls = map(tuple, items) if starred else zip(items, strict=False)
    outcomes = executor.outcomes(function, calls, chunksize=settings.chunksize, buffersize=buffersize)
    try:
        for error, value in outcomes:
            yield value if error is None else Raised(error)
    finally:
        outcomes.close()


def check_shared(out: Any) -> None:
    interface = getattr(out, "__array_interface__", None)  # works for non-contiguous arrays as well
    address = kernel.address_of(memoryview(out)) if interface is None else interface["data"][0]
    mapping = mapping_at(address)
    if mapping is None or mapping.mode is not Mode.read_write:
        raise ValueError(
            f"cannot fill out, of type {type(out).__name__}: it is not in shared memory that workers can write. "
            "Create it with forkshm.empty()."
        )
