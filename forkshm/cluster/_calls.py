"""What runs in the worker processes of a node, which therefore do not import Dask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from forkshm.cluster._values import Raised, Results, loaded, read
from forkshm.errors import (
    UnsupportedError,
    remote_text,
    without_frames,
)
from forkshm.pickler import explain
from forkshm.pool import note_item

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Iterable, Mapping

__all__ = ("UNNAMED", "Group", "GroupCall", "Items", "LocalExecutor", "Sent")


UNNAMED = "..."
"""Stands for a call, or for its arguments, in errors until the client names them: see `_dead_workers`."""


class LocalExecutor(Protocol):
    """What the agent of a node needs of `forkshm.Executor`, which imports this package."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> concurrent.futures.Future[Any]:
        """Return the future of a call."""
        ...

    def cancel_running(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel calls, including running ones."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end the workers."""


class Group(NamedTuple):
    """Items that one worker process takes in one task."""

    length: int
    items: bytes
    """A list of (args, kwargs), as a `forkshm.cluster._values.Writer` wrote it."""
    first: int | None = None
    """The number of its first item in the input of a map; None for other calls."""


class Sent:
    """A function for the worker processes, as a `Writer` wrote it on the client."""

    def __init__(self, stream: bytes) -> None:
        self._stream = stream

    def __call__(self, *args: Any) -> Any:
        return read(self._stream, {})(*args)


class Items:
    """The items of a group, and the node's arrays and results that they name."""

    def __init__(self, group: Group, values: Mapping[str, Any]) -> None:
        self.length = group.length
        self.stream = group.items
        self.values = values

    def __repr__(self) -> str:
        return UNNAMED


class GroupCall:
    """Runs the items of a group, in a worker process of a node."""

    def __init__(self, name: str, function: bytes) -> None:
        self.__qualname__ = name  # for messages about a worker that died
        self._function = function

    def __call__(self, items: Items) -> Results:
        call = loaded(self._function, items.values)
        results: list[Any] = []
        for number, (args, kwargs) in enumerate(read(items.stream, items.values)):
            note_item(number)
            try:
                results.append((call(*args, **kwargs),))
            # Also SystemExit: it belongs to the call, as on one machine.
            except BaseException as error:
                text = remote_text(error)
                without_frames(error)  # its frames keep the arguments alive
                results.append(Raised(error, text))
        try:
            return Results(results)
        except BaseException:  # raised by a __reduce__
            return Results([_sendable(result) for result in results])


def _sendable(result: Any) -> Any:
    """Return *result* if it can be pickled; else the exception of its call."""
    if isinstance(result, Raised):
        return result
    try:
        Results([result])
    except UnsupportedError as error:
        return Raised(error, None)
    except Exception as error:
        from forkshm import ResultNotPicklableError

        (value,) = result
        explain(error, {"result": value})
        return Raised(ResultNotPicklableError(type(value).__name__, error), None)
    except BaseException as error:
        return Raised(error, None)
    return result
