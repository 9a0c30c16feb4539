"""Layer 6 of 6. `SharedList` and `SharedDict`: objects that many processes read in shared memory."""

from forkshm._public import publish
from forkshm.containers._containers import SharedDict, SharedList

__all__ = ("SharedDict", "SharedList")

publish(globals())
