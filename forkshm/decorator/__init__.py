"""Layer 6 of 6. `parallel`, which makes a function run in worker processes."""

from forkshm._help import publish
from forkshm.decorator._function import ParallelFunction
from forkshm.decorator._parallel import parallel

__all__ = ("ParallelFunction", "parallel")

publish(globals())
