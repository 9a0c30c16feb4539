"""Queue and JoinableQueue, for any number of senders and receivers.

The kernel keeps the items in one socket that all processes share, and counts them. No queue state is lost when a
process dies:

    a put                                                             a get
    pickle -> count + 1 -> is there room in the socket?  -- yes -> [ socket ] -> count - 1 -> unpickle
                                 | no, also not soon                   ^
                                 v                                     |
                           backlog of this process -- feeder thread ---+

A killed process loses its own backlog, or the one item that it had received. Both were counted, so a bounded queue
then has less room than it should. A process that waits for room notices that the socket is empty while the count
stays unchanged, and corrects the count.
"""

from __future__ import annotations

import errno
import itertools
import math
import operator
import pickle
import queue
import sys
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Literal

from forkshm import _interrupts, _system
from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.channel._backlog import SLICE, Backlog
from forkshm.channel._endpoint import UNUSUAL, Receiver, Sender, pair
from forkshm.channel._item import STREAM, open_item, small_stream, wait_message, wait_ready
from forkshm.channel._simple_queue import only_shared
from forkshm.channel._spin import Spin
from forkshm.errors import ChannelBrokenError, ChannelClosedError
from forkshm.pickler import Handle, Payload, ReceivedFd, explain, importable_in_children, pack, register
from forkshm.region import anonymous_shared_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm._multiprocess import context
    from forkshm.channel._endpoint import Received
    from forkshm.region import MappedRegion

__all__ = ("JoinableQueue", "Queue")

# What `put` does with an object that cannot be pickled.
OnError = Literal["print", "raise"]
_ON_ERROR = ("print", "raise")

_count = kernel.count
_locks = kernel.locks
_loads = pickle.loads
# `itertools.starmap(_call, steps)` makes several C calls, and no signal handler runs in between.
_call = operator.call
_NOTHING = object()
_LAST = (-1,)

# Requested buffer size. The kernel grants at most net.core.wmem_max, usually 208 KiB.
_SOCKET_BUFFER = 2**20

# Words of the region, each in a cache line of its own, as the number of the word.
_LINE = 64
_ROOM, _ROOM_WANTED, _DONE = 0, 16, 32
_REGION_SIZE = 3 * _LINE


