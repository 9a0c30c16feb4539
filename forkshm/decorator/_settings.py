"""The options of a decorated function, and the workers that functions with equal options share."""

from __future__ import annotations

import dataclasses
import multiprocessing
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm._multiprocess import current_process
from forkshm.errors import UnsupportedError
from forkshm.executor import Executor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Settings", "executor_of", "executors", "is_worker")

_ON_ERROR = ("raise", "return", "skip")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of one decorator."""

    workers: int | None = None
    start_method: str | None = None
    initializer: Callable[[], object] | None = None
    task_timeout: float | None = None
    retries: int | None = None
    chunksize: int | None = None
    progress: bool | str = False
    worker_init: Callable[[], object] | None = None
    worker_exit: Callable[[Any], object] | None = None
    cpu_ids: Any = None
    ordered: bool = True
    out: Any = None
    on_error: str = "raise"
    nested: bool = False
    cluster: Any = None

    def check(self) -> None:
        """Raise for invalid options, before a pool is created."""
        if self.on_error not in _ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(map(repr, _ON_ERROR))}, got {self.on_error!r}")
        if self.chunksize is not None and self.chunksize < 1:
            raise ValueError(f"chunksize must be at least 1, got {self.chunksize}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.worker_exit is not None and self.worker_init is None:
            raise ValueError(
                "cannot use worker_exit without worker_init: worker_exit is called with the value that worker_init "
                "returned. Pass worker_init as well."
            )
        if self.out is not None and self.cluster is not None:
            raise UnsupportedError(
                "cannot fill out on a cluster: out is memory of this machine, which other nodes cannot write to. "
                "Use the list that map returns.",
                capability="cluster",
            )
        if self.out is not None and self.on_error == "return":
            raise ValueError("cannot use on_error='return' with out: out cannot hold exceptions. Use on_error='skip'.")

    def pool_key(self) -> Any:
        """Return the key of the pool; functions with equal keys share their workers."""
        cpus = None if self.cpu_ids is None else tuple(map(str, self.cpu_ids))
        cluster = self.cluster if isinstance(self.cluster, str) else id(self.cluster)
        return self.workers, self.start_method, self.initializer, self.task_timeout, self.retries, cpus, cluster


executors: dict[Any, Executor] = {}
"""The executors by the options that they were created for."""


# A forked child cannot use its parent's workers.
_system.register_at_fork(after_in_child=executors.clear)


def executor_of(settings: Settings) -> Executor:
    key = settings.pool_key()
    executor = executors.get(key)
    if executor is not None:
        if settings.cluster is not None:
            return executor
        try:
            executor.pool._dispatcher.check_accepting()
        except Exception:  # for example, the initializer raised; a new pool may succeed
            executor.shutdown(wait=False, cancel_futures=True)
        else:
            return executor
    # Options that were not given keep the executor's defaults.
    given = {"task_timeout": settings.task_timeout, "retries": settings.retries, "cpu_ids": settings.cpu_ids}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if settings.cluster is not None:
        options["cluster"] = settings.cluster
    context = None
    if settings.start_method is not None:
        context = multiprocessing.get_context(settings.start_method)
    executor = executors[key] = Executor(settings.workers, context, settings.initializer, **options)
    return executor


def is_worker() -> bool:
    """Return whether this process is a worker of a pool, forkshm's or the standard library's."""
    return "PoolWorker" in current_process().name or "PoolWorker" in multiprocessing.current_process().name
