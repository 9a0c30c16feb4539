"""Layer 5, beside the pool: processes that run the same code, each with a rank.

A team is forked for a block. Launched workers run a function, and the workers of ``python -m forkshm run`` run a
script. They synchronize through shared memory, the team state. The process that started them notices when a member
dies and releases the members waiting for it. Supervised workers do not synchronize and are replaced when they end.
"""

from forkshm._help import publish
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
