"""Layer 6 of 6: `Executor`, a pool with the interface of `concurrent.futures`."""

from forkshm._help import publish
from forkshm.executor._executor import Executor
from forkshm.executor._futures import Future

__all__ = ("Executor", "Future")

publish(globals())
