"""team(): run a block in several forked processes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from forkshm import _interrupts, _system
from forkshm._interrupts import promptly
from forkshm.backend import kernel
from forkshm.channel import PrivateFd
from forkshm.errors import ForkshmError, TeamBrokenError, UnsupportedError, WorkerStartError, set_context
from forkshm.pickler import importable_now
from forkshm.processes import end_child, settle_child
from forkshm.region import OwnedFd
from forkshm.spmd._member import Member
from forkshm.spmd._monitor import TeamMonitor, report, wait_for
from forkshm.spmd._team_state import FAILED, LEFT, TeamState

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ("Team", "team")

# Arguments of a call without arguments that `itertools.starmap` makes once.
_ONCE: tuple[tuple[()], ...] = ((),)


def team(workers: int | None = None) -> Team:
    """Run a block in several processes: ``with forkshm.team(4) as t:``.

    This process forks ``workers - 1`` others at the start of the block. Each runs the block with its own `Team.rank`;
    this process has rank 0. Arrays of `forkshm.zeros` and other shared memory are common to all; everything else is
    copied by the fork. At the end of the block the other processes have ended, and only this process runs the code
    after it.

    Args:
        workers: Number of processes, including this one; by default the number of cores that this process may use.
            With 1, no process is forked.

    Returns:
        The team, which can be entered once.

    Raises:
        ValueError: *workers* is less than 1.
        WorkerStartError: At the start of the block: the kernel refused a process. No member has begun the block.
        WorkerDiedError: At the end of the block: a member was killed, or ended without leaving the block.
        TeamBrokenError: A member waits, for example at a barrier, for a member that failed, died or left.
        Exception: At the end of the block: a member raised it; ``__cause__`` has the member's traceback. If several
            members fail, the first failure is raised. The others get a second to leave the block and are then killed.
            The same happens if this process raises in the block; its exception then propagates.

    Fork and threads:
        Members are forked and have only the thread that entered the block. Start the team before other threads, or make
        sure that these hold no locks at that time. A member of a team or a worker of a pool may start a team.
        Members ignore Ctrl-C, which this process handles, and end when this process ends, even if it is killed. NumPy's
        global random generator has the same state in all members; give each member its own with
        ``numpy.random.default_rng([seed, t.rank])``.

    Example:
        >>> import forkshm
        >>> squares = forkshm.zeros(100)
        >>> with forkshm.team(2) as t:
        ...     for i in t.range(100):
        ...         squares[i] = i * i
        >>> int(squares.sum())
        328350

    See Also:
        The parallel region of OpenMP, and pymp.
    """
    if workers is None:
        workers = kernel.default_workers()
    if operator.index(workers) < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not _system.CAN_FORK:
        raise UnsupportedError(
            "cannot start a team: its members are forked, and this system cannot fork. Use forkshm.Pool or "
            "@forkshm.parallel.",
            capability="fork",
        )
    return Team(workers)


class Team(Member):
    """A team of processes that run a block, returned by `team`; see `Member` for its methods.

    Attributes:
        rank: Rank of this process; 0 in the process that started the team.
        size: Number of processes.

    Example:
        >>> import forkshm
        >>> with forkshm.team(2) as t:
        ...     ranks = t.reduce([t.rank])
        >>> ranks
        [0, 1]

    See Also:
        `forkshm.team`.
    """

    _known: Any

    def __init__(self, size: int) -> None:
        self._join(None, 0, size)
        self._used = False
        self._monitor: TeamMonitor | None = None
        # The ends of the lifeline. The kernel kills the members when the write end is closed, so no child may hold it.
        self._reading, self._writing = OwnedFd(), PrivateFd()

    def __repr__(self) -> str:
        return f"<Team of {self.size}, member {self.rank}>"

    def __enter__(self) -> Self:
        if self._used:
            raise ForkshmError("cannot enter the team again: a team can be used once. Create one with forkshm.team().")
        self._used = True
        self._pid = os.getpid()
        assert sys.platform != "win32"  # there is no fork
        try:
            team_state = self._team_state = TeamState(self.size)
            monitor = self._monitor = TeamMonitor(team_state, f"member {{}} of a team of {self.size}", "the block")
            # No call between the creation of the fds and these stores, where a signal handler could raise.
            self._reading.fd, self._writing.fd = kernel.create_lifeline()
            self._reading.own()
            self._writing.own()
            self._known = importable_now()
            team_state.enter(0)
            _flush()
            # No Python signal handler may raise between the fork and the block.
            with _interrupts.held_back():
                for rank in range(1, self.size):
                    if self._fork(rank, monitor):
                        continue
                    self._begin(rank, team_state, monitor)
                    return self
        except BaseException as error:
            self._end()
            if isinstance(error, OSError) and _interrupts.is_of_kernel(error):
                raise WorkerStartError(
                    error.errno or 0,
                    f"cannot start a team of {self.size} {_system.why_refused(error)}",
                ) from error
            raise
        # Only after all forks have succeeded: either all members begin the block or none does.
        try:
            team_state.open_gate()
        except BaseException:
            self._end()
            raise
        return self

    def _fork(self, rank: int, monitor: TeamMonitor) -> int:
        """Fork the member of that rank, and watch it; return its pid, and 0 in the member."""
        assert sys.platform != "win32"  # there is no fork
        pids: list[int] = []
        try:
            with kernel.forking() as sentinel:
                # Forked and noted in one C call: an interrupted start leaves no process.
                pids.extend(itertools.starmap(os.fork, _ONCE))
                if pids[0]:
                    monitor.add(rank, pids[0], functools.partial(wait_for, pids[0]), sentinel)
            return pids[0]
        except BaseException:
            if pids and not pids[0]:
                os._exit(1)
            if pids and rank not in monitor.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[0], _system.SIGKILL)
                wait_for(pids[0])
            raise

    def _look_for_dead(self) -> None:
        if self._monitor is not None and not self.rank:
            self._monitor.look()

    @promptly
    def _end(self) -> None:
        """Leave the team, and kill the members that are still running."""
        _interrupts.repeat(self._close)

    def _close(self) -> None:
        # It takes longer than the time between two signals of a timer, whose handler may raise.
        with _interrupts.held_back():
            self._close_all()

    def _close_all(self) -> None:
        # Can be repeated. Each is tried, whatever the others raise.
        if os.getpid() != self._pid:
            return  # a process that user code forked inside the block
        with contextlib.ExitStack() as rest:
            rest.callback(self._reading.close)
            rest.callback(self._writing.close)
            # The monitor reads the state, so an interrupted end of the monitor leaves the state open.
            if self._monitor is not None:
                self._monitor.close()
                self._monitor = None
            if self._team_state is not None:
                self._team_state.close()
                self._team_state = None

    @promptly
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rank:
            self._leave(error)
        if self._team_state is None or self._monitor is None:
            return
        try:
            if os.getpid() != self._pid:
                return  # a process that user code forked inside the block
            self._team_state.end(0, LEFT if error is None else FAILED)
            if error is not None:
                self._monitor.fail()
            self._monitor.wait()
            failures = self._monitor.failures()
        finally:
            self._end()
        if not failures:
            return
        first = failures[0]
        if error is None or (isinstance(error, TeamBrokenError) and not isinstance(first, TeamBrokenError)):
            raise first
        if error.__context__ is None:
            set_context(error, first)

    # -- in the others ------------------------------------------------------------------------

    def _begin(self, rank: int, team_state: TeamState, monitor: TeamMonitor) -> None:
        """Become a member, and return when the block can begin."""
        try:
            self.rank = rank
            self._pid = os.getpid()
            self._armed = PrivateFd(kernel.die_with(self._reading.fd))
            monitor.forget()
            self._answers_in = monitor.answers_in
            # Ctrl-C reaches the whole process group; only the process that started the team handles it.
            _interrupts.begin(ignores=True)
            settle_child()
            if "torch" in sys.modules:
                from forkshm.integrations.torch import settle_worker

                settle_worker()
            team_state.wait_for_gate()
            team_state.enter(rank)
        except BaseException as error:
            self._leave(error)

    @promptly
    def _leave(self, error: BaseException | None) -> NoReturn:
        """End this process, which was forked for the block and must not run the code after it."""
        code = 1
        try:
            if os.getpid() != self._pid:
                os._exit(code)  # user code forked this process from a member, and it reached the end of the block
            if error is None:
                try:
                    end_child()
                except BaseException as raised:
                    error = raised
            team_state = self._joined_state()
            if error is None:
                code = 0
                _flush()
                team_state.end(self.rank, LEFT)
            else:
                report(error, self.rank, team_state, self._answers_in, self._known)
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            try:
                _flush()
            finally:
                os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A closed, missing or full stream is the program's own matter.
        with contextlib.suppress(Exception):
            stream.flush()
