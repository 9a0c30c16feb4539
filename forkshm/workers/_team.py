"""team(): a block that several forked processes run."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import select
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.channel import Kind, PrivateFd, Received, pair, read_header, read_message, write_message
from forkshm.errors import (
    ForkshmError,
    NotPicklableError,
    NotUnpicklableError,
    RemoteTraceback,
    TeamBrokenError,
    WorkerDiedError,
    WorkerStartError,
)
from forkshm.pickler import known_now, pack
from forkshm.workers._board import DIED, FAILED, LEFT, Board
from forkshm.workers._member import Member

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from forkshm.pickler import Known, Parcel

__all__ = ("GRACE_SECONDS", "Team", "open_error", "pack_error", "team")

#: How long the others get to leave the block when one has failed, before SIGKILL.
GRACE_SECONDS = 1.0


def team(size: int | None = None) -> Team:
    """Run a block in several processes: ``with forkshm.team(4) as t:``.

    This process forks ``size - 1`` others at the start of the block. All of them run it, each with its `Team.rank`,
    this one with rank 0. They have everything that was there before: arrays of `forkshm.zeros` and other shared memory
    in common, all else as a copy of their own. At the end of the block the others are gone, and this process goes on
    alone; none of them runs what follows the block.

    Args:
        size: How many processes, this one included; by default the cores that this process may use. With 1 nothing
            is forked.

    Returns:
        The team, to be entered once.

    Raises:
        ValueError: *size* is less than 1.
        WorkerStartError: From the ``with``: the kernel refused a process. Nobody has begun the block.
        WorkerDiedError: From the end of the block: a member was killed, or ended without leaving the block.
        TeamBrokenError: A member waits for another that does not come, for example at a barrier.
        Exception: From the end of the block: what a member raised in it, with the member's traceback as its
            ``__cause__``. When several fail, it is the first. The others get a second to leave the block, and are
            killed then; so they are when this process raises in the block, and what it raised goes on.

    Fork and threads:
        The members are forked: they have the thread that entered the block, and none of the others. Start the team
        before other threads, or be sure that these hold no locks meanwhile. A team may be started in a member of
        another, or in a worker of a pool. Members ignore Ctrl-C, which is this process' matter, and end with this
        process, whatever ends it. NumPy's global random generator is in the same state in all members: give each
        its own, ``numpy.random.default_rng([seed, t.rank])``.

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
    if size is None:
        size = len(os.sched_getaffinity(0))
    if operator.index(size) < 1:
        raise ValueError(f"size of a team must be at least 1, got {size}")
    return Team(size)


