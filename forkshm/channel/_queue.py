"""Queue, JoinableQueue and SimpleQueue: any number of senders and receivers.

The kernel keeps the items, in one socket that all processes share, and counts them, so nothing of this can die
with its holder:

    a put                                                             a get
    pickle -> count + 1 -> is there room in the socket?  -- yes -> [ socket ] -> count - 1 -> unpickle
                                 | no, also not soon                   ^
                                 v                                     |
                           backlog of this process -- feeder thread ---+

Who is killed takes with it what was in its backlog, or the one item that it had received. Both were counted, and
then a bounded queue has less room than it should have. Whoever waits for room notices: it sees the socket empty
and the count unchanged for a while, and sets it right.
"""

from __future__ import annotations

import collections
import errno
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
from forkshm.backend import kernel
from forkshm.channel._connection import Connection, Pipe
from forkshm.channel._endpoint import Receiver, Sender, pair
from forkshm.channel._item import open_item, small_stream, wait_message, wait_ready
from forkshm.channel._spin import Spin
from forkshm.errors import ChannelBrokenError, ChannelClosedError
from forkshm.pickler import Handle, Payload, ReceivedFd, explain, importable_in_children, pack, register
from forkshm.region import anonymous_shared_memory

if TYPE_CHECKING:
    from forkshm._multiprocess import context
    from forkshm.region import MappedRegion

__all__ = ("JoinableQueue", "Queue", "SimpleQueue")

#: What becomes of what cannot be pickled.
OnError = Literal["print", "raise"]
_ON_ERROR = ("print", "raise")

_count = kernel.count
_locks = kernel.locks

#: What the kernel is asked to hold; it gives what net.core.wmem_max allows, 208 KiB mostly.
_SOCKET_BUFFER = 2**20
#: Of a queue whose senders wait for room, however large the items are: some 700 small ones, or 100 MiB.
_SIMPLE_SOCKET_BUFFER = 2**18

#: How long a put waits for a receiver that is about to make room, before it begins a backlog.
_PATIENCE_SECONDS = 0.01

#: Longest sleep of anybody here. It repairs what the kernel cannot: a wake-up that was to come from a process that
#: was killed before. And it is how long the wrong count of a killed process is believed.
_SLICE = 0.1

#: A refusal for want of these passes when others give some back.
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

# Words of the region, each in a cache line of its own, as the number of the word.
_LINE = 64
_ROOM, _ROOM_WANTED, _DONE = 0, 16, 32
_REGION_SIZE = 3 * _LINE


class SimpleQueue:
    """A queue without a limit of its own, and without a thread: `put` waits while the kernel's buffer is full.

    Everybody who has it may put and get: processes forked after it was made, and those it is passed to. Each
    item goes to one of those who get. Items stay when the process that put them ends. The kernel frees the
    queue, with what is in it, when the last process has closed it or ended.

    Args:
        ctx: For code written for ``multiprocessing``; nothing of it is needed.

    Raises:
        OSError: The limit on open files is reached.

    Fork and threads:
        Safe to use from any process and any thread. Whoever is killed, at whatever it was, keeps nobody else
        from going on; it loses at most the item that it had taken.

    Example:
        >>> from forkshm import SimpleQueue
        >>> queue = SimpleQueue()
        >>> queue.put("hello")
        >>> queue.get()
        'hello'
        >>> queue.close()

    See Also:
        `multiprocessing.SimpleQueue`.
    """

    def __init__(self, *, ctx: context.BaseContext | None = None) -> None:
        reader, writer = Pipe(duplex=False, ctx=ctx)
        writer.grow(_SIMPLE_SOCKET_BUFFER)
        self._ready(reader, writer)

    def _ready(self, reader: Connection, writer: Connection) -> None:
        # The names are those of the standard library: its own pools and executors, run over our
        # contexts, use the ends directly, and take the locks, which guard nothing here.
        self._reader, self._writer = reader, writer
        self._rlock, self._wlock = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._reader.closed else f'fd {self._reader.fileno()}'}>"

    def put(self, obj: Any) -> None:
        """Put an object; wait while the kernel's buffer is full, or some 100 MiB of copies are in the queue.

        Raises:
            OSError: This process closed the queue.
            Exception: Whatever pickling *obj* raises.
        """
        self._writer.send(obj)

    def get(self) -> Any:
        """Wait for an item, take it and return it.

        Raises:
            OSError: This process closed the queue.
            Exception: Whatever unpickling raises; the item is used up.
        """
        return self._reader.recv()

    def empty(self) -> bool:
        """Tell whether there is no item now.

        Raises:
            OSError: This process closed the queue.
        """
        return not self._reader.poll()

    def close(self) -> None:
        """Close it in this process; others may go on. Closing twice is allowed."""
        self._writer.close()
        self._reader.close()

    def __reduce__(self) -> Any:
        raise _only_shared(self)


