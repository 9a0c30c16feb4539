"""Handles in flight: held by their sender until their receiver has fetched them."""

from __future__ import annotations

import array
import atexit
import errno
import itertools
import os
import struct
import sys
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from forkshm import _interrupts
from forkshm.backend.windows import _winapi

if TYPE_CHECKING:
    from collections.abc import Sequence

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

__all__ = ("FAREWELL_SECONDS", "HANDLES", "HEAD", "PLAIN", "WORD", "incoming", "kept", "outgoing", "own_start")

# Bytes that the handles of one message may take.
HANDLES = 64 * 1024

# The head of a message: whether handles are named; the number of bytes; the number of handles; the sender's pid and
# start time; its receipt memory, the index of the receipt, and the signature. The handles and the bytes follow.
PLAIN = struct.Struct("<BxxxI")
HEAD = struct.Struct("<BxxxIIIQQQQ")

WORD = 8
# Maximum number of unreceived messages with handles.
_RECEIPTS = 8192
# How long a process that ends waits for receivers of its messages.
FAREWELL_SECONDS = 10.0


class _End(Protocol):
    """The end of a pipe that handles are sent from."""

    other: int

    def is_alone(self) -> bool:
        """Return whether no process has the other end."""
        ...


class _Posted(NamedTuple):
    signature: int
    handles: list[int]
    # The end that it was sent to, and an end that tells whether a receiver exists.
    to: int
    end: weakref.ref[_End]


