"""The backlog of a queue: items that the kernel had no room for, and the thread that sends them later."""

from __future__ import annotations

import collections
import errno
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.errors import ChannelBrokenError, ChannelClosedError

if TYPE_CHECKING:
    from forkshm.channel._endpoint import Receiver, Sender
    from forkshm.pickler import Payload

__all__ = ("SLICE", "Backlog")

# How long a put waits for a receiver that is about to make room before it starts a backlog.
_PATIENCE_SECONDS = 0.01

SLICE = 0.1
"""Longest sleep of a queue. It bounds the delay when the process that should have sent a wake-up was killed, and
it is how long a killed process's wrong count is believed."""

# Errors that pass once other processes release resources.
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Backlog:
    """The part of a `Queue` that sends later, in the order of the calls, and closes the queue in this process."""

    _writer: Sender
    _reader: Receiver
    _closed: bool
    _cancelled: bool

    def _start_backlog(self) -> None:
        # Payloads that did not fit into the kernel's buffer, each with a list. The list gets an item in the C call that
        # sends the payload, so that an interrupted `_flush` does not send it again.
        self._backlog: collections.deque[tuple[Payload, list[Any]]] = collections.deque()
        # Guards the order in which the backlog is sent, and the two fields below.
        self._lock = _interrupts.Lock()
        self._feeder: threading.Thread | None = None
        self._idle = threading.Condition(self._lock)

    def _note_not_put(self, unfinished: list[int]) -> None:
        """Count an item as done that will not be sent."""
        raise NotImplementedError

    def _give_room(self, place: list[int]) -> None:
        """Release the room that an item was counted for."""
        raise NotImplementedError

    # -- sending later ----------------------------------------------------------------

    def _send_later(self, payload: Payload, sent: list[Any], *, patient: bool) -> None:
        with self._lock:
            if patient and not self._backlog:
                # A process is usually receiving. Then a short wait keeps memory flat, and is cheaper than a thread.
                kernel.wait_writable(self._writer, _PATIENCE_SECONDS)
            self._flush()
            if not self._backlog and self._writer.send(payload.data, payload.fds, wait=False, sent=sent):
                payload.close()
                return
            payload.park()
            # The feeder waits for the lock, and ends if an interrupt comes before the item.
            if self._feeder is None:
                self._start_feeder()
            sent.extend(map(self._backlog.append, ((payload, []),)))

    def _start_feeder(self) -> None:
        feeder = _Feeder(target=self._feed, name="QueueFeederThread", daemon=self._cancelled)
        feeder.start()
        self._feeder = feeder

    def _flush(self) -> int:
        """Send as much of the backlog as there is room for; return the number of items. Needs the lock."""
        sent = 0
        backlog = self._backlog
        while backlog:
            payload, noted = backlog[0]
            try:
                if not noted:
                    self._writer.check("send the rest of a queue")
                    payload.unpark()
                    if not self._writer.send(payload.data, payload.fds, wait=False, sent=noted):
                        return sent
            except ChannelBrokenError:
                # No process can receive any more, so the items are not needed.
                while True:
                    if not backlog:
                        break
                    backlog.popleft()[0].close()
                return sent
            except ChannelClosedError as error:
                # Other code in this process has closed the fd.
                sys.excepthook(type(error), error, error.__traceback__)
                while True:
                    if not backlog:
                        break
                    backlog.popleft()[0].close()
                return sent
            except OSError as error:
                if error.errno in _SCARCE:
                    return sent
                # No caller is waiting for this error, so report it through the exception hook.
                sys.excepthook(type(error), error, error.__traceback__)
                self._note_not_put([1])
                self._give_room([1])
            backlog.popleft()[0].close()
            sent += 1
        return sent

    def _feed(self) -> None:
        main = threading.main_thread()
        while True:
            room = kernel.wait_writable(self._writer, SLICE)
            with self._lock:
                sent = self._flush()
                if not self._backlog:
                    self._end_feeder()
                    return
                if self._cancelled and not threading.current_thread().daemon:
                    # Only a daemon thread does not keep the process from ending.
                    self._start_feeder()
                    return
            if not main.is_alive() and _only_feeders_left(main):
                # This process is ending and receives no more. If no other process can receive, sending then fails.
                self._reader.close()
            if room and not sent:
                time.sleep(SLICE / 10)  # there is room, but no free fds: other processes have to close some

    def _end_feeder(self) -> None:
        self._feeder = None
        if self._closed:
            self._writer.close()
        self._idle.notify_all()

    # -- ending -----------------------------------------------------------------------

    def close(self) -> None:
        """Close the queue in this process. Items already put are still sent. Closing twice is allowed."""
        self._closed = True
        self._reader.close()
        with self._lock:
            if self._feeder is None:
                self._writer.close()

    def join_thread(self) -> None:
        """Wait until every item that this process put is in the kernel's buffer. Call `close` first.

        Raises:
            ValueError: The queue is not closed.
        """
        if not self._closed:
            raise ValueError(f"close {self!r} before join_thread()")
        with self._lock:
            while True:
                if self._feeder is None:
                    break
                self._idle.wait(SLICE)

    def cancel_join_thread(self) -> None:
        """Allow this process to end without sending its backlog, which may then be lost."""
        self._cancelled = True


class _Feeder(threading.Thread):
    """A thread that sends a queue's backlog. It is not a daemon, so the interpreter waits for it."""


def _only_feeders_left(main: threading.Thread) -> bool:
    return all(thread is main or thread.daemon or isinstance(thread, _Feeder) for thread in threading.enumerate())