class Queue:
    """A queue for any number of processes, as ``multiprocessing.Queue``.

    Everybody who has it may put and get: processes forked after it was made, and those it is passed to. Each
    item goes to one of those who get, and the items of each thread that puts come in order. Memory that is shared
    crosses as a descriptor, other large buffers are copied once.

    Where it differs from ``multiprocessing``:

    * The object is pickled in `put`: later changes do not show. What cannot be sent is dropped and printed, as there,
      with the part of it that is to blame and the line that put it; or raised, as *on_error* says.
    * An item can be got as soon as `put` has returned, and stays when the process that put it ends.
    * Nobody who is killed keeps others from going on: there is no lock. With it goes the item that it had taken, or
      what it had put and the kernel had no room for.

    No thread is needed while the kernel has room: for some hundreds of small items. Beyond, a thread of this process
    sends the rest when there is room, and ends. A process that ends waits for that, unless
    `cancel_join_thread` was called, or no other process can receive any more.

    Args:
        maxsize: How many items there may be; 0 or less for any number.
        ctx: For code written for ``multiprocessing``; nothing of it is needed.
        on_error: What `put` does with what cannot be pickled, in whichever process: ``"print"`` drops it and goes
            on, as ``multiprocessing`` does, ``"raise"`` raises.

    Raises:
        OSError: The limit on open files is reached.
        ValueError: *on_error* is neither.

    Fork and threads:
        Safe to use from any process and any thread. A child forked meanwhile has the queue, and nothing of what this
        process has yet to send.

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

    def _ready(self, start_method: str | None = None) -> None:
        self._words = self._region.buf.cast("I")
        self._spin = Spin()
        self._importable = importable_in_children(start_method)
        self._closed = False
        self._has_put = False
        self._cancelled = False
        self._empty_since: float | None = None
        self._start_backlog()
        _queues.add(self)

    def _start_backlog(self) -> None:
        # Payloads that did not fit into the kernel's buffer. The list beside a payload gets an item in the C call that
        # sends it, so that an interrupted `_flush` does not send it again.
        self._backlog: collections.deque[tuple[Payload, list[Any]]] = collections.deque()
        # Guards the order in which the backlog is sent; and the two below.
        self._lock = _interrupts.Lock()
        self._feeder: threading.Thread | None = None
        self._idle = threading.Condition(self._lock)

    def _in_child(self) -> None:
        # The backlog is the parent's to send; its lock may be held by a thread that is not here.
        backlog = self._backlog
        self._has_put = False
        self._start_backlog()
        for payload, _ in backlog:
            payload.close()

    def __del__(self) -> None:
        for name in ("_writer", "_reader", "_counters"):
            thing = getattr(self, name, None)
            if thing is not None:
                thing.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._closed else f'fd {self._reader.fileno()}'}>"

    # -- putting ----------------------------------------------------------------------

    @staticmethod
    def _on_queue_feeder_error(e: Exception, obj: Any) -> None:
        # For subclasses, by the name that multiprocessing has.
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
            obj: Anything that can be pickled; what is in shared memory stays there.
            block: Wait for room, if the queue has a *maxsize*.
            timeout: How many seconds to wait for it; None waits forever.

        Raises:
            queue.Full: There was no room.
            ValueError: This process closed the queue.
            OSError: The kernel has no memory or fds for the copies; nothing was put.
            Exception: Whatever pickling *obj* raises, if the queue was made with ``on_error="raise"``; nothing was
                put. Else the hook of ``multiprocessing`` for that, ``_on_queue_feeder_error(error, obj)``, is
                called; a subclass may have its own, and is told of an OSError, too.
        """
        if self._closed:
            raise self._is_closed()
        self._has_put = True
        # Each has an item from the C call that counts, or sends, until the C call that undoes it.
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
        except BaseException:
            if not sent:
                self._undo_put(place, unfinished)
            raise

    def _can_be_packed(self, obj: Any, error: Exception) -> bool:
        """Return whether an object can be pickled after all, so that it was not pickling that raised *error*."""
        if isinstance(error, (OSError, MemoryError)) or threading.current_thread() is not threading.main_thread():
            return False
        try:
            if small_stream(obj) is None:
                pack(obj, importable=self._importable).close()
        except Exception:
            return False
        return True

    def _undo_put(self, place: list[int], unfinished: list[int]) -> None:
        if unfinished:
            self._note_not_put(unfinished)
        if place:
            self._give_room(place)

    def _put_payload(self, payload: Payload, block: bool, sent: list[Any]) -> None:
        try:
            if self._backlog or not self._writer.send(payload.data, payload.fds, wait=False, sent=sent):
                self._send_later(payload, sent, patient=block)
            else:
                payload.close()
        except BaseException:
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
            # The system call below comes between our writing that and looking.
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
            _locks.futex_wait(address + _ROOM * 4, seen, min(left, _SLICE))

    def _count_is_wrong(self) -> bool:
        """Whether the socket has been empty for a while although the count says that it is full."""
        if self._backlog or wait_ready(self._reader, 0.0):
            self._empty_since = None
            return False
        now = time.monotonic()
        if self._empty_since is None:
            self._empty_since = now
            return False
        if now - self._empty_since < _SLICE:
            return False
        self._empty_since = None
        return True

    def _give_room(self, place: list[int]) -> None:
        try:
            _count(self._counters.items, -1, place)
        except OSError as error:
            if error.errno != errno.EINVAL:  # another process took this one for dead, and has set the count right
                raise
            place.clear()
        if self._maxsize and self._words[_ROOM_WANTED]:
            self._words[_ROOM_WANTED] = 0
            _wake(self._words, self._region.address, _ROOM)

    # -- what the kernel has no room for ----------------------------------------------

    def _send_later(self, payload: Payload, sent: list[Any], *, patient: bool) -> None:
        with self._lock:
            if patient and not self._backlog:
                # Somebody is receiving, mostly: then a moment's wait keeps memory flat, and
                # is cheaper than a thread.
                kernel.wait_writable(self._writer, _PATIENCE_SECONDS)
            self._flush()
            if not self._backlog and self._writer.send(payload.data, payload.fds, wait=False, sent=sent):
                payload.close()
                return
            payload.park()
            entry: tuple[Payload, list[Any]] = (payload, [])
            sent.extend(map(self._backlog.append, (entry,)))
            if self._feeder is None:
                try:
                    self._start_feeder()
                except BaseException:
                    next(zip(map(self._backlog.remove, (entry,)), map(sent.pop, (-1,)), strict=False))
                    raise

    def _start_feeder(self) -> None:
        feeder = _Feeder(target=self._feed, name="QueueFeederThread", daemon=self._cancelled)
        feeder.start()
        self._feeder = feeder

    def _flush(self) -> int:
        """Send as much of the backlog as there is room for; return how many. Needs the lock."""
        sent = 0
        backlog = self._backlog
        while backlog:
            payload, noted = backlog[0]
            try:
                if not noted:
                    payload.unpark()
                    if not self._writer.send(payload.data, payload.fds, wait=False, sent=noted):
                        return sent
            except ChannelBrokenError:
                # Nobody can receive any more: nobody misses it.
                while backlog:
                    backlog.popleft()[0].close()
                return sent
            except OSError as error:
                if error.errno in _SCARCE:
                    return sent
                # Nobody is here to be told but whoever reads the log.
                sys.excepthook(type(error), error, error.__traceback__)
                self._note_not_put([1])
                self._give_room([1])
            backlog.popleft()[0].close()
            sent += 1
        return sent

    def _feed(self) -> None:
        main = threading.main_thread()
        while True:
            room = kernel.wait_writable(self._writer, _SLICE)
            with self._lock:
                sent = self._flush()
                if not self._backlog:
                    self._end_feeder()
                    return
                if self._cancelled and not threading.current_thread().daemon:
                    # The process need not wait for us any more, and it does for this thread.
                    self._start_feeder()
                    return
            if not main.is_alive() and _only_feeders_left(main):
                # This process ends, and receives no more. If no other can, sending fails.
                self._reader.close()
            if room and not sent:
                time.sleep(_SLICE / 10)  # room, but not for fds: others have to close some

    def _end_feeder(self) -> None:
        self._feeder = None
        if self._closed:
            self._writer.close()
        self._idle.notify_all()

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
            received = self._reader.take()
        except BlockingIOError:
            if not block:
                raise queue.Empty from None
            try:
                received = wait_message(self._reader, self._spin, timeout)
            except BlockingIOError:
                raise queue.Empty from None
        if received is None:
            raise ChannelBrokenError("nothing more to get: every process has closed the queue for putting")
        place = [1]
        try:
            value = open_item(received)
            self._give_room(place)
        except Exception:
            received.close()
            if place:
                self._give_room(place)
            raise
        except BaseException:
            if received.is_read and place:  # interrupted after that: the item is used up
                self._give_room(place)
            self._reader.put_back(received)
            raise
        return value

    def get_nowait(self) -> Any:
        """Take an item if there is one; as ``get(block=False)``."""
        return self.get(False)

    # -- looking ----------------------------------------------------------------------

    def qsize(self) -> int:
        """Return how many items there are; by the time you look others may have come or gone.

        Raises:
            ValueError: This process closed the queue.
        """
        _opened(self._reader, self)
        size = _count(self._counters.items)
        if not self._backlog and not wait_ready(self._reader, 0.0):
            return 0  # whoever was killed may have been counted
        return min(size, self._maxsize) if self._maxsize else size

    def empty(self) -> bool:
        """Tell whether there is no item now.

        Raises:
            ValueError: This process closed the queue, and had put something. A closed queue into which it never put
                is empty: programs of the standard library, where closing that does nothing, look at it.
        """
        if self._closed and not self._has_put:
            return True
        return not wait_ready(_opened(self._reader, self), 0.0)

    def full(self) -> bool:
        """Tell whether there are *maxsize* items now.

        Raises:
            ValueError: This process closed the queue.
        """
        return 0 < self._maxsize <= self.qsize()

    # -- ending -----------------------------------------------------------------------

    def close(self) -> None:
        """Say that this process puts and gets no more; what it has put is still sent. Closing twice is allowed."""
        self._closed = True
        self._reader.close()
        with self._lock:
            if self._feeder is None:
                self._writer.close()

    def join_thread(self) -> None:
        """Wait until all that this process has put is in the kernel's hands; it must have closed the queue before.

        Raises:
            ValueError: The queue is not closed.
        """
        if not self._closed:
            raise ValueError(f"close {self!r} before join_thread()")
        with self._lock:
            while self._feeder is not None:
                self._idle.wait(_SLICE)

    def cancel_join_thread(self) -> None:
        """Let this process end without waiting for what it has put: that may be lost then."""
        self._cancelled = True

    def _is_closed(self) -> ChannelClosedError:
        return ChannelClosedError(errno.EBADF, f"{self!r} is closed: this process closed the queue")

    def __reduce__(self) -> Any:
        raise _only_shared(self)