class _Outgoing:
    """Handles that were sent but not yet fetched; this process owns them until then."""

    def __init__(self) -> None:
        # Reentrant, because garbage collection may close an end with handles in flight.
        self._lock = _interrupts.RLock()
        self._section = 0
        self._words = 0
        self._posted: dict[int, _Posted] = {}
        self._free = list(range(_RECEIPTS - 1, -1, -1))
        self._signatures = itertools.count(1)

    def post(self, handles: Sequence[int], end: _End, nbytes: int) -> tuple[int, bytes]:
        """Hold handles for their receiver; return the receipt, and the head of a message of *nbytes* bytes."""
        copies: list[int] = []
        try:
            with self._lock:
                self.sweep()
                if not self._section:
                    section, _ = _winapi.create_section(_RECEIPTS * WORD)
                    self._words = _winapi.map_view(section, _winapi.FILE_MAP_WRITE, 0, 0)
                    self._section = section
                for handle in handles:
                    copies.append(_winapi.duplicate(handle))  # noqa: PERF401 - those before it are closed if one fails
                if not self._free or len(copies) * WORD > HANDLES:
                    raise OSError(errno.ETOOMANYREFS, "too many handles are in flight")
                receipt = self._free.pop()
                signature = next(self._signatures)
                self._posted[receipt] = _Posted(signature, copies, end.other, weakref.ref(end))
        except BaseException:
            for copy in copies:
                _winapi.close(copy)
            raise
        head = HEAD.pack(1, nbytes, len(copies), os.getpid(), own_start(), self._section, receipt, signature)
        return receipt, head + array.array("Q", copies).tobytes()

    def cancel(self, receipt: int) -> None:
        """Take back posted handles whose message was not sent."""
        with self._lock:
            posted = self._posted.pop(receipt, None)
            if posted is not None:
                self._forget(receipt, posted)

    def sweep(self) -> int:
        """Close handles that were fetched; return the number of messages that still wait to be."""
        if not self._posted:
            return 0
        with self._lock:
            for receipt, posted in list(self._posted.items()):
                if _winapi.load_long(self._words + receipt * WORD) != posted.signature:
                    continue
                del self._posted[receipt]
                self._forget(receipt, posted)
            return len(self._posted)

    def forget(self, to: int) -> None:
        """Close all handles in flight to an end that no process can receive from."""
        with self._lock:
            for receipt, posted in list(self._posted.items()):
                if posted.to != to:
                    continue
                del self._posted[receipt]
                self._forget(receipt, posted)

    def sign_own(self, receipt: int, signature: int) -> None:
        """Sign a receipt of this process, as a receiver within it does."""
        _winapi.store_long(self._words + receipt * WORD, signature)

    def _forget(self, receipt: int, posted: _Posted) -> None:
        self._free.append(receipt)
        for handle in posted.handles:
            _winapi.close(handle)

    def farewell(self) -> None:
        """Wait, at the end of the program, until all handles that can still be fetched were fetched."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.sweep():
            with self._lock:
                ends = {posted.to: posted.end() for posted in self._posted.values()}
            for to, end in ends.items():
                if end is not None and end.is_alone():
                    self.forget(to)
            if time.monotonic() > deadline:
                warnings.warn(
                    f"{len(self._posted)} messages of process {os.getpid()} were not received within "
                    f"{FAREWELL_SECONDS:g} seconds of its end, and their memory is gone",
                    ResourceWarning,
                    stacklevel=1,
                )
                return
            time.sleep(0.002)


outgoing = _Outgoing()
atexit.register(outgoing.farewell)

_start: list[int] = []


def own_start() -> int:
    """Return the start time of this process."""
    if not _start:
        _start.append(_winapi.process_start(_winapi.SELF))
    return _start[0]


class _Peer(NamedTuple):
    process: int
    # Address of the mapping of its receipts.
    words: int


class _Incoming:
    """The processes that handles were fetched from."""

    def __init__(self) -> None:
        self._lock = _interrupts.RLock()
        self._peers: dict[tuple[int, int], _Peer] = {}

    def fetch(self, head: tuple[Any, ...], handles: Sequence[int]) -> list[int]:
        """Duplicate handles of another process into this one, and sign its receipt.

        Raises:
            OSError: The other process has ended, or does not have these handles.
        """
        _, _, _, pid, start, section, receipt, signature = head
        fetched: list[int] = []
        own = pid == os.getpid() and start == own_start()
        with self._lock:
            peer = None if own else self._peer(pid, start, section)
            source = _winapi.SELF if peer is None else peer.process
            try:
                for handle in handles:
                    fetched.append(_winapi.duplicate(handle, source=source))  # noqa: PERF401 - as above
            except BaseException:
                for handle in fetched:
                    _winapi.close(handle)
                raise
            if receipt < _RECEIPTS:
                if peer is None:
                    outgoing.sign_own(receipt, signature)
                else:
                    _winapi.store_long(peer.words + receipt * WORD, signature)
        return fetched

    def _peer(self, pid: int, start: int, section: int) -> _Peer:
        peer = self._peers.get((pid, start))
        if peer is not None:
            return peer
        for key, old in list(self._peers.items()):
            if _winapi.wait(old.process, 0) == _winapi.WAIT_OBJECT_0:
                del self._peers[key]
                _winapi.unmap_view(old.words)
                _winapi.close(old.process)
        access = _winapi.PROCESS_DUP_HANDLE | _winapi.PROCESS_QUERY | _winapi.SYNCHRONIZE
        process = _winapi.open_process(pid, access)
        try:
            if _winapi.process_start(process) != start:
                raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended, and its id was reused")
            receipts = _winapi.duplicate(section, source=process)
            try:
                if (_winapi.section_size(receipts) or 0) < _RECEIPTS * WORD:
                    raise OSError(errno.EBADMSG, f"process {pid} has no receipt memory there")
                words = _winapi.map_view(receipts, _winapi.FILE_MAP_WRITE, 0, _RECEIPTS * WORD)
            finally:
                _winapi.close(receipts)
        except BaseException:
            _winapi.close(process)
            raise
        peer = self._peers[pid, start] = _Peer(process, words)
        return peer


incoming = _Incoming()


def kept() -> set[int]:
    """Return the handles that stay open for later use: receipt memory, and processes that sent messages."""
    return {outgoing._section} | {peer.process for peer in incoming._peers.values()}
