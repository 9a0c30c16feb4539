"""launch(): run a function in several ranked processes."""

from __future__ import annotations

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
from forkshm.processes import exit_code, let_have_children
from forkshm.region import OwnedFd
from forkshm.spmd._current import RankedWorker, become
from forkshm.spmd._monitor import TeamMonitor, report, wait_gone
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
    """Run ``fn(rank, *args)`` in several processes, with ranks from 0, and wait until all have ended.

    In these processes, `forkshm.worker` returns the rank, the barrier and the shared arrays. When a worker fails, the
    others get one second to finish, then SIGTERM, and SIGKILL after another second.

    Args:
        fn: Called in each worker, with its rank as the first argument.
        args: Further arguments. Under spawn and forkserver they are sent like the arguments of a `forkshm.Process`.
        workers: Number of workers; by default the number of cores that this process may use.
        join: Wait for the workers. If false, the caller must call `Launch.join`.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; by default the current start method.

    Returns:
        The workers. With *join*, all of them have succeeded.

    Raises:
        ValueError: *workers* is less than 1, or *start_method* is unknown.
        WorkerStartError: The kernel refused a process. Workers that were already started are ended.
        WorkerDiedError: A worker was killed or exited with a nonzero code; ``rank`` identifies it.
        Exception: A worker raised it; ``__cause__`` has the worker's rank and traceback. If several workers fail, the
            first failure is raised.

    Fork and threads:
        Workers end when this process ends, even if it is killed. They ignore Ctrl-C, which this process handles. Forked
        workers have only the calling thread.

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
            "cannot launch workers: they need growing memory and futex(2), which this system lacks. Use forkshm.Pool, "
            "or forkshm.Process with a Barrier in a region.",
            capability="growing_memory",
        )
    launched = Launch(fn, tuple(args), workers, context)
    if join:
        launched.join()
    return launched


@dataclasses.dataclass(frozen=True)
class Birth:
    """The start data of a launched worker."""

    team_state: TeamState
    rank: int
    size: int
    answers_in: Sender
    lifeline: OwnedFd
    """Read end of a pipe whose write end only the parent has."""
    fn: Callable[..., object]
    args: tuple[Any, ...]


def reduce_birth(birth: Birth) -> Any:
    """Reduce the start data for a process that is not forked from this one."""
    fds = (*birth.team_state.fds(), birth.answers_in.fileno(), birth.lifeline.fd)
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
    """Return the received start data."""
    region, overflow, answers_in, lifeline = handles
    team_state = TeamState(size, (region, overflow))
    owned = OwnedFd()
    owned.fd = lifeline.take()
    return Birth(team_state, rank, size, Sender(answers_in.take_socket()), owned, fn, args)


register(Birth, reduce_birth)


def run_launched(birth: Birth) -> None:
    """Run the worker; the target of its process."""
    # Kept until the process ends, because closing this fd would disarm the lifeline.
    _kept.append(PrivateFd(kernel.die_with(birth.lifeline.fd)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    let_have_children()
    if "torch" in sys.modules:
        from forkshm.integrations.torch import settle_worker

        settle_worker()
    team_state, rank = birth.team_state, birth.rank
    known = importable_now()  # modules that the parent can import as well
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
    """Ranked workers, returned by `forkshm.launch`.

    Use it as a context manager, or call `join`. Workers that are still running when it is garbage-collected are killed.

    Attributes:
        size: Number of workers started.

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
        # What to call at the end, in reverse order. Each call can be repeated.
        open_things: list[Callable[[], object]] = []
        self._close = functools.partial(_interrupts.repeat, functools.partial(_close, os.getpid(), open_things))
        # Runs at garbage collection or at exit, and does nothing in a forked child.
        weakref.finalize(self, self._close)
        try:
            team_state = TeamState(size)
            open_things.append(team_state.close)
            self._monitor = TeamMonitor(team_state, f"worker {{}} of {size}", task, grace)
            open_things.append(self._monitor.close)
            # The kernel kills the workers when the write end is closed, so no child may hold it.
            lifeline, write_end = OwnedFd(), PrivateFd()
            open_things.append(write_end.close)
            open_things.append(lifeline.close)
            # No call between the creation of the fds and these stores.
            lifeline.fd, write_end.fd = kernel.create_lifeline()
            lifeline.own()
            write_end.own()
            # Processes that the monitor may not know yet.
            starting: list[Any] = []
            open_things.append(functools.partial(_end, starting))
            for rank in range(size):
                birth = Birth(team_state, rank, size, self._monitor.answers_in, lifeline, fn, args)
                process = context.Process(target=run_launched, args=(birth,), name=f"worker {rank}", daemon=True)  # type: ignore[attr-defined]
                process.ignores_interrupts = True
                starting.append(process)
                with _interrupts.held_back():
                    process.start()
                    # Under spawn the process object would keep its arguments alive.
                    process._args = ()
                    self._monitor.add(rank, process.pid, functools.partial(_exit_code, process), process.sentinel)
                starting.clear()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError) and _interrupts.is_of_kernel(error):
                raise WorkerStartError(
                    error.errno or 0,
                    f"cannot start {size} workers {_system.why_refused(error)}",
                ) from error
            raise

    def __repr__(self) -> str:
        return f"<Launch of {self.size} workers, {len(self.pids)} running>"

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the running workers, keyed by rank, as of the last check by `join`."""
        return self._monitor.pids()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all workers have ended.

        Args:
            timeout: Seconds; None waits forever, 0 only checks.

        Returns:
            True if all workers have succeeded, False if *timeout* has passed.

        Raises:
            WorkerDiedError: A worker was killed or exited with a nonzero code. Like any other exception of a worker
                (see `launch`), it is raised once, after all workers have ended.
        """
        try:
            if not self._monitor.wait(timeout):
                return False
            failures = self._monitor.failures()
        except BaseException:
            self._close()
            raise
        self._close()
        if failures:
            try:
                raise failures[0]
            finally:
                del failures  # no cycle of the exception, its traceback and this frame
        return True

    def signal(self, number: int) -> None:
        """Send a signal to all running workers."""
        self._monitor.pass_on(number)

    def terminate(self) -> None:
        """Kill the running workers with SIGKILL. Can be repeated."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.join()
        else:
            self.terminate()


def _end(starting: list[Any]) -> None:
    """Kill and reap the processes whose start was interrupted."""
    for process in starting:
        if process._popen is not None:
            process.kill()
            wait_gone(process.sentinel)
            _exit_code(process)


def _exit_code(process: Any) -> int | None:
    return exit_code(process, kernel.COLLECT_SECONDS)


def _close(owner: int, open_things: list[Callable[[], object]]) -> None:
    """Close what is open, unless this is a forked child. Can be repeated."""
    if open_things and os.getpid() == owner:
        # It takes longer than the time between two signals of a timer, whose handler may raise.
        with _interrupts.held_back():
            while True:
                if not open_things:
                    break
                open_things[-1]()
                del open_things[-1]
