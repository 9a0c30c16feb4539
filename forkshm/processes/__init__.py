"""Child processes: how they are started, watched and reaped, by each start method."""

from forkshm._help import publish
from forkshm.processes._breakpoint import explained_quit
from forkshm.processes._exit_code import exit_code
from forkshm.processes._forked import end_child, let_have_children, settle_child
from forkshm.processes._identity import register
from forkshm.processes._patched_bootstrap import is_followed
from forkshm.processes._preload import OnError, set_forkserver_preload
from forkshm.processes._process import (
    ForkProcess,
    ForkServerProcess,
    NoFork,
    Process,
    SpawnProcess,
    first_calls,
    refuse_while_main_is_imported,
)

__all__ = (
    "ForkProcess",
    "ForkServerProcess",
    "NoFork",
    "OnError",
    "Process",
    "SpawnProcess",
    "end_child",
    "exit_code",
    "explained_quit",
    "first_calls",
    "is_followed",
    "let_have_children",
    "refuse_while_main_is_imported",
    "register",
    "set_forkserver_preload",
    "settle_child",
)

publish(globals())
