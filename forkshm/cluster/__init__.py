"""Layer 6 of 6. Executors whose workers run on the nodes of a Dask cluster.

`forkshm.Executor` with ``cluster=`` is a `ClusterExecutor`. Each Dask worker is a node: it has an agent (``_agent``)
with a pool of its own, and one copy of each large array in shared memory, which all workers of the node read.
"""

from forkshm._help import publish
from forkshm.cluster._executor import ClusterExecutor, ClusterFuture, RemoteResult

__all__ = ("ClusterExecutor", "ClusterFuture", "RemoteResult")

publish(globals())