_prints = Queue._on_queue_feeder_error


class JoinableQueue(Queue):
    """A `Queue` that knows which items are still being worked on, as ``multiprocessing.JoinableQueue``.

    Whoever got an item calls `task_done` when it is done with it; `join` waits until all are. An item that was
    got by a process that died is never done: wait for your workers too.

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

    def __init__(
        self, maxsize: int = 0, *, ctx: context.BaseContext | None = None, on_error: OnError = "print"
    ) -> None:
        super().__init__(maxsize, ctx=ctx, on_error=on_error)
        self._counters.unfinished = kernel.create_counter(self._region.fileno())

    def _note_put(self, unfinished: list[int]) -> None:
        _count(self._counters.unfinished, 1, unfinished)

    def _note_not_put(self, unfinished: list[int]) -> None:
        self._done(unfinished)

    def task_done(self) -> None:
        """Say that an item that was got is done.

        Raises:
            ValueError: More often than items were put.
        """
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
            seen = self._words[_DONE]
            if not _count(self._counters.unfinished):
                return
            _locks.futex_wait(self._region.address + _DONE * 4, seen, _SLICE)


class _Feeder(threading.Thread):
    """Sends the backlog of a queue. Not a daemon: the interpreter waits for it, in every kind of process."""


def _only_feeders_left(main: threading.Thread) -> bool:
    return all(thread is main or thread.daemon or isinstance(thread, _Feeder) for thread in threading.enumerate())


class _Counters:
    """The fds that count; closed when their queue is collected."""

    def __init__(self, items: int, unfinished: int = -1) -> None:
        self.items = items
        self.unfinished = unfinished

    def close(self, close: Any = kernel.close) -> None:  # at the end of the program the name may be gone
        for fd in (self.items, self.unfinished):
            if fd >= 0:
                close(fd)
        self.items = self.unfinished = -1


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


def _only_shared(what: Queue | SimpleQueue) -> RuntimeError:
    return RuntimeError(
        f"{what!r} can only cross to other processes by fork or through a channel of forkshm: "
        "a plain pickle has no place for its fds"
    )


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def _in_child() -> None:
    for known in list(_queues):
        known._in_child()


_system.register_at_fork(after_in_child=_in_child)


def reduce_simple_queue(what: SimpleQueue) -> Any:
    """Send a queue: it is the same one at the other end."""
    return rebuild_simple_queue, (what._reader, what._writer)


def rebuild_simple_queue(reader: Connection, writer: Connection) -> SimpleQueue:
    """Return the queue that arrived."""
    found = SimpleQueue.__new__(SimpleQueue)
    found._ready(reader, writer)
    return found


def reduce_queue(what: Queue) -> Any:
    """Send a queue: it is the same one at the other end."""
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
    found._counters = _Counters(*[counter.take() for counter in counters])
    found._ready()
    return found


def _method_of(ctx: context.BaseContext | None) -> str | None:
    return getattr(ctx, "_name", None)


def _handle(end: Sender | Receiver) -> pickle.PickleBuffer:
    return pickle.PickleBuffer(Handle(end.fileno()))


def _take_ends(what: Queue, writer: ReceivedFd, reader: ReceivedFd) -> None:
    what._writer = Sender(kernel.message_socket(writer.take()))
    what._reader = Receiver(kernel.message_socket(reader.take()))


register(SimpleQueue, reduce_simple_queue)
register(Queue, reduce_queue)
register(JoinableQueue, reduce_queue)
