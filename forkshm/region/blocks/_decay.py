"""The thread that gives free memory of the arena back while the program makes no calls.

Free memory is kept warm for the next call. After some seconds without a call, half of it is given back each second,
down to an amount that is kept for longer pauses. After a minute and a half all of it is given back. When the machine or
the control group is short of memory, all of it is given back at once.

This takes a thread, because a program busy with other work does not call the arena. The thread exists only while the
arena has recently held more than is kept for longer pauses. It is ended before a fork, so that the process has one
thread fewer then, and started again afterwards. Pool workers need no such thread: they give memory back while they
wait.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import time
from typing import Protocol

from forkshm import _system
from forkshm.backend import kernel

__all__ = ("EMPTY_SECONDS", "Decay", "is_short")

PAUSE_SECONDS = 1.0
"""Interval between checks; and the longest interval, while memory in use cannot be given back."""
_LONGEST_PAUSE_SECONDS = 4.0
# Number of checks without an allocation in between before memory is given back.
_IDLE_LOOKS = 2
EMPTY_SECONDS = 90.0
"""After this time without a call, no memory is kept warm."""
# Memory is short when less than this fraction of the machine's total is available.
_SHORT = 0.05
# Maximum time that a fork waits for the thread to end.
_END_SECONDS = 1.0


class _Contents(Protocol):
    @property
    def used_bytes(self) -> int: ...

    @property
    def warm_bytes(self) -> int: ...


class _Arena(Protocol):
    """What the thread needs of the arena."""

    @property
    def allocations(self) -> int: ...

    def statistics(self) -> _Contents: ...

    def trim(self, keep: int) -> None: ...


class Decay:
    """The thread that gives memory back, while there is one.

    Args:
        arena: The arena whose memory is given back.
        floor: Bytes that are always kept warm.
    """

    def __init__(self, arena: _Arena, floor: int) -> None:
        self._arena = arena
        self.floor = floor
        # Whether this process gives memory back by other means.
        self.is_off = False
        self._forget()
        _system.register_at_fork(before=self._pause, after_in_parent=self._go_on, after_in_child=self._forget)

    def _forget(self) -> None:
        self.is_running = False
        self._was_running = False
        self._thread_id = 0
        # Released to end the thread.
        self._gate = _thread.allocate_lock()

    def start(self) -> None:
        """Start the thread, unless it is running."""
        if self.is_running or self.is_off:
            return
        self.is_running = True
        self._thread_id = 0
        gate = _thread.allocate_lock()
        gate.acquire()
        self._gate = gate
        try:
            # Unknown to `threading`, which would join it at exit and show it to the program.
            _thread.start_new_thread(self._run, (gate,))
        except RuntimeError:  # no thread is available: the next allocation tries again
            self.is_running = False

    def _run(self, gate: _thread.LockType) -> None:
        self._thread_id = _thread.get_native_id()
        try:
            arena, seen, idle, pause, at_first = self._arena, -1, 0, PAUSE_SECONDS, 0
            idle_since = time.monotonic()
            while True:
                if gate.acquire(timeout=pause):
                    break
                if arena.allocations == seen:
                    idle += 1
                else:
                    idle, idle_since = 0, time.monotonic()
                seen = arena.allocations
                if is_short() or time.monotonic() - idle_since >= EMPTY_SECONDS:
                    keep = 0
                elif idle < _IDLE_LOOKS:
                    continue
                else:
                    held = arena.statistics()
                    if idle == _IDLE_LOOKS:
                        at_first = held.warm_bytes
                    keep = max(self.floor, at_first >> (idle - _IDLE_LOOKS + 1))
                arena.trim(keep)
                # Memory in use may be released later, without notice.
                if keep == 0 and arena.statistics().used_bytes <= self.floor:
                    break
                pause = PAUSE_SECONDS if keep > self.floor else min(2 * pause, _LONGEST_PAUSE_SECONDS)
        except OSError:  # the kernel cannot give memory back, or has no memory for the request
            pass
        finally:
            if self._gate is gate:
                self.is_running = False

    # -- around a fork ----------------------------------------------------------------

    def _pause(self) -> None:
        self._was_running = self.is_running
        if not self._was_running:
            return
        with contextlib.suppress(RuntimeError):
            self._gate.release()
        deadline = time.monotonic() + _END_SECONDS
        # The thread may not have started yet.
        while self._is_there() and time.monotonic() < deadline:
            time.sleep(0.0001)

    def _is_there(self) -> bool:
        return self._thread_id == 0 or os.path.exists(f"/proc/self/task/{self._thread_id}")

    def _go_on(self) -> None:
        if self._was_running:
            self.start()


def is_short() -> bool:
    """Return whether the machine or a control group of this process has little memory left."""
    try:
        with open("/proc/meminfo") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Mem")}
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return False
    left = kernel.memory_left()
    # A control group reports no total here, so what matters is how near its limit is.
    return available < total * _SHORT or (left is not None and left < min(total * _SHORT, 64 * 2**20))
