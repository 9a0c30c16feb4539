"""Layer 6 of 6: `SharedList` and `SharedDict`, read-only containers in shared memory."""

from forkshm._help import publish
from forkshm.containers._containers import SharedDict, SharedList

__all__ = ("SharedDict", "SharedList")

publish(globals())
