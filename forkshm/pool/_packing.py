"""Pickles the arguments of tasks, and counts the time and the bytes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from forkshm import _interrupts
from forkshm._ledger import ledger
from forkshm.errors import ForkshmError
from forkshm.pickler import explain, name_of, pack
from forkshm.pool.observe import names_of_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forkshm.pickler import ImportableNames, Payload
    from forkshm.pool._tasks import Batch, Task
    from forkshm.pool.observe import PoolRecord

__all__ = ("Packing",)


class Packing:
    """Makes the payloads of tasks.

    Args:
        importable: The names of ``__main__`` that the workers have, which are therefore sent by name.
        record: Counts the time and the bytes.
        may_repeat: Whether a task may be sent again. Its memory is then mapped copy-on-write, so that a dead worker's
            writes are not seen.
    """

    def __init__(self, importable: ImportableNames, record: PoolRecord, *, may_repeat: bool) -> None:
        self._importable = importable
        self._record = record
        self._may_repeat = may_repeat

    def pack(self, task: Task) -> None:
        """Make the payload of a task, and that of its function, unless they exist.

        Raises:
            Exception: Whatever pickling raised.
        """
        if task.payload is not None:
            return
        began = time.perf_counter_ns()
        if ledger.watches:
            with task.function.acting("sent to"):
                payload, function = self._payloads(task)
        else:
            payload, function = self._payloads(task)
        task.copied = payload.copied
        took = time.perf_counter_ns() - began
        if (trace := self._record.trace) is not None:
            trace.note("pickling", began, {"function": name_of(task.function.function)})
        copied, shared = (function.copied, function.shared) if task.position == 0 else (0, 0)
        self._record.packed(took, payload.copied + copied, payload.shared + shared)

    def _payloads(self, task: Task) -> tuple[Payload, Payload]:
        function = task.function
        try:
            payload = task.payload = pack(
                function.arguments_of(task),
                for_many=self._may_repeat,
                importable=self._importable,
                repeats=function.repeats,
            )
        except Exception as error:
            explain(error, names_of_arguments(task), self._importable)
            raise
        return payload, function.payload()

    def pack_batch(self, batch: Batch) -> None:
        """Make one payload for several tasks. The first of them holds it. Its bytes are counted once it is sent."""
        first = batch[0]
        began = time.perf_counter_ns()
        with first.function.acting("sent to"):
            first.payload = pack(
                (int(first.kind), [task.function.arguments_of(task) for task in batch]),
                importable=self._importable,
                repeats=first.function.repeats,
            )
        first.copied = first.payload.copied
        self._record.packed(time.perf_counter_ns() - began)

    def is_interrupt(self, batch: Sequence[Task], error: Exception) -> bool:
        """Return whether a signal handler raised *error*, instead of pickling or sending tasks."""
        if threading.current_thread() is not threading.main_thread():
            return False  # no handler runs in other threads
        if isinstance(error, ForkshmError) or _interrupts.is_of_kernel(error):
            return False
        for _ in range(2):  # the handler may raise again meanwhile
            try:
                for task in batch:
                    pack(task.function.arguments_of(task), importable=self._importable).close()
                batch[0].function.payload()
                return True
            except Exception as again:
                if type(again) is not type(error):
                    return False
        return False