class Queue(Backlog):
    """Create a queue for any number of processes, as ``multiprocessing.Queue``.

    Every process that has the queue may put and get: processes forked after it was made, and processes that received
    it. Each item goes to one receiver, and the items of each sending thread arrive in order. Shared memory is sent as a
    descriptor; other large buffers are copied once.

    Differences from ``multiprocessing``:

    * The object is pickled in `put`, so later changes have no effect. By default, an object that cannot be pickled is
      dropped and the error printed, with the unpicklable part and the line that put it. See *on_error*.
    * An item can be received as soon as `put` has returned, and stays when the process that put it ends.
    * A killed process never blocks the others, because there is no lock. It loses the item that it had taken, or
      its backlog: the items that it had put and the kernel had no room for.

    No thread is needed while the kernel has room, which is some hundreds of small items. Beyond that, a thread of
    this process sends the rest when there is room, and then ends. A process waits for this thread before it ends,
    unless `cancel_join_thread` was called or no other process can receive any more.

    Args:
        maxsize: Maximum number of items; 0 or less means no limit.
        ctx: Accepted for compatibility with ``multiprocessing`` and not used.
        on_error: What `put` does with an object that cannot be pickled, in every process: ``"print"`` drops it and
            prints the error, as ``multiprocessing`` does; ``"raise"`` raises the error.

    Raises:
        OSError: The limit on open files is reached.
        ValueError: *on_error* is neither ``"print"`` nor ``"raise"``.

    Fork and threads:
        Safe to use from any process and any thread. A forked child has the queue, but not its parent's backlog.

    Example:
        >>> from forkshm import Queue
        >>> queue = Queue()
        >>> queue.put([1, 2, 3])
        >>> queue.get()
        [1, 2, 3]
        >>> queue.close()

    See Also:
        `multiprocessing.Queue`, `queue.Full`, `queue.Empty`.
    """

    def __init__(
        self, maxsize: int = 0, *, ctx: context.BaseContext | None = None, on_error: OnError = "print"
    ) -> None:
        if on_error not in _ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(map(repr, _ON_ERROR))}, got {on_error!r}")
        self._maxsize = max(operator.index(maxsize), 0)
        self._on_error = on_error
        self._writer, self._reader = _new_channel()
        try:
            self._region = anonymous_shared_memory(_REGION_SIZE)
            self._counters = _Counters(kernel.create_counter(self._region.fileno()))
        except BaseException:
            self._writer.close()
            self._reader.close()
            raise
        self._ready(_method_of(ctx))

    # Whether a put counts more than the item.
    _counts_unfinished = False

    def _ready(self, start_method: str | None = None) -> None:
        self._words = self._region.buf.cast("I")
        # The C calls that count an item put and an item taken. None if more than counting is necessary, for example to
        # check the size.
        self._counters.own()
        items = self._counters.items
        is_simple = not self._maxsize
        self._counting_got = kernel.counting(items, -1) if is_simple else None
        self._counting_put = kernel.counting(items, 1) if is_simple and not self._counts_unfinished else None
        self._spin = Spin()
        self._importable = importable_in_children(start_method)
        self._closed = False
        self._has_put = False
        self._cancelled = False
        self._empty_since: float | None = None
        self._start_backlog()
        _queues.add(self)

    def _in_child(self) -> None:
        # The parent sends the backlog, and its lock may be held by a thread that does not exist in this process.
        backlog = self._backlog
        self._has_put = False
        self._start_backlog()
        for payload, _ in backlog:
            payload.close()

    @_interrupts.promptly
    def __del__(self) -> None:
        # The counters close themselves.
        try:
            try:
                self._writer.close()
            finally:
                self._reader.close()
        except AttributeError:  # it was never complete
            pass

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._closed else f'fd {self._reader.fileno()}'}>"

    # -- putting ----------------------------------------------------------------------

    @staticmethod
    def _on_queue_feeder_error(e: Exception, obj: Any) -> None:
        # Named as in multiprocessing, where subclasses override it.
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ and frame.f_back is not None:
            frame = frame.f_back
        print(
            f"A queue drops the {type(obj).__qualname__} that was put in {frame.f_code.co_filename}, line "
            f"{frame.f_lineno}: it cannot be sent. A queue made with on_error='raise' raises this instead:\n"
            + "".join(traceback.format_exception(e)),
            end="",
            file=sys.stderr,
        )

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an object.

        Args:
            obj: Any picklable object; shared memory is passed, not copied.
            block: Wait for room, if the queue has a *maxsize*.
            timeout: How many seconds to wait for room; None waits forever.

        Raises:
            queue.Full: There was no room.
            ValueError: This process closed the queue.
            OSError: The kernel has no memory or fds for the copies; nothing was put.
            Exception: Whatever pickling *obj* raises, if the queue was made with ``on_error="raise"``; nothing was
                put. Otherwise the hook of ``multiprocessing``, ``_on_queue_feeder_error(error, obj)``, is
                called. A subclass may override the hook, and then receives an OSError, too.
        """
        if self._closed:
            raise self._is_closed()
        self._has_put = True
        if self._counting_put is not None and self._put_at_once(obj, self._counting_put):
            return
        # Each list has an item from the C call that counts or sends until the C call that undoes it.
        place: list[int] = []
        unfinished: list[int] = []
        sent: list[Any] = []
        try:
            if _count(self._counters.items, 1, place) > self._maxsize > 0:
                _count(self._counters.items, -1, place)
                self._wait_for_room(block, timeout, place)
            self._note_put(unfinished)
            try:
                stream = small_stream(obj)
                if stream is None:
                    self._put_payload(pack(obj, importable=self._importable), block, sent)
                elif self._backlog or not self._writer.send(stream, wait=False, sent=sent):
                    self._send_later(Payload(stream), sent, patient=block)
            except Exception as error:
                if sent:  # a signal handler has raised
                    raise
                self._undo_put(place, unfinished)
                if self._can_be_packed(obj, error):
                    raise  # a signal handler has raised it
                explain(error, {"obj": obj}, self._importable)
                prints = type(self)._on_queue_feeder_error is _prints
                if self._on_error == "raise" or (prints and isinstance(error, (OSError, MemoryError))):
                    raise
                self._on_queue_feeder_error(error, obj)
        except BaseException as error:
            if not sent:
                self._undo_put(place, unfinished)
            if isinstance(error, OSError):
                self._writer.check("put an item")
            raise

    def _put_at_once(self, obj: Any, counting: tuple[Any, ...]) -> bool:
        """Count and send a small object in one C call; return False, with nothing done, if that is not possible."""
        if self._backlog or ledger.watches or (stream := small_stream(obj)) is None:
            return False
        done: list[Any] = []
        try:
            try:
                done.extend(itertools.starmap(_call, (counting, self._writer.sending(stream))))
                ledger.messages += 1
                return True
            except OSError as error:
                if len(done) == 2 or not _interrupts.is_of_kernel(error):  # a signal handler has raised
                    raise
            if done:
                _count(self._counters.items, -1, done)
            return False
        except BaseException:
            if len(done) == 1:  # counted, and not sent
                _count(self._counters.items, -1, done)
            raise

    def _can_be_packed(self, obj: Any, error: Exception) -> bool:
        """Return whether an object can be pickled after all, so that *error* has another cause."""
        if isinstance(error, (OSError, MemoryError)) or threading.current_thread() is not threading.main_thread():
            return False
        for _ in range(2):  # the handler may raise again meanwhile
            try:
                if small_stream(obj) is None:
                    pack(obj, importable=self._importable).close()
            except Exception as again:
                if type(again) is not type(error):
                    return False
            else:
                return True
        return False

    @_interrupts.promptly
    def _undo_put(self, place: list[int], unfinished: list[int]) -> None:
        try:
            if unfinished:
                self._note_not_put(unfinished)
            if place:
                self._give_room(place)
        except BaseException as error:
            # A signal handler has raised. An uncounted item would keep `join` waiting forever.
            if (place or unfinished) and not _interrupts.is_of_kernel(error):
                self._undo_put(place, unfinished)
            raise

    def _put_payload(self, payload: Payload, block: bool, sent: list[Any]) -> None:
        try:
            if self._backlog or not self._writer.send(payload.data, payload.fds, wait=False, sent=sent):
                self._send_later(payload, sent, patient=block)
            else:
                payload.close()
        except BaseException:
            if sent[-1:] != [None]:  # the result of appending it to the backlog
                payload.close()
            raise

    def put_nowait(self, obj: Any) -> None:
        """Put an object if there is room at once; as ``put(obj, block=False)``."""
        self.put(obj, False)

    def _note_put(self, unfinished: list[int]) -> None:
        """Count an item that is about to be put. A queue that can be joined overrides this."""

    def _note_not_put(self, unfinished: list[int]) -> None:
        """Undo `_note_put`."""

    def _wait_for_room(self, block: bool, timeout: float | None, place: list[int]) -> None:
        words, address = self._words, self._region.address
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            seen = words[_ROOM]
            words[_ROOM_WANTED] = 1
            # `_count` is a system call, so the write above becomes visible before the check.
            if _count(self._counters.items, 1, place) <= self._maxsize:
                self._empty_since = None
                return
            _count(self._counters.items, -1, place)
            if self._count_is_wrong():
                kernel.clear_counter(self._counters.items)
                continue
            left = deadline - time.monotonic()
            if not block or left <= 0:
                raise queue.Full
            _locks.futex_wait(address + _ROOM * 4, seen, min(left, SLICE))

    def _count_is_wrong(self) -> bool:
        """Return whether the socket has been empty for a while although the count says that it is full."""
        if self._backlog or wait_ready(self._reader, 0.0):
            self._empty_since = None
            return False
        now = time.monotonic()
        if self._empty_since is None:
            self._empty_since = now
            return False
        if now - self._empty_since < SLICE:
            return False
        self._empty_since = None
        return True

    @_interrupts.promptly
    def _give_room(self, place: list[int]) -> None:
        try:
            _count(self._counters.items, -1, place)
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno != errno.EINVAL:
                if place and not _interrupts.is_of_kernel(error):
                    self._give_room(place)
                raise
            place.clear()  # another process took this one for dead, and has corrected the count
        if self._maxsize and self._words[_ROOM_WANTED]:
            self._words[_ROOM_WANTED] = 0
            _wake(self._words, self._region.address, _ROOM)

    # -- getting ----------------------------------------------------------------------

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take an item and return it.

        Args:
            block: Wait for one.
            timeout: How many seconds to wait; None waits forever.

        Raises:
            queue.Empty: There was none.
            ValueError: This process closed the queue.
            Exception: Whatever unpickling raises; the item is used up.
        """
        if self._closed:
            raise self._is_closed()
        try:
            if self._counting_got is not None and (item := self._get_at_once(self._counting_got)) is not _NOTHING:
                return item
            received = self._reader.take()
        except BlockingIOError as error:
            received = self._wait(error, timeout if block else 0)
        if received is None:
            raise ChannelBrokenError("nothing more to get: every process has closed the queue for putting")
        place = [1]
        done: list[Any] = []  # the object and the new count, if one C call does both
        try:
            if self._counting_got is not None and received.data[0] == STREAM and not received.fds:
                done.extend(itertools.starmap(_call, ((_loads, received.data), self._counting_got)))
                return done[0]
            value = open_item(received)
            self._give_room(place)
        except Exception as error:
            if len(done) == 1 and isinstance(error, OSError) and error.errno == errno.EINVAL:
                return done[0]  # another process took this one for dead, and has corrected the count
            received.close()
            if place and not done:
                self._give_room(place)
            raise
        except BaseException:
            if done:  # the item is put back
                _count(self._counters.items, 1, [])
            elif received.is_read and place:  # interrupted afterwards: the item is used up
                self._give_room(place)
            self._reader.put_back(received)
            raise
        return value

    def _wait(self, nothing: BlockingIOError, timeout: float | None) -> Received | None:
        """Wait for a message after the kernel had *nothing*. If a signal handler has raised that, raise it again."""
        try:
            if timeout == 0 or not _interrupts.is_of_kernel(nothing):
                raise nothing
            return wait_message(self._reader, self._spin, timeout)
        except BlockingIOError as error:
            if not _interrupts.is_of_kernel(error):
                raise
            raise queue.Empty from None

    def _get_at_once(self, counting: tuple[Any, ...]) -> Any:
        """Take a small object, in two C calls; return `_NOTHING`, with nothing done, if that is not possible.

        Raises:
            BlockingIOError: There is no message.
        """
        reader = self._reader
        if reader.inbox or ledger.watches:
            return _NOTHING
        done: list[Any] = []  # the message, the object, and the new count
        is_opening = False
        try:
            done.extend(reader.receiving())
            data, ancillary, flags, _ = done[0]
            if ancillary or flags & UNUSUAL or not data or data[0] != STREAM:
                reader.inbox.extendleft(map(done.pop, _LAST))
                return _NOTHING
            is_opening = True
            done.extend(itertools.starmap(_call, ((_loads, data), counting)))
            ledger.messages += 1
            return done[1]
        except BaseException as error:
            if isinstance(error, OSError):
                if len(done) == 2 and error.errno == errno.EINVAL:
                    return done[1]  # another process took this one for dead, and has corrected the count
                if not done and _interrupts.is_of_kernel(error) and not isinstance(error, BlockingIOError):
                    return _NOTHING  # the general way tells why
            if len(done) == 1 and is_opening:  # it cannot be unpickled
                self._give_room([1])
            elif done:  # a signal handler has raised
                if len(done) == 3:
                    _count(self._counters.items, 1, [])
                reader.inbox.appendleft(done[0])
            raise

    def get_nowait(self) -> Any:
        """Return an item if there is one; same as ``get(block=False)``."""
        return self.get(False)

    # -- looking ----------------------------------------------------------------------

    def qsize(self) -> int:
        """Return the number of items. Others may put or get at any time, so it may be outdated at once.

        Raises:
            ValueError: This process closed the queue.
        """
        _opened(self._reader, self).check("count the items")
        size = _count(self._counters.items)
        if not self._backlog and not wait_ready(self._reader, 0.0):
            return 0  # the count may include items of a killed process
        return min(size, self._maxsize) if self._maxsize else size

    def empty(self) -> bool:
        """Return whether the queue is empty now.

        Raises:
            ValueError: This process closed the queue after putting something. A closed queue that this process never
                put into counts as empty, because programs written for the standard library check that.
        """
        if self._closed and not self._has_put:
            return True
        return not wait_ready(_opened(self._reader, self), 0.0)

    def full(self) -> bool:
        """Return whether the queue holds *maxsize* items now.

        Raises:
            ValueError: This process closed the queue.
        """
        return 0 < self._maxsize <= self.qsize()

    def _is_closed(self) -> ChannelClosedError:
        return ChannelClosedError(errno.EBADF, f"{self!r} is closed: this process closed the queue")

    def __reduce__(self) -> Any:
        raise only_shared(self)


