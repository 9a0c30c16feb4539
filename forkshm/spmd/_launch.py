"""launch(): a function that several ranked processes run, and worker(): which of them this one is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import pickle
import signal
import sys
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import kernel
from forkshm.channel import PrivateFd, Sender
from forkshm.errors import UnsupportedError, WorkerStartError
from forkshm.pickler import Handle, ReceivedFd, importable_now, register
from forkshm.spmd._current import RankedWorker, become
from forkshm.spmd._monitor import TeamMonitor, report
from forkshm.spmd._team_state import LEFT, TeamState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self


__all__ = ("Launch", "launch")


def launch(
    fn: Callable[..., object],
    args: Iterable[Any] = (),
    workers: int | None = None,
    *,
    join: bool = True,
    start_method: str | None = None,
) -> Launch:
    """Call ``fn(rank, *args)`` in several processes, with ranks from 0, and wait until all have ended.

    In the processes `forkshm.worker` gives the rank, the barrier and all else that they have in common. When one
    fails, the others get a second to leave, then SIGTERM, and after another second SIGKILL.

    Args:
        fn: Called in each worker, with its rank in front.
        args: The other arguments. Under spawn and forkserver they are sent as the arguments of a `forkshm.Process`.
        workers: How many; by default the cores that this process may use.
        join: Wait here. Otherwise the caller calls `Launch.join`.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; by default what `forkshm.set_start_method` says.

    Returns:
        The workers: with *join*, all have ended well.

    Raises:
        ValueError: *workers* is less than 1, or there is no such start method.
        WorkerStartError: The kernel refused a process. Those that were started are ended.
        WorkerDiedError: A worker was killed or ended with an exit code; its ``rank`` says which.
        Exception: What a worker raised, with rank and traceback of the worker in its ``__cause__``. When several
            fail, it is the first.

    Fork and threads:
        Workers end with this process, whatever ends it, and ignore Ctrl-C, which is this process' matter. Forked ones
        have the thread that called, and none of the others.

    Example:
        >>> import forkshm
        >>> totals = forkshm.zeros(3)
        >>> def work(rank, base):
        ...     totals[rank] = base + rank
        >>> _ = forkshm.launch(work, (10,), workers=3)
        >>> totals.tolist()
        [10.0, 11.0, 12.0]

    See Also:
        ``torch.multiprocessing.spawn``.
    """
    if workers is None:
        workers = kernel.default_workers()
    if operator.index(workers) < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not callable(fn):
        raise TypeError(f"fn must be a callable, got {fn!r}")
    context = _multiprocess.default_context.get_context(start_method)
    if not _system.CAN_FORK:
        raise UnsupportedError(
            "launched workers meet over memory that grows and wait by futex(2), and this system has neither: use "
            "forkshm.Pool, or forkshm.Process with a Barrier in a region",
            capability="growing_memory",
        )
    launched = Launch(fn, tuple(args), workers, context)
    if join:
        launched.join()
    return launched


@dataclasses.dataclass(frozen=True)
class Birth:
    """What a launched worker is given."""

    team_state: TeamState
    rank: int
    size: int
    answers_in: Sender
    #: Reading end of a pipe whose writing end only the parent has.
    lifeline: int
    fn: Callable[..., object]
    args: tuple[Any, ...]


def reduce_birth(birth: Birth) -> Any:
    """Send it to a process that is not forked from here."""
    fds = (*birth.team_state.fds(), birth.answers_in.fileno(), birth.lifeline)
    return rebuild_birth, (
        birth.rank,
        birth.size,
        [pickle.PickleBuffer(Handle(fd)) for fd in fds],
        birth.fn,
        birth.args,
    )


def rebuild_birth(
    rank: int, size: int, handles: list[ReceivedFd], fn: Callable[..., object], args: tuple[Any, ...]
) -> Birth:
    """Return what arrived."""
    region, overflow, answers_in, lifeline = (handle.take() for handle in handles)
    team_state = TeamState(size, (region, overflow))
    return Birth(team_state, rank, size, Sender(kernel.message_socket(answers_in)), lifeline, fn, args)


register(Birth, reduce_birth)


def run_launched(birth: Birth) -> None:
    """Be a worker; the target of its process."""
    # For as long as the process lives: to close it ends the arrangement.
    _kept.append(PrivateFd(kernel.die_with(birth.lifeline)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _multiprocess.let_have_children()
    if "torch" in sys.modules:
        from forkshm.integrations.torch import settle_worker

        settle_worker()
    team_state, rank = birth.team_state, birth.rank
    known = importable_now()  # what the parent has as well
    team_state.enter(rank)
    become(RankedWorker(team_state, rank, birth.size))
    try:
        birth.fn(rank, *birth.args)
    except SystemExit as leaving:
        if leaving.code is None or leaving.code == 0:
            team_state.end(rank, LEFT)
        raise
    except BaseException as error:
        report(error, rank, team_state, birth.answers_in, known)
        raise SystemExit(1) from None
    else:
        team_state.end(rank, LEFT)


_kept: list[PrivateFd] = []


class Launch:
    """What `forkshm.launch` gives: ranked workers.

    Use it as a context manager, or call `join`. Workers that are there when it is collected are ended.

    Attributes:
        size: How many workers there were.

    Example:
        >>> import forkshm
        >>> with forkshm.launch(print, ("hello",), workers=2, join=False) as launched:
        ...     len(launched.pids) <= 2
        True

    See Also:
        `forkshm.launch`.
    """

    def __init__(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        size: int,
        context: _multiprocess.context.BaseContext,
        task: str | None = None,
        grace: float | None = None,
    ) -> None:
        self.size = size
        task = task or f"{getattr(fn, '__qualname__', type(fn).__name__)}()"
        open_things = contextlib.ExitStack()
        # When it is collected, or at exit. A child that inherits it ends nothing.
        self._finalizer = weakref.finalize(self, _close, os.getpid(), open_things)
        try:
            team_state = TeamState(size)
            open_things.callback(team_state.close)
            self._monitor = TeamMonitor(team_state, f"worker {{}} of {size}", task, grace)
            open_things.callback(self._monitor.close)
            read_end, write_end = kernel.create_lifeline()
            # The kernel kills the workers once the writing end is gone: no child may have it.
            open_things.callback(PrivateFd(write_end).close)
            open_things.callback(kernel.close, read_end)
            for rank in range(size):
                birth = Birth(team_state, rank, size, self._monitor.answers_in, read_end, fn, args)
                process = context.Process(target=run_launched, args=(birth,), name=f"worker {rank}", daemon=True)  # type: ignore[attr-defined]
                process.ignores_interrupts = True
                with _interrupts.held_back():
                    process.start()
                    # Under spawn the object would keep what it was given.
                    process._args = ()
                    self._monitor.add(rank, process.pid, functools.partial(_exit_code, process), process.sentinel)
        except BaseException as error:
            self._finalizer()
            if isinstance(error, OSError):
                raise WorkerStartError(
                    error.errno or 0,
                    f"cannot start {size} workers {_system.why_refused(error)}",
                ) from error
            raise

    def __repr__(self) -> str:
        return f"<Launch of {self.size} workers, {len(self.pids)} running>"

    @property
    def pids(self) -> dict[int, int]:
        """The process id of each rank that is still there, as far as `join` has looked."""
        return self._monitor.pids()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all workers have ended.

        Args:
            timeout: Seconds; None waits for ever, 0 only looks.

        Returns:
            Whether all have ended well. False only after *timeout*.

        Raises:
            WorkerDiedError: As for `launch`, as are other exceptions; once, and then none is left.
        """
        try:
            if not self._monitor.wait(timeout):
                return False
            failures = self._monitor.failures()
        except BaseException:
            self._finalizer()
            raise
        self._finalizer()
        if failures:
            raise failures[0]
        return True

    def signal(self, number: int) -> None:
        """Send a signal to all workers that are still there."""
        self._monitor.pass_on(number)

    def terminate(self) -> None:
        """End the workers that are still there, by SIGKILL. Twice is allowed."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.join()
        else:
            self.terminate()


def _exit_code(process: Any) -> int | None:
    return _multiprocess.exit_code(process, kernel.COLLECT_SECONDS)


def _close(owner: int, open_things: contextlib.ExitStack) -> None:
    if os.getpid() == owner:
        open_things.close()