class Team(Member):
    """What `team` gives: the block's processes, as one of them sees them.

    Attributes:
        rank: Which one this process is: 0 for the one that began the block.
        size: How many there are.

    Example:
        >>> import forkshm
        >>> with forkshm.team(2) as t:
        ...     ranks = t.reduce([t.rank])
        >>> ranks
        [0, 1]

    See Also:
        `forkshm.team`.
    """

    def __init__(self, size: int) -> None:
        self._join(None, 0, size)
        self._used = False
        #: Of each other member, in rank 0 only: its process id, and its pidfd.
        self._others: dict[int, tuple[int, int]] = {}
        self._received: list[tuple[int, Received]] = []
        self._deaths: list[WorkerDiedError] = []
        self._deadline = math.inf
        self._killed = False
        self._open = contextlib.ExitStack()

    def __repr__(self) -> str:
        return f"<Team of {self.size}, member {self.rank}>"

    def __enter__(self) -> Self:
        if self._used:
            raise ForkshmError("a team is used once: make a new one with forkshm.team()")
        self._used = True
        self._pid = os.getpid()
        self._board = Board(self.size)
        self._open.callback(self._board.close)
        try:
            self._open_channels()
            self._board.enter(0)
            _flush()
            for rank in range(1, self.size):
                if self._fork(rank):
                    return self
        except BaseException as error:
            self._end()
            if isinstance(error, OSError):
                raise WorkerStartError(
                    error.errno or 0,
                    f"cannot start a team of {self.size} ({error.strerror}): the limit on processes (ulimit -u), "
                    "on open files (ulimit -n) or memory is reached",
                ) from error
            raise
        # Not before: either all begin the block, or nobody.
        self._board.open_gate()
        return self

    def _open_channels(self) -> None:
        self._answers_in, self._answers = pair()
        self._open.callback(self._answers_in.close)
        self._open.callback(self._answers.close)
        read_end, write_end = os.pipe()
        # The kernel kills the members once the writing end is gone: no child may have it.
        self._open.callback(PrivateFd(write_end).close)
        self._open.callback(os.close, read_end)
        self._lifeline = read_end
        self._poll = select.poll()
        self._poll.register(self._answers.fileno(), select.POLLIN)
        self._known = known_now()

    def _fork(self, rank: int) -> bool:
        """Start a member; true in that member, once the block is to begin."""
        # No signal handler of Python's may raise between the fork and the block.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._begin(rank, mask)
                return True
            self._others[rank] = pid, -1
            self._others[rank] = pid, kernel.open_process(pid)
            self._poll.register(self._others[rank][1], select.POLLIN)
        finally:
            if not self.rank:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return False

    def _look_for_dead(self) -> None:
        if self.rank:
            return
        for fd, _ in self._poll.poll(0):
            self._take(fd)

    def _wait_for_others(self) -> None:
        """Wait until all others are gone; once one has failed, for so long as they get then."""
        while self._others:
            left = self._deadline - time.monotonic()
            if left <= 0 and not self._killed:
                self._kill()
            ready = self._poll.poll(None if left == math.inf or self._killed else math.ceil(left * 1000))
            for fd, _ in ready:
                self._take(fd)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._receive()

    def _take(self, fd: int) -> None:
        """Take what is ready: a message, or a member that has ended."""
        if fd == self._answers.fileno():
            with contextlib.suppress(BlockingIOError):
                self._receive()
            return
        for rank, (_, sentinel) in self._others.items():
            if sentinel == fd:
                self._bury(rank)
                return

    def _receive(self) -> None:
        received = self._answers.receive_nowait()
        if received is not None:
            self._received.append((read_header(received.data)[1], received))
            self._fail()

    def _bury(self, rank: int) -> None:
        board = self._on_board()
        pid, sentinel = self._others.pop(rank)
        exitcode = None
        # Anything in this process that calls os.wait(), or ignores SIGCHLD, takes exit codes away.
        with contextlib.suppress(ChildProcessError):
            exitcode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if sentinel >= 0:
            self._poll.unregister(sentinel)
            os.close(sentinel)
        state = board.states[rank]
        if state in (LEFT, FAILED):
            return
        board.end(rank, DIED)
        if not self._killed:
            error = WorkerDiedError(pid, exitcode, name=f"member {rank} of a team of {self.size}", task="the block")
            self._deaths.append(error)
            self._fail()

    def _fail(self) -> None:
        """Let the others have no more than so long from now."""
        self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)

    def _kill(self) -> None:
        self._killed = True
        for pid, sentinel in self._others.values():
            with contextlib.suppress(ProcessLookupError):
                if sentinel >= 0:  # a pid may be somebody else's by now
                    signal.pidfd_send_signal(sentinel, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGKILL)

    def _end(self) -> None:
        """Be alone again. The time is bounded: who is still there is killed."""
        self._kill()
        for rank in list(self._others):
            self._bury(rank)
        self._board = None
        self._open.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rank:
            self._leave(error)
        if os.getpid() != self._pid:
            return  # a process that was forked in the block by other means
        try:
            board = self._on_board()
            board.end(0, LEFT if error is None else FAILED)
            if error is not None:
                self._fail()
            self._wait_for_others()
            failures = self._failures()
        finally:
            self._end()
        if not failures:
            return
        first = failures[0]
        if error is None or (isinstance(error, TeamBrokenError) and not isinstance(first, TeamBrokenError)):
            raise first
        if error.__context__ is None:
            error.__context__ = first

    def _failures(self) -> list[BaseException]:
        """What the others failed with, what came of it last."""
        raised = [open_error(received, f"member {rank} of a team of {self.size}") for rank, received in self._received]
        raised.sort(key=lambda error: isinstance(error, TeamBrokenError))
        return [*self._deaths, *raised]

    # -- in the others ------------------------------------------------------------------------

    def _begin(self, rank: int, mask: set[int | signal.Signals]) -> None:
        """Become a member; return when the block is to begin."""
        try:
            self.rank = rank
            self._pid = os.getpid()
            self._armed = PrivateFd(kernel.die_with(self._lifeline))
            for _, sentinel in self._others.values():
                os.close(sentinel)
            self._others.clear()
            self._answers.close()
            # Ctrl-C reaches the whole process group; the process that began decides what it means.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            _multiprocess.settle_child()
            if "torch" in sys.modules:
                from forkshm.integrations.torch import settle_worker

                settle_worker()
            board = self._on_board()
            board.wait_for_gate()
            board.enter(rank)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException as error:
            self._leave(error)

    def _leave(self, error: BaseException | None) -> NoReturn:
        """End this process, which was forked for the block: nothing of what follows is its own."""
        code = 1
        try:
            if os.getpid() != self._pid:
                os._exit(code)  # forked from a member by other means, and came this far
            if error is None:
                try:
                    _multiprocess.end_child()
                except BaseException as raised:
                    error = raised
            board = self._on_board()
            if error is None:
                code = 0
                _flush()
                board.end(self.rank, LEFT)
            else:
                self._report(error, board)
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def _report(self, error: BaseException, board: Board) -> None:
        parcels = pack_error(error, self._known)
        # First the state: who waits for this member is freed, and the one that began comes to receive.
        board.end(self.rank, FAILED)
        self._answers_in.send(*write_message(Kind.ERROR, self.rank, *parcels))
        for parcel in parcels:
            parcel.close()


def pack_error(error: BaseException, known: Known) -> tuple[Parcel, Parcel]:
    """Return parcels of an exception and of its traceback as text."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    error.__traceback__ = None
    try:
        return pack(error, known=known), pack(text)
    except Exception as refusal:
        instead = NotPicklableError(f"a worker raised {error!r}, which cannot be sent: {refusal}")
        return pack(instead), pack(text)


def open_error(received: Received, who: str) -> BaseException:
    """Return the exception in a message, with its traceback as the cause."""
    text = "its traceback did not arrive"
    try:
        arrival, trace = read_message(received).parcels
        if arrival is None or trace is None:
            raise NotUnpicklableError("a message came without its parcels: please report this")
        text = trace.open()
        raised: BaseException = arrival.open()
    except Exception as reason:
        raised = NotUnpicklableError(f"{who} raised an exception that cannot be unpickled here: {reason!r}")
    raised.__cause__ = RemoteTraceback(f"{who} raised:\n{text}")
    return raised


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A stream that is closed, missing or full is not ours to complain about.
        with contextlib.suppress(Exception):
            stream.flush()
