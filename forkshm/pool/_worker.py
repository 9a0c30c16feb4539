"""The loop of a worker process."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import itertools
import os
import pickle
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.channel import (
    HEADER_SIZE,
    SPINNERS,
    Header,
    Kind,
    Message,
    Received,
    Receiver,
    Sender,
    Spin,
    read_header,
    read_message,
    write_answers,
    write_message,
    write_result,
)
from forkshm.descriptor import is_plain
from forkshm.errors import (
    ChannelBrokenError,
    ForkshmError,
    add_note,
    remote_text,
    without_frames,
)
from forkshm.pickler import (
    Handle,
    ImportableNames,
    Payload,
    ReceivedFd,
    ReceivedPayload,
    begin,
    explain,
    importable_now,
    is_name,
    pack,
    pack_exception,
    plain_pair,
    register,
    tiny_stream,
)
from forkshm.pool import _inner_threads
from forkshm.pool import _worker_state as worker_state
from forkshm.pool._read_only import explain_read_only
from forkshm.pool._status import CLAIMING, IDLE, LAST_LOOK, MARKS, SLOT_WORDS, STARTING, Status
from forkshm.pool.observe import Recorder, WorkerClock
from forkshm.processes import explained_quit, is_followed, let_have_children
from forkshm.region import OwnedFd
from forkshm.region.blocks import EMPTY_SECONDS, KEEP_WARM, arena, is_short

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Assignment", "run_worker")

# Maximum number of functions that a worker keeps, so that each is not unpickled for every task.
_FUNCTIONS_KEPT = 32

# After this time without a task a worker returns the free memory of its arena, except for some that it keeps warm. It
# then checks this often whether memory has become short. The first time it also returns the free memory of its heap.
_IDLE_SECONDS = 1.0
_LOOK_SECONDS = 5.0
# For less memory, waiting with a time limit costs more system calls than it is worth.
_WORTH_LOOKING = 2**20

# Answers of a batch are held back for at most this time, plus the time of the current task.
_COLLECT_NS = 200_000


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The values that a worker is given when it starts."""

    slot: int
    """Its slot in the status region."""
    tasks: Receiver
    results: Sender
    status: Status
    lifeline: OwnedFd
    """Reading end of a pipe whose writing end only the parent has."""
    wakeup: OwnedFd
    """Reading end of a pipe, shared by all workers: each byte wakes one of them."""
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    max_tasks: int | None
    """Number of tasks after which a new process replaces it; None for never."""
    born_shared: bool
    """Whether its new arrays are allocated in its arena."""
    worker_init: Callable[[], object] | None
    """The functions that make its state, and that receive the state when it ends in order."""
    worker_exit: Callable[[Any], object] | None
    cpus: frozenset[int] | None
    """The cores it may use; None for all."""
    inner_threads: tuple[int, bool, dict[str, str]] | None = None
    """The number of threads of BLAS and similar libraries, and whether the pool's caller gave it; None for no limit."""
    importable: ImportableNames | None = None
    """The names of ``__main__`` that parent and worker have; None for the names at the fork."""


def reduce_assignment(assignment: Assignment) -> Any:
    """Send an assignment to a worker that was not forked from this process."""
    ends = (assignment.tasks.fileno(), assignment.results.fileno(), assignment.lifeline.fd, assignment.wakeup.fd)
    return rebuild_assignment, (
        assignment.slot,
        [pickle.PickleBuffer(Handle(fd)) for fd in ends],
        assignment.status,
        assignment.initializer,
        assignment.initargs,
        assignment.max_tasks,
        assignment.born_shared,
        assignment.worker_init,
        assignment.worker_exit,
        assignment.cpus,
        assignment.inner_threads,
    )


def rebuild_assignment(slot: int, fds: list[ReceivedFd], status: Status, *birth: Any) -> Assignment:
    """Return the assignment that arrived."""
    tasks, results = Receiver(fds[0].take_socket()), Sender(fds[1].take_socket())
    lifeline, wakeup = OwnedFd(), OwnedFd()
    lifeline.fd = fds[2].take()
    wakeup.fd = fds[3].take()
    return Assignment(slot, tasks, results, status, lifeline, wakeup, *birth)


register(Assignment, reduce_assignment)


