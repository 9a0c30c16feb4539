"""Layer 5, beside the pool. Processes that run the same code, each with a rank.

A team is forked around a block, launched workers run a function, the workers of
``python -m forkshm run`` a script. They have one memory in common, the board, over
which they meet; whoever dies is noticed by the process that started them, and nobody
waits for the dead. Supervised workers do not meet, and are replaced when they end.
"""

from forkshm.workers._current import Worker, worker
from forkshm.workers._launch import Launch, launch
from forkshm.workers._member import Member
from forkshm.workers._supervise import Supervised, supervise
from forkshm.workers._team import Team, team

__all__ = (
    "Launch",
    "Member",
    "Supervised",
    "Team",
    "Worker",
    "launch",
    "supervise",
    "team",
    "worker",
)
