"""The agent of a node: a pool of forkserver workers inside a Dask worker, and the calls that run there.

Only this file imports Dask's ``distributed``. It is imported on the client and on the nodes. An agent is a
``WorkerPlugin``, so a node that joins later gets one, too. Its pool starts with the node's first call.
"""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any, NamedTuple

import distributed

from forkshm import _interrupts
from forkshm.cluster._values import Writer, loaded, read
from forkshm.context import get_context
from forkshm.errors import (
    NotPicklableError,
    NotUnpicklableError,
    RemoteTraceback,
    remote_text,
    safe_repr,
    set_cause,
    without_frames,
)
from forkshm.executor import Executor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forkshm.cluster._values import NodeArray

__all__ = ("Agent", "Group", "Raised", "cancel", "distributed", "run")

# The agents in this process, keyed by the name of their executor. A node has one agent for each executor.
_agents: dict[str, Agent] = {}


class Group(NamedTuple):
    """Items that one worker process takes in one task."""

    length: int
    items: bytes
    """A list of (args, kwargs), as a `forkshm.cluster._values.Writer` wrote it."""


class Raised:
    """An exception raised by a call, and its traceback as text. Dask's pickler could not rebuild every exception."""

    def __init__(self, error: BaseException, text: str | None) -> None:
        self.text = text
        try:
            self._error = Writer().write(error)
        except Exception:
            self._error = Writer().write(
                NotPicklableError(f"a call raised an exception that cannot be pickled: {safe_repr(error)}")
            )

    def open(self) -> BaseException:
        """Return the exception, with the traceback as its cause."""
        try:
            error: BaseException = read(self._error, {})
        except Exception as reason:
            error = NotUnpicklableError(
                f"a call raised an exception that cannot be unpickled on the client: {safe_repr(reason)}"
            )
        if self.text is not None:
            set_cause(error, RemoteTraceback(self.text))
        return error


class Agent(distributed.WorkerPlugin):
    """Runs calls in the worker processes of its node."""

    def __init__(self, name: str, workers: int | None, options: Mapping[str, Any]) -> None:
        self.name = name
        self.workers = workers
        self.options = dict(options)

    def setup(self, worker: Any) -> None:
        """Set up the agent on a node; called by Dask."""
        self.workers = self.workers or worker.state.nthreads
        self._starting = _interrupts.Lock()
        self._executor: Executor | None = None
        self._running: dict[str, list[concurrent.futures.Future[Any]]] = {}
        self._cancelled: set[str] = set()
        _agents[self.name] = self

    def teardown(self, worker: Any) -> None:
        """End the node's pool; called by Dask."""
        _agents.pop(self.name, None)
        with self._starting:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    def executor(self) -> Executor:
        """Return the executor of this node, starting it at the first call."""
        with self._starting:
            executor = self._executor
            if executor is None:
                # Not fork: a Dask worker has threads.
                executor = self._executor = Executor(self.workers, get_context("forkserver"), **self.options)
            return executor

    def run(self, call: str, function: bytes, groups: Sequence[Group], values: Mapping[str, Any]) -> list[list[Any]]:
        """Run a call's groups in the pool; return the results of each group, or the exceptions."""
        executor = self.executor()
        futures: list[concurrent.futures.Future[Any]] = []
        self._running[call] = futures
        try:
            for group in groups:
                if call in self._cancelled:
                    break
                futures.append(executor.submit(_run_group, function, group.items, values))
            if call in self._cancelled:
                self._end(futures)
            # The results of a cancelled call are not needed.
            return [_results(future, group.length) for future, group in zip(futures, groups, strict=False)]
        finally:
            self._running.pop(call, None)
            self._cancelled.discard(call)

    def cancel(self, calls: Sequence[str]) -> None:
        """End calls: cancel tasks that are not begun, and kill workers that run one of the calls."""
        for call in calls:
            futures = self._running.get(call)
            if futures is not None:
                self._cancelled.add(call)
                self._end(futures)

    def _end(self, futures: Sequence[concurrent.futures.Future[Any]]) -> None:
        if self._executor is not None:
            self._executor.cancel_running(futures)


def _results(future: concurrent.futures.Future[Any], length: int) -> list[Any]:
    try:
        results: list[Any] = future.result()
    except Exception as error:
        return [Raised(error, None)] * length
    return results


def _run_group(function: bytes, items: bytes, values: Mapping[str, Any]) -> list[Any]:
    """Run the items of a group, in a worker process of a node."""
    call = loaded(function, values)
    results: list[Any] = []
    for args, kwargs in read(items, values):
        try:
            results.append((call(*args, **kwargs),))
        except Exception as error:
            text = remote_text(error)
            without_frames(error)  # its frames keep the arguments alive
            results.append(Raised(error, text))
    return results


def run(
    name: str,
    call: str,
    function: bytes,
    groups: Sequence[Group],
    arrays: Sequence[NodeArray],
    remote: Mapping[str, Any],
) -> Any:
    """Run groups of a call on this node. Dask runs this function."""
    agent = _agents.get(name)
    if agent is None:
        raise RuntimeError(f"cannot run a call here: executor {name} was shut down, or was not set up on this node")
    values = {array.name: array.array for array in arrays}
    for key, result in remote.items():
        values[key] = value_of(result)
    return agent.run(call, function, groups, values)


def value_of(results: Any) -> Any:
    """Return the value of a call with one item."""
    ((result,),) = results
    if isinstance(result, Raised):
        raise result.open()
    return result[0]


def cancel(name: str, calls: Sequence[str]) -> None:
    """Cancel calls on this node, if they run here."""
    agent = _agents.get(name)
    if agent is not None:
        agent.cancel(calls)


def client_of(cluster: Any) -> tuple[Any, bool]:
    """Return a client of *cluster*, and whether this call created it."""
    if isinstance(cluster, distributed.Client):
        return cluster, False
    client: Any = distributed.Client
    return client(cluster, set_as_default=False), True