_prints = Queue._on_queue_feeder_error


class JoinableQueue(Queue):
    """Create a `Queue` that counts unfinished items, as ``multiprocessing.JoinableQueue``.

    A receiver calls `task_done` when it has finished an item; `join` waits until all are finished. If a receiver
    dies, its item is never finished, so wait for the workers too.

    Args:
        maxsize: As for `Queue`.
        ctx: As for `Queue`.
        on_error: As for `Queue`.

    Raises:
        OSError: As for `Queue`.
        ValueError: As for `Queue`.

    Example:
        >>> from forkshm import JoinableQueue
        >>> queue = JoinableQueue()
        >>> queue.put("work")
        >>> queue.get()
        'work'
        >>> queue.task_done()
        >>> queue.join()
        >>> queue.close()

    See Also:
        `multiprocessing.JoinableQueue`.
    """

    _counts_unfinished = True

    def __init__(
        self, maxsize: int = 0, *, ctx: context.BaseContext | None = None, on_error: OnError = "print"
    ) -> None:
        super().__init__(maxsize, ctx=ctx, on_error=on_error)
        self._counters.unfinished = kernel.create_counter(self._region.fileno())
        self._counters.own()

    def _note_put(self, unfinished: list[int]) -> None:
        _count(self._counters.unfinished, 1, unfinished)

    def _note_not_put(self, unfinished: list[int]) -> None:
        self._done(unfinished)

    def task_done(self) -> None:
        """Mark an item that was received as done.

        Raises:
            ValueError: It was called more often than items were put.
        """
        self._writer.check("count an item as done")
        self._done([1])

    def _done(self, unfinished: list[int]) -> None:
        try:
            left = _count(self._counters.unfinished, -1, unfinished)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("task_done() called too many times") from None
        if not left:
            _wake(self._words, self._region.address, _DONE)

    def join(self) -> None:
        """Wait until every item that was put is done."""
        while True:
            self._writer.check("wait for all items")
            seen = self._words[_DONE]
            if not _count(self._counters.unfinished):
                return
            _locks.futex_wait(self._region.address + _DONE * 4, seen, SLICE)


