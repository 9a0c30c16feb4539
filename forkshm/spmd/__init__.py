"""Layer 5, beside the pool. Processes that run the same code, each with a rank.

A team is forked around a block, launched workers run a function, the workers of
``python -m forkshm run`` a script. They have one memory in common, the team state, over
which they meet; whoever dies is noticed by the process that started them, and nobody
waits for the dead. Supervised workers do not meet, and are replaced when they end.
"""

from forkshm._public import publish
from forkshm.spmd._current import RankedWorker, worker
from forkshm.spmd._launch import Launch, launch
from forkshm.spmd._member import Member
from forkshm.spmd._supervise import Supervised, supervise
from forkshm.spmd._team import Team, team

__all__ = (
    "Launch",
    "Member",
    "RankedWorker",
    "Supervised",
    "Team",
    "launch",
    "supervise",
    "team",
    "worker",
)

publish(globals())
