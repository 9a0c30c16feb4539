"""The agent of a node: a pool of forkserver workers inside a Dask worker, and the calls that run there.

Only this file imports Dask's ``distributed``. It is imported on the client and on the nodes. An agent is a
``WorkerPlugin``, so a node that joins later gets one, too. Its pool starts with the node's first call.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import time
from typing import TYPE_CHECKING, Any

import dask.sizeof
import distributed
import distributed.protocol
import distributed.system

from forkshm import _interrupts
from forkshm.cluster._calls import UNNAMED, Group, GroupCall, Items, LocalExecutor
from forkshm.cluster._values import Kept, Raised, Results, known
from forkshm.context import get_context
from forkshm.errors import UnsupportedError, WorkerDiedError, safe_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from forkshm.cluster._values import NodeArray

__all__ = (
    "Agent",
    "cancel",
    "client_of",
    "dead_nodes",
    "keep",
    "key_of",
    "make_local",
    "memory_limit",
    "register",
    "run",
    "unregister",
)

# Seconds after which a node asks again for an array, because a question or its answer can be lost with a process.
_ASK_EVERY = 2.0
# Seconds after which a waiting call looks whether its arrays have arrived, or it was cancelled.
_LOOK_EVERY = 0.01
# Seconds for which a node remembers that a call was cancelled that it may never get.
_CANCELLED_KEPT = 60.0

# Seconds after which a client that has lost its connection is taken for dead.
_RECONNECT = 30.0

# The agents in this process, keyed by the id of the Dask worker and the name of the executor. Dask workers that are
# threads share a process.
_agents: dict[tuple[str, str], Agent] = {}


class Agent(distributed.WorkerPlugin):
    """Runs calls in the worker processes of its node.

    Args:
        name: Name of the executor on the client.
        workers: Number of worker processes; None for as many as the Dask worker has threads.
        make: Creates the executor of a node, given the number of workers.
    """

    def __init__(self, name: str, workers: int | None, make: Callable[[int], LocalExecutor]) -> None:
        self.name = name
        self.workers = workers
        self._make = make

    def setup(self, worker: Any) -> None:
        """Set up the agent on a node; called by Dask."""
        self._worker = worker
        self.workers = self.workers or worker.state.nthreads
        self._starting = _interrupts.Lock()
        self._executor: LocalExecutor | None = None
        self._running: dict[str, list[concurrent.futures.Future[Any]]] = {}
        self._cancelled: dict[str, float] = {}
        _agents[worker.id, self.name] = self

    def teardown(self, worker: Any) -> None:
        """End the node's pool; called by Dask."""
        _agents.pop((worker.id, self.name), None)
        with self._starting:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    def executor(self) -> LocalExecutor:
        """Return the executor of this node, starting it at the first call."""
        with self._starting:
            executor = self._executor
            if executor is None:
                executor = self._executor = self._make(self.workers or 1)
            return executor

    def run(self, call: str, function: GroupCall, groups: Sequence[Group], values: Mapping[str, Any]) -> list[Results]:
        """Run a call's groups in the pool; return the results of each group, or the exceptions."""
        executor = self.executor()
        futures: list[concurrent.futures.Future[Any]] = []
        self._running[call] = futures
        try:
            for group in groups:
                if call in self._cancelled:
                    break
                futures.append(executor.submit(function, Items(group, values)))
            if call in self._cancelled:
                self._end(futures)
            # The results of a cancelled call are not needed.
            return [_results(call, future, group.length) for future, group in zip(futures, groups, strict=False)]
        finally:
            self._running.pop(call, None)
            self._cancelled.pop(call, None)

    def arrays(self, call: str, names: Sequence[str]) -> dict[str, Any]:
        """Return the arrays of a call by name, after asking the client for those that this node lacks."""
        found: dict[str, NodeArray] = {}
        asked_at = -math.inf
        while True:
            for name in names:
                node = known.get(name)
                if node is not None:
                    found[name] = node
            missing = [name for name in names if name not in found]
            if not missing:
                return {name: node.array for name, node in found.items()}
            task = self._worker.state.tasks.get(key_of(call))
            if task is None or task.state not in ("executing", "long-running"):
                raise RuntimeError("the call was cancelled, or its client has ended")
            if time.monotonic() - asked_at > _ASK_EVERY:
                asked_at = time.monotonic()
                self._worker.log_event(self.name, {"node": self._worker.address, "arrays": missing})
            time.sleep(_LOOK_EVERY)

    def cancel(self, calls: Sequence[str]) -> None:
        """End calls: cancel tasks that are not begun, and kill workers that run one of the calls."""
        now = time.monotonic()
        for call, cancelled_at in list(self._cancelled.items()):
            if call not in self._running and now - cancelled_at > _CANCELLED_KEPT:
                self._cancelled.pop(call, None)
        # Also calls that do not run: one may begin before Dask cancels it.
        self._cancelled.update(dict.fromkeys(calls, now))
        for call in calls:
            futures = self._running.get(call)
            if futures is not None:
                self._end(futures)

    def _end(self, futures: Sequence[concurrent.futures.Future[Any]]) -> None:
        if self._executor is not None:
            self._executor.cancel_running(futures)