class _Counters:
    """The counter fds of a queue; closed when the queue is collected."""

    items = unfinished = -1

    @_interrupts.promptly
    def __init__(self, items: int = -1, unfinished: int = -1) -> None:
        self.items = items
        self.unfinished = unfinished
        # By fd, once it is known what the fd refers to.
        self._closings: dict[int, Iterator[object]] = {}

    def own(self) -> None:
        """Note what the fds refer to, so that nothing else is closed."""
        for fd in (self.items, self.unfinished):
            if fd >= 0 and fd not in self._closings:
                self._closings[fd] = kernel.closing(fd, kernel.file_of(fd))

    # Default arguments, because the names may be gone at the end of the program.
    @_interrupts.promptly
    def __del__(self, close: Any = kernel.close, close_own: Any = kernel.close_own) -> None:
        items, self.items = self.items, -1
        unfinished, self.unfinished = self.unfinished, -1
        closings = self._closings
        try:
            if items in closings:
                close_own(closings[items])
            elif items >= 0:
                close(items)
        finally:
            if unfinished in closings:
                close_own(closings[unfinished])
            elif unfinished >= 0:
                close(unfinished)


def _new_channel() -> tuple[Sender, Receiver]:
    writer, reader = pair()
    writer.grow(_SOCKET_BUFFER)
    return writer, reader


