"""Layer 6 of 6. What a person types: thin doors over one pool.

`parallel` is a decorator, `Executor` has the interface of concurrent.futures, `SharedList` and `SharedDict` hold
objects that many processes read. The door of asyncio is the module `forkshm.aio`.
"""

from forkshm.doors._containers import SharedDict, SharedList
from forkshm.doors._executor import Executor
from forkshm.doors._parallel import ParallelFunction, parallel

__all__ = ("Executor", "ParallelFunction", "SharedDict", "SharedList", "parallel")