def run_worker(assignment: Assignment) -> None:
    """Run tasks until there are no more; the target of a worker process."""
    kernel.step_back()  # again, because Python was starting since the first call
    armed = OwnedFd(kernel.die_with(assignment.lifeline.fd))
    armed.own()  # a task may close all fds
    assignment.lifeline.close()
    # Ctrl-C reaches the whole process group; the parent decides how to react.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not is_followed():  # otherwise a tool has installed a handler that saves its data
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    let_have_children()
    if assignment.cpus is not None:
        kernel.use_cpus(assignment.cpus)
    if assignment.inner_threads is not None:
        count, is_explicit, by_user = assignment.inner_threads
        _inner_threads.limit(count, is_explicit=is_explicit, by_user=by_user)
    if "torch" in sys.modules:
        from forkshm.integrations.torch import settle_worker

        settle_worker()
    arena.decay.is_off = True  # this loop returns memory whenever it has waited for a while
    _choose_memory(born_shared=assignment.born_shared)
    try:
        _Worker(assignment).run()
    except ChannelBrokenError:
        pass  # the pool is gone, and no process waits for an answer
    finally:
        armed.close()


def _choose_memory(*, born_shared: bool) -> None:
    # Also without *born_shared*, because the thread that forked may be in a block of shared_allocations.
    module = "forkshm.integrations.numpy_memory"
    if born_shared:
        importlib.import_module(module).use_own_blocks()
    elif module in sys.modules:
        sys.modules[module].use_own_memory()


class _Unwanted(BaseException):
    """Raised when the rest of a chunk is cancelled. Never leaves this module."""


# Items that take less time are tiny.
_TINY_NS = 50_000