def _opened(reader: Receiver, what: Queue) -> Receiver:
    if reader.fileno() < 0:
        raise ChannelClosedError(errno.EBADF, f"{what!r} is closed: this process closed the queue")
    return reader


def _wake(words: memoryview, address: int, word: int) -> None:
    words[word] = (words[word] + 1) & 0xFFFFFFFF
    _locks.futex_wake(address + 4 * word, 2**31 - 1)


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def _in_child() -> None:
    for known in list(_queues):
        known._in_child()


_system.register_at_fork(after_in_child=_in_child)


def reduce_queue(what: Queue) -> Any:
    """Return what to pickle for a queue; the receiver gets the same queue."""
    _opened(what._reader, what)
    counters = [fd for fd in (what._counters.items, what._counters.unfinished) if fd >= 0]
    handles = [pickle.PickleBuffer(Handle(fd)) for fd in counters]
    return rebuild_queue, (
        type(what),
        what._maxsize,
        what._on_error,
        what._region,
        _handle(what._writer),
        _handle(what._reader),
        handles,
    )


def rebuild_queue(
    kind: type[Queue],
    maxsize: int,
    on_error: OnError,
    region: MappedRegion,
    writer: ReceivedFd,
    reader: ReceivedFd,
    counters: list[ReceivedFd],
) -> Queue:
    """Return the queue that arrived."""
    found = kind.__new__(kind)
    found._maxsize = maxsize
    found._on_error = on_error
    found._region = region
    _take_ends(found, writer, reader)
    found._counters = _Counters()
    found._counters.items = counters[0].take()
    if len(counters) > 1:
        found._counters.unfinished = counters[1].take()
    found._ready()
    return found


def _method_of(ctx: context.BaseContext | None) -> str | None:
    return getattr(ctx, "_name", None)


def _handle(end: Sender | Receiver) -> pickle.PickleBuffer:
    end.check("send this queue")
    return pickle.PickleBuffer(Handle(end.fileno()))


def _take_ends(what: Queue, writer: ReceivedFd, reader: ReceivedFd) -> None:
    what._writer = Sender(writer.take_socket())
    what._reader = Receiver(reader.take_socket())


register(Queue, reduce_queue)
register(JoinableQueue, reduce_queue)