class Cleanup(distributed.SchedulerPlugin):
    """Ends the pools of an executor whose client has ended without shutting it down, as a killed one does.

    Args:
        name: Name of the executor, and of its agents.
        client: Id of its client.
    """

    def __init__(self, name: str, client: str) -> None:
        self.name = name
        self._client = client

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Wait for the client to connect again; called by Dask."""
        if client == self._client:
            scheduler.loop.call_later(_RECONNECT, self._end, scheduler)

    async def _end(self, scheduler: Any) -> None:
        if self._client not in scheduler.clients:
            with contextlib.suppress(ValueError):  # the executor was shut down
                scheduler.remove_plugin(self.name)
                await scheduler.unregister_worker_plugin(comm=None, name=self.name)


def register(client: Any, agent: Agent) -> None:
    """Set up an agent on each node of a client, now and later."""
    client.register_plugin(agent, name=agent.name)
    # Only a scheduler that cannot import forkshm refuses it.
    with contextlib.suppress(Exception):
        client.register_plugin(Cleanup(agent.name, client.id), name=agent.name)


def unregister(client: Any, name: str) -> None:
    """End the agents of an executor, and their pools, unless the cluster has ended."""
    with contextlib.suppress(Exception):
        client.unsubscribe_topic(name)
    with contextlib.suppress(Exception):  # it was not registered
        client.unregister_scheduler_plugin(name)
    with contextlib.suppress(Exception):
        client.unregister_worker_plugin(name)


def make_local(
    local: Callable[..., LocalExecutor], method: str, options: Mapping[str, Any], workers: int
) -> LocalExecutor:
    """Return the executor of a node, whose pool starts with the first call."""
    return local(workers, get_context(method), **options)


def _results(call: str, future: concurrent.futures.Future[Any], length: int) -> Results:
    try:
        results: Results = future.result()
    # Also SystemExit, which would end the node.
    except BaseException as error:
        return Results([Raised(error, None, call)] * length)
    return results


def run(
    name: str,
    call: str,
    function: GroupCall,
    groups: Sequence[Group],
    arrays: Sequence[str],
    remote: Mapping[str, Any],
) -> Any:
    """Run groups of a call on this node. Dask runs this function."""
    agent = _agents.get((distributed.get_worker().id, name))
    if agent is None:
        raise RuntimeError(f"cannot run a call here: executor {name} was shut down, or was not set up on this node")
    values = agent.arrays(call, arrays)
    for key, results in remote.items():
        (result,) = results[0].open()
        if isinstance(result, Raised):
            return [Results([result] * group.length) for group in groups]
        (values[key],) = result
    return agent.run(call, function, groups, values)


def cancel(name: str, calls: Sequence[str], dask_worker: Any = None) -> None:
    """Cancel calls on this node, if they run here. Dask passes *dask_worker*."""
    agent = _agents.get((dask_worker.id, name))
    if agent is not None:
        agent.cancel(calls)


def keep(node: NodeArray) -> Kept:
    """Return what keeps an array on this node. Dask runs this function, and moves the array here before."""
    return Kept(node)


def key_of(call: str) -> str:
    """Return the key of the Dask task that runs a call."""
    return f"forkshm-{call}"


def client_of(cluster: Any) -> tuple[Any, bool]:
    """Return a client of *cluster*, and whether this call created it.

    Raises:
        UnsupportedError: *cluster* is asynchronous.
    """
    if getattr(cluster, "asynchronous", False):
        raise UnsupportedError(
            f"cannot use {safe_repr(cluster)} for an executor: it is asynchronous, and the executor would wait for the "
            "event loop that runs it. Pass the address of its scheduler.",
            capability="cluster",
        )
    if isinstance(cluster, distributed.Client):
        return cluster, False
    client: Any = distributed.Client
    return client(cluster, set_as_default=False), True


def dead_nodes(error: BaseException) -> WorkerDiedError | None:
    """Return the error of a call whose nodes have died, one after the other; None for other errors."""
    if not isinstance(error, distributed.KilledWorker):
        return None
    deaths = error.allowed_failures + 1
    died = WorkerDiedError(0, None, task=UNNAMED, attempts=deaths)
    message = (
        f"{deaths} nodes died while running {UNNAMED}, the last one at {error.last_worker.address}, so no other node "
        "gets it. Look for the cause in the logs of the nodes; it is often a lack of memory."
    )
    died.args = (message,)
    died.__cause__ = error
    return died


def memory_limit() -> int:
    """Return the bytes of memory that this process may use."""
    return int(distributed.system.MEMORY_LIMIT)


def _serialize(results: Results) -> tuple[dict[str, Any], list[Any]]:
    return {}, results.frames


def _deserialize(header: Any, frames: Sequence[Any]) -> Results:
    return Results.arrived(*frames)


_of_dask: Any = distributed.protocol
_of_dask.dask_serialize.register(Results, _serialize)
_of_dask.dask_deserialize.register(Results, _deserialize)
# Dask decides by the size where to run a call, and when the memory of a node is full.
_register_size: Any = dask.sizeof.sizeof.register
_register_size(Results, Results.__sizeof__)
