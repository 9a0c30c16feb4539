"""Handles dead workers: finds the task that a worker held, and answers or repeats it.

A dead worker's slot names its task (see `_status`), with one gap: a worker that died while claiming may have taken a
message without naming it. An *audit* finds that task. It waits until the queue is empty and no worker is claiming. Then
a task that was sent, is in no slot, and is not answered must be the missing one. It was never begun, so it is sent
again.

Every step can be repeated from its start, because an interrupted call is followed by another one.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm import _system
from forkshm.backend import kernel
from forkshm.errors import (
    NO_MAIN_GUARD,
    ChannelBrokenError,
    DeadlockError,
    MainGuardError,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerStartError,
    about_main_guard,
)
from forkshm.pool._deadlines import TaskDeadlines
from forkshm.pool._oom import OomKills
from forkshm.pool._results import Outcome
from forkshm.pool._status import CLAIMING, FIRST_TASK, LAST_LOOK, STARTING
from forkshm.pool._tasks import CANCELLED
from forkshm.pool._unforkable import WAY_OUT
from forkshm.pool.observe import describe_task, index_of
from forkshm.region.blocks import forget_abandoned

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.pool._tasks import Outstanding, Task
    from forkshm.pool._worker_group import WorkerGroup, WorkerHandle
    from forkshm.pool.observe import Trace

__all__ = ("Deaths",)

# Number of workers that may die in a row before they have finished their initializer.
_FAILED_STARTS = 3
# Number of workers that may die in a row, and the most seconds between two deaths, while no task is answered.
_DEATHS_FOR_NOTHING = 10
_APART_SECONDS = 10.0
# A process stops within microseconds, unless no core is free, or it is in a system call that cannot be interrupted.
_STOPPED_AT_ONCE_SECONDS = 0.001
_STOPPED_WITHIN_SECONDS = 1.0


class _Death(NamedTuple):
    worker: WorkerHandle
    exitcode: int | None
    # Whether it was ended because its task took too long.
    was_overdue: bool


class Deaths:
    """Notices dead workers, answers or repeats their tasks, and starts replacements.

    Args:
        worker_group: The workers.
        tasks: The tasks of the pool.
        task_timeout: Seconds that a task may take.
        fail: Called with the exception if the pool cannot go on.
    """

    def __init__(
        self,
        worker_group: WorkerGroup,
        tasks: Outstanding,
        task_timeout: float | None,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._worker_group = worker_group
        self._tasks = tasks
        self._fail = fail
        # Ends workers whose task takes too long.
        self.deadlines = TaskDeadlines(task_timeout) if task_timeout is not None else None
        self._oom_kills = OomKills()
        # Whether an audit is needed.
        self.audit = False
        # Whether the results channel has delivered a message that is not forkshm's.
        self._is_garbled = False
        # Deaths since the last answer, before and after the initializer finished, and the time of the last one.
        self._failed_starts = 0
        self._deaths_for_nothing = 0
        self._died_at = 0.0
        # Slots whose worker has died and was not replaced yet.
        self._vacant: dict[int, bool] = {}
        # Slots whose worker is being started.
        self._starting: dict[int, bool] = {}
        # Workers whose death was counted.
        self._counted: dict[int, bool] = {}

    def note_answer(self) -> None:
        """Note that a task was answered."""
        self._failed_starts = self._deaths_for_nothing = 0

    def note_garbage(self) -> None:
        """Note that a message came that is not forkshm's, perhaps in place of an answer.

        The kernel does not say which process wrote it. If it came in place of an answer, the audit finds the task that
        is neither waiting nor running.
        """
        if self._tasks.sent:
            self._is_garbled = self.audit = True

    def look(self) -> None:
        """End the workers whose tasks take too long, and complete an interrupted start."""
        if self._worker_group.starts:
            self._worker_group.clean_up()
        if self.deadlines is not None:
            self.deadlines.look(self._worker_group)

    def reap(
        self,
        worker: WorkerHandle,
        take_answers: Callable[[], object],
        take_result_batch: Callable[[bytes], None],
        trace: Trace | None,
    ) -> None:
        """Handle the task of a dead worker, and forget the worker."""
        worker_group = self._worker_group
        # All messages that the worker sent before it died are in the queue by now, and count.
        take_answers()
        last_words = worker_group.last_words(worker)
        if last_words is None:
            return  # a signal handler has reaped it
        state, item = last_words
        # Answers that the worker had collected but not sent.
        take_result_batch(worker_group.status.result_batch(worker.slot).content())
        if trace is not None:
            trace.reaped(worker)
        exitcode = worker_group.exit_code(worker)
        died = _Death(worker, exitcode, was_overdue=self.deadlines is not None and worker in self.deadlines.ended)
        if state >= FIRST_TASK:
            self._end_task(state, item, died)
        elif state in (CLAIMING, LAST_LOOK):
            self.audit = bool(self._tasks.sent)
        if state < FIRST_TASK and worker.pid not in self._counted:
            self._counted[worker.pid] = True
            self._count_for_nothing(died, started=state != STARTING)
        self._vacant[worker.slot] = True
        worker_group.reap(worker)
        self._counted.pop(worker.pid, None)
        if self.deadlines is not None:
            self.deadlines.ended.discard(worker)
        forget_abandoned()

    def replace(self, trace: Trace | None) -> None:
        """Start replacements for dead workers.

        Raises:
            DeadlockError: A signal handler or finalizer waits for the only worker, whose start it interrupted.
        """
        worker_group = self._worker_group
        for slot in list(self._vacant):
            if slot in self._starting:
                if not worker_group.workers:
                    raise DeadlockError(
                        "cannot wait for the pool here: this signal handler or finalizer has interrupted the start of "
                        "its only worker. Call the pool outside of it, or use a pool of more workers."
                    )
                continue
            there = [worker for worker in worker_group.workers if worker.slot == slot]
            if there and worker_group.is_watched(there[0]):  # an earlier start was interrupted
                worker_group.look_at(there[0])
            else:
                for dead in there:  # reaping it was interrupted
                    worker_group.reap(dead)
                try:
                    self._starting[slot] = True
                    worker_group.start(slot)
                except (WorkerStartError, OSError) as error:
                    # The other workers go on. Without any, no task would ever be answered.
                    if not worker_group.workers:
                        self._fail(error)
                else:
                    if trace is not None:
                        trace.born(worker_group.workers[-1])
                finally:
                    self._starting.pop(slot, None)
            self._vacant.pop(slot, None)

    def has_vacancies(self) -> bool:
        """Return whether dead workers must be replaced."""
        return bool(self._vacant)

    def _end_task(self, number: int, item: int | None, died: _Death) -> None:
        """Fail the task of a dead worker, or send it again."""
        tasks = self._tasks
        # The later tasks of the same batch were not begun.
        tasks.send_again([n for n, other in list(tasks.sent.items()) if other.message <= number < n])
        task = tasks.sent.get(number)
        if task is None:
            return
        if task.is_cancelled:
            tasks.answer(number, CANCELLED)
            return
        deaths = task.deaths + 1
        if task.retries and not died.was_overdue:
            task.deaths = deaths
            tasks.send_again([number], after_death=True)
        else:
            tasks.answer(number, Outcome(error=self._why_failed(task, item, died, deaths)))

    def _why_failed(self, task: Task, item: int | None, died: _Death, deaths: int) -> Exception:
        what, index, pid = describe_task(task, item), index_of(task, item), died.worker.pid
        name = died.worker.name
        if died.was_overdue and self.deadlines is not None:
            seconds = self.deadlines.seconds
            hint = ""
            if self._worker_group.suspects:
                used = " and ".join(self._worker_group.suspects)
                hint = f"; the workers were forked after {used} was used, which can make them wait forever. {WAY_OUT}"
            return TaskTimeoutError(
                f"{what} took longer than task_timeout={seconds:g} seconds, so its worker {name} (pid {pid}) was ended"
                f"{hint}",
                task=what,
                index=index,
                seconds=seconds,
                pid=pid,
            )
        return WorkerDiedError(
            pid, died.exitcode, name=name, task=what, index=index, attempts=deaths, hint=self._hint(died)
        )

    def _hint(self, died: _Death) -> str | None:
        return self._oom_kills.hint() if died.exitcode == -_system.SIGKILL else None

    def _count_for_nothing(self, died: _Death, *, started: bool) -> None:
        """Fail the pool if its workers die one after the other without answering a task."""
        worker_group = self._worker_group
        now = time.perf_counter()
        if not started and died.exitcode == NO_MAIN_GUARD:
            main = getattr(sys.modules.get("__main__"), "__file__", None)
            self._fail(MainGuardError(about_main_guard(main or "the main module")))
            return
        if not started:
            self._failed_starts += 1
            if self._failed_starts < max(_FAILED_STARTS, 2 * worker_group.size):
                return
            doing = "its initializer" if worker_group.has_initializer else None
            deaths = self._failed_starts
        else:
            self._deaths_for_nothing = self._deaths_for_nothing + 1 if now - self._died_at < _APART_SECONDS else 1
            self._died_at = now
            deaths = self._deaths_for_nothing
            if deaths < max(_DEATHS_FOR_NOTHING, 4 * worker_group.size):
                return
            doing = None
        hint = f"{deaths} workers in a row ended so, and no more are started"
        if (more := self._hint(died)) is not None:
            hint += f"; {more}"
        self._fail(WorkerDiedError(died.worker.pid, died.exitcode, name=died.worker.name, task=doing, hint=hint))

    def forgive(self) -> None:
        """Reset the count of deaths, because the last one was not the worker's fault."""
        self._deaths_for_nothing = 0

    def resolve_audit(self, take_answers: Callable[[], object]) -> bool:
        """Find the tasks that dead workers took but did not name. Return False while this cannot be decided."""
        worker_group, tasks = self._worker_group, self._tasks
        if worker_group.has_unread_tasks():
            return False
        states = [worker_group.status.state(worker.slot) for worker in worker_group.workers]
        if CLAIMING in states or LAST_LOOK in states:
            return False
        worker_group.tasks.forget_sent()  # missing messages were taken by dead workers
        # A worker that was seen between tasks had sent its answer before.
        take_answers()
        missing = [
            number
            for number, task in list(tasks.sent.items())
            if not any(task.message <= state <= task.last for state in states)
        ]
        if self._is_garbled:  # unknown whether they were begun
            for number in missing:
                task = tasks.sent.get(number)
                if task is not None:
                    what = describe_task(task, None)
                    reason = f"the answer to {what} is lost: a worker wrote foreign bytes into the pool's channel"
                    tasks.answer(number, Outcome(error=ChannelBrokenError(reason)))
        else:
            tasks.send_again(missing)
        self.audit = self._is_garbled = False
        return True

    def end_running(self, wanted: Callable[[int], Any]) -> None:
        """End the workers that run a task whose number is *wanted*, and no others."""
        worker_group = self._worker_group
        for worker in list(worker_group.workers):
            number = worker_group.status.state(worker.slot)
            if number >= FIRST_TASK and wanted(number):
                self._end_at(worker, number)

    def _end_at(self, worker: WorkerHandle, number: int) -> None:
        own: list[int] = []
        try:
            # Another thread may reap the worker, and the number of its sentinel may be used again.
            with contextlib.suppress(OSError):
                own.extend(map(kernel.duplicate, (worker.sentinel,)))
            if own and self._worker_group.is_watched(worker):
                self._stop_and_kill(own[0], worker, number)
        finally:
            kernel.close_all(own)

    def _stop_and_kill(self, sentinel: int, worker: WorkerHandle, number: int) -> None:
        # Stop it before the check, because it may have answered and begun the next task, which must not be killed.
        with contextlib.suppress(ProcessLookupError):
            kernel.signal_process(sentinel, worker.pid, _system.SIGSTOP)
            is_at_it = False
            try:
                is_at_it = _is_stopped(worker.pid) and self._worker_group.status.state(worker.slot) == number
                if is_at_it:
                    kernel.signal_process(sentinel, worker.pid, _system.SIGKILL)
                    self.forgive()
            finally:
                if not is_at_it:
                    kernel.signal_process(sentinel, worker.pid, _system.SIGCONT)


def _is_stopped(pid: int) -> bool:
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _STOPPED_WITHIN_SECONDS:
        if kernel.is_stopped(pid) is not False:  # also if it has ended
            return True
        if waited > _STOPPED_AT_ONCE_SECONDS:
            time.sleep(_STOPPED_AT_ONCE_SECONDS)  # it may need this core
    return False