class _Worker:
    def __init__(self, assignment: Assignment) -> None:
        self._tasks = assignment.tasks
        self._results = assignment.results
        self._words = assignment.status.words
        self._state = SLOT_WORDS * assignment.slot
        self._initializer = assignment.initializer
        self._initargs = assignment.initargs
        self._born = (assignment.worker_init, assignment.worker_exit)
        self._max_tasks = assignment.max_tasks
        # Functions by their payload, and the function with large buffers by its group. The latter holds memory of the
        # parent's arena, so it is dropped when the worker sleeps.
        self._by_payload: collections.OrderedDict[tuple[int, bytes], Any] = collections.OrderedDict()
        self._by_group: dict[int, Any] = {}
        # The names that the parent has as well: all that existed at the fork.
        self._importable = importable_now() if assignment.importable is None else assignment.importable
        self._spin = Spin()
        # Used by this thread only, and never twice at a time.
        self._looks = self._tasks.looker()
        self._result_batch = assignment.status.result_batch(assignment.slot)
        # When the first collected answer was begun; 0 if answers are sent at once.
        self._collecting_since = 0
        self._kept: list[memoryview] = []
        self._marks = assignment.status.marks
        assignment.wakeup.own()
        self._wakeup_end, self._wakeup = assignment.wakeup, assignment.wakeup.fd
        self._clock = WorkerClock(assignment.status.clocks[assignment.slot])
        trace_ring = assignment.status.trace_rings[assignment.slot]
        self._recorder = Recorder(trace_ring)
        # Whether there is a trace, and whether the current message is recorded.
        self._trace_switch = trace_ring.head
        self._traced = False

    def run(self) -> None:
        try:
            if self._initializer is not None:
                self._initializer(*self._initargs)
            worker_state.begin(*self._born, self._note_item)
        except SystemExit:
            raise  # the worker ends; the parent starts another one, and gives up after several
        except BaseException as error:
            self._send_error(Kind.INITIALIZER_FAILED, 0, error)
            raise SystemExit(1) from None
        self._clock.mark = time.perf_counter_ns()
        done = 0
        while self._max_tasks is None or done < self._max_tasks:
            received = self._next()
            if received is None:
                break
            self._answer(received, self._header)
            if self._traced:
                self._recorder.sent()
            del received
            done += 1
        self._clock.write()
        self._words[self._state] = IDLE
        worker_state.leave()

    # -- taking -----------------------------------------------------------------------

    def _next(self) -> Received | None:
        """Wait for a task: spin briefly, because being woken takes 60 us, then sleep."""
        words, state, tasks = self._words, self._state, self._tasks
        words[state] = CLAIMING
        # One core is for the process that fills the queue, and a starting worker needs another.
        states = words[::SLOT_WORDS].tolist()
        may_look = states.count(CLAIMING) <= SPINNERS and STARTING not in states
        clock = self._clock
        began = time.perf_counter_ns()
        spin_until = began + int(self._spin.begin(may_look=may_look) * 1e9)
        clock.transfer += began - clock.mark
        clock.mark = began
        looks = self._looks
        while True:
            if words[state] == CLAIMING and time.perf_counter_ns() < spin_until and not looks(0):
                continue
            try:
                received = tasks.receive_nowait()
            except BlockingIOError:
                if words[state] == CLAIMING:
                    if time.perf_counter_ns() >= spin_until:
                        words[state] = LAST_LOOK
                    continue
            else:
                if received is not None:
                    waited = time.perf_counter_ns() - began
                    self._spin.end(waited / 1e9)
                    # If the worker dies from here on, this task was the cause.
                    header = self._header = read_header(received.data)
                    number = words[state] = header.number
                    clock.waiting += waited
                    clock.mark = began + waited
                    clock.write()
                    self._traced = self._trace_switch[0] != 0
                    if self._traced:
                        self._recorder.begin(number, began)
                return received
            words[state] = IDLE
            if not self._sleep():
                return None
            words[state] = CLAIMING
            spin_until = 0

    def _sleep(self) -> bool:
        """Wait for the wakeup pipe; return False if no process has its other end."""
        # An idle worker holds no memory of other processes, and after a while none of its own.
        self._by_group.clear()
        self._kept.clear()
        self._clock.write()
        idle = 0.0
        if not self._wakeup_end.is_intact():
            return False  # a task has closed it: the worker is replaced
        while arena.has_excess(_WORTH_LOOKING):
            pause = _IDLE_SECONDS if not idle else _LOOK_SECONDS
            woken = kernel.wait_for_wakeup(self._wakeup, pause)
            if woken is not None:
                return woken
            idle += pause
            if idle == _IDLE_SECONDS + _LOOK_SECONDS:  # once, because it walks the whole heap
                kernel.trim_heap()
            arena.trim(0 if idle >= EMPTY_SECONDS or is_short() else KEEP_WARM)
        return kernel.wait_for_wakeup(self._wakeup) is not False

    # -- doing ------------------------------------------------------------------------

    def _answer(self, received: Received, header: Header) -> None:
        kind, number = header.kind, header.number
        if kind is Kind.WAKE:
            return
        if kind is not Kind.BATCH and self._is_cancelled(number):
            received.close()
            return
        ledger.tasks += 1
        if self._do_plain(received, header):
            return
        try:
            message = read_message(received, header, self._by_group)
            function = self._function(message)
            # In a list, so that the function that takes the object out has the only reference. Memory that a task
            # returns is passed on without a copy if this process has no other reference to it.
            arguments = [_opened(message.payloads, 1)]
            # Regions stay mapped until the next task has arrived, which often names the same ones: mapping 1 GB and
            # touching it takes longer than a small task.
            self._kept = [window for incoming in filter(None, message.payloads) for window in incoming.exporters]
            if self._traced:
                self._recorder.received(sum(incoming.nbytes for incoming in message.payloads[1:] if incoming))
            del message
        except BaseException as error:  # as in `_do`
            _explain_import(error)
            self._send_error(Kind.ERROR, number, error)
            return
        if kind is not Kind.BATCH:
            self._do(kind, number, function, arguments)
            return
        # Each chunk is a task with a number of its own.
        number_of_kind, chunks = arguments.pop()
        batch_kind = Kind(number_of_kind)
        chunks.reverse()
        ledger.tasks += len(chunks) - 1
        self._collecting_since = time.perf_counter_ns()
        try:
            while True:
                if not chunks:
                    break
                self._words[self._state] = number
                if self._is_cancelled(number):
                    chunks.pop()
                else:
                    self._do(batch_kind, number, function, chunks)
                number += 1
                if not (self._traced and chunks):
                    continue
                self._recorder.sent()
                self._recorder.begin(number)
            self._flush()
        finally:
            self._collecting_since = 0

    def _do_plain(self, received: Received, header: Header) -> bool:
        """Run a task whose function is known by name and whose arguments are a plain stream; return False for any
        other.

        This is a fast path of `_answer`, for most small tasks.
        """
        data = received.data
        if header.kind is Kind.BATCH or received.fds or header.payloads != 2:
            return False
        plain = plain_pair(data, HEADER_SIZE)
        if plain is None:
            return False
        start, end, arguments_start = plain
        key = 0, data[start:end]
        function = self._by_payload.get(key, self)
        if function is self:
            return False
        self._by_payload.move_to_end(key)
        try:
            arguments = [pickle.loads(memoryview(data)[arguments_start:])]
        except BaseException as error:  # as in `_do`
            _explain_import(error)
            self._send_error(Kind.ERROR, header.number, error)
            return True
        self._kept.clear()
        if self._traced:
            self._recorder.received(len(data) - arguments_start)
        self._do(header.kind, header.number, function, arguments)
        return True

    def _is_cancelled(self, number: int) -> bool:
        """Return whether a task is cancelled, and report it if so. The slot must name the task already."""
        if self._marks[number % MARKS] != number:
            return False
        self._send(Kind.CANCELLED, number)
        return True

    def _do(self, kind: Kind, number: int, function: Callable[..., Any], pending: list[Any]) -> None:
        """Run the last task of *pending*, which is removed, and send the answer."""
        clock = self._clock
        began = time.perf_counter_ns()
        clock.transfer += began - clock.mark
        arguments = pending.pop()
        if self._traced:
            self._recorder.opened(function)
        try:
            if kind is Kind.CALL:
                args, kwargs = arguments
                value = function(*args, **kwargs)
                del args, kwargs
            else:
                value = self._do_chunk(function, arguments, number, starred=kind is Kind.STARMAP)
        except _Unwanted:
            del arguments
            self._send(Kind.CANCELLED, number)
            return
        # SystemExit, KeyboardInterrupt and the like are caught, too: they belong to the task, and its caller handles
        # them.
        # Ctrl-C does not reach this process, and SIGTERM ends it without an exception.
        except BaseException as error:
            with contextlib.suppress(Exception):  # an error in the user's objects: sending the answer matters more
                explain_read_only(error, function, kind, arguments, self._words[self._state + 1] - 1)
                error = explained_quit(error)
            del arguments
            self._send_error(Kind.ERROR, number, error)
            return
        finally:
            self._words[self._state + 1] = 0
            clock.mark = time.perf_counter_ns()
            clock.busy += clock.mark - began
            clock.tasks += 1
        if self._traced:
            self._recorder.computed()
        del arguments
        if (answer := tiny_stream(value)) is not None:
            self._send_tiny(number, began, answer)
            return
        results = [value]
        del value
        payload = self._packed(kind, number, results)
        if payload is not None:
            self._send_result(number, began, payload)

    def _packed(self, kind: Kind, number: int, results: list[Any]) -> Payload | None:
        """Pickle the single item of *results*, which is removed. If that fails, send the error and return None."""
        value = results.pop()
        kind_of_value = type(value).__name__
        try:
            try:
                packing = begin(value, importable=self._importable)
            except Exception as error:
                names = {"result": value} if kind is Kind.CALL else {f"result {n}": v for n, v in enumerate(value)}
                explain(error, names, self._importable)
                raise
            # Done before the answer is sent, so that the parent can use the memory of the arguments, which is warm, for
            # its next message. Also done before the memory of the result is passed on, so that only the parent uses it.
            del value
            return packing.finish()
        except Exception as error:
            from forkshm.pool._result_not_picklable import ResultNotPicklableError

            refusal = ResultNotPicklableError(kind_of_value, error)
            refusal.__cause__ = error
            self._send_error(Kind.ERROR, number, refusal)
            del refusal  # no cycle of the exception, its traceback and this frame
        except BaseException as error:  # raised by a __reduce__
            self._send_error(Kind.ERROR, number, error)
        return None

    def _send_result(self, number: int, began: int, payload: Payload) -> None:
        """Send a result. Within a batch, hold a small one back briefly to send it with others."""
        ended = time.perf_counter_ns()
        if self._traced:
            self._recorder.packed(len(payload.data) + payload.copied + payload.shared)
        if self._collecting_since:
            start = 0 if payload.fds else is_plain(payload.data, 0)
            if start and self._result_batch.add(number, ended - began, payload.data[start:]):
                if ended - self._collecting_since > _COLLECT_NS:
                    self._flush()
                return
            self._flush()
        try:
            self._send(Kind.RESULT, number, payload, nanoseconds=ended - began)
        except ChannelBrokenError:
            raise
        except OSError as error:  # for example, too many fds in flight
            self._send_error(Kind.ERROR, number, error)

    def _send_tiny(self, number: int, began: int, stream: bytes) -> None:
        """Send the pickle of a tiny answer. Within a batch, hold it back briefly to send it with others."""
        ended = time.perf_counter_ns()
        if self._traced:
            self._recorder.packed(len(stream))
        if not self._collecting_since:
            self._clock.write()  # see `_send`
            self._results.send(write_result(number, stream, ended - began))
            return
        if not self._result_batch.add(number, ended - began, stream):
            self._flush()
            self._result_batch.add(number, ended - began, stream)  # fits: the batch is empty
        if ended - self._collecting_since > _COLLECT_NS:
            self._flush()

    def _flush(self) -> None:
        """Send the collected answers."""
        content = self._result_batch.content()
        if content:
            self._clock.write()
            self._results.send(write_answers(content))
            self._result_batch.clear()
        self._collecting_since = time.perf_counter_ns()

    def _note_item(self, index: int) -> None:
        self._words[self._state + 1] = index + 1

    def _do_chunk(self, function: Callable[..., Any], items: Any, number: int, *, starred: bool) -> list[Any]:
        words, item, marks, mark = self._words, self._state + 1, self._marks, number % MARKS
        if len(items) == 1:  # a fast path
            words[item] = 1
            return [function(*items[0]) if starred else function(items[0])]
        values: list[Any] = []
        append = values.append
        began = time.perf_counter_ns()
        # Number of items between checks whether the rest is cancelled: for tiny items a check takes as long as an item.
        count, block = 0, 1
        rest = iter(items)
        while True:
            before = count
            # Two loops, because a condition for each item takes as long as a tiny item.
            if starred:
                for argument in itertools.islice(rest, block):
                    count += 1
                    words[item] = count
                    append(function(*argument))
            else:
                for argument in itertools.islice(rest, block):
                    count += 1
                    words[item] = count
                    append(function(argument))
            if count - before < block:
                return values
            if marks[mark] == number:
                raise _Unwanted
            if count == 1 and time.perf_counter_ns() - began < _TINY_NS:
                block = 64

    def _function(self, message: Message) -> Any:
        incoming = message.payloads[0]
        if incoming is None:
            return self._by_group[message.group]
        if not incoming.is_inline:
            function = incoming.open()
            if message.group:
                self._by_group.clear()
                self._by_group[message.group] = function
            return function
        stream = incoming.stream_bytes()
        is_by_name = is_name(stream)
        if not is_by_name and not message.group:
            return incoming.open()  # not kept, because its objects may change and the next call needs the original
        functions = self._by_payload
        key = 0 if is_by_name else message.group, stream
        if key in functions:
            functions.move_to_end(key)
            return functions[key]
        function = functions[key] = incoming.open()
        if len(functions) > _FUNCTIONS_KEPT:
            functions.popitem(last=False)
        return function

    # -- answering --------------------------------------------------------------------

    def _send(self, kind: Kind, number: int, *payloads: Payload, nanoseconds: int = 0) -> None:
        # Before the answer, so that its receiver finds the time accounted for.
        self._clock.write()
        try:
            # The header of an answer has its duration in the place of the group.
            self._results.send(*write_message(kind, number, *payloads, group=nanoseconds))
        finally:
            for payload in payloads:
                payload.close()

    def _send_error(self, kind: Kind, number: int, error: BaseException) -> None:
        if self._traced:
            self._recorder.failed()
        text = remote_text(error)
        # The frames of the traceback hold the arguments. The traceback is text now, so release them.
        without_frames(error)
        payload = pack_exception(error, "a task", self._importable)
        del error
        self._send(kind, number, payload, pack(text))


def _opened(payloads: list[ReceivedPayload | None], index: int) -> Any:
    incoming = payloads[index]
    if incoming is None:
        raise ForkshmError(f"payload {index} of a task is missing: please report this")
    return incoming.open()


def _explain_import(error: BaseException) -> None:
    """Add a note to the error of a module that only the sender of a call can import."""
    if isinstance(error, ModuleNotFoundError):
        add_note(
            error,
            f"Worker {os.getpid()} could not import a module that a call refers to. Its sys.path is as it was when the "
            "worker was started: change sys.path before you start the pool, or set PYTHONPATH.",
        )
