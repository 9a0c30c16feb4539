"""Gives the free memory of the arena back while nobody calls.

Free memory is kept warm for the next call. When none comes for some seconds, half of it is given back each second, down
to what is kept warm for longer pauses, and after a minute and a half all of it. When the machine, or the control group,
is short of memory, all of it is given back at once.

This takes a thread, because a program that does something else does not come by here. It exists only while the arena
has lately held more than is kept warm for longer pauses. It is ended before a fork, so that the process has one thread
less then, and begins anew after it. Pool workers need none: they give memory back themselves while they wait.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import time
from typing import TYPE_CHECKING

from forkshm import _system
from forkshm.backend import kernel

if TYPE_CHECKING:
    from forkshm.region.blocks._arena import Arena

__all__ = ("EMPTY_SECONDS", "Decay", "is_short")

PAUSE_SECONDS = 1.0
"""Between two looks; and at the most, while what is in use cannot be given back."""
_LONGEST_PAUSE_SECONDS = 4.0
# Looks without an allocation in between before anything is given back.
_IDLE_LOOKS = 2
EMPTY_SECONDS = 90.0
"""After so long without a call nothing is kept warm."""
# Less than this part of the machine's memory is short.
_SHORT = 0.05
# How long a fork waits for the thread to end.
_END_SECONDS = 1.0


class Decay:
    """The thread that gives memory back, when there is one.

    Args:
        arena: Whose memory.
        floor: Bytes that are always kept warm.
    """

    def __init__(self, arena: Arena, floor: int) -> None:
        self._arena = arena
        self.floor = floor
        # Whether this process gives memory back without this.
        self.is_off = False
        self._forget()
        _system.register_at_fork(before=self._pause, after_in_parent=self._go_on, after_in_child=self._forget)

    def _forget(self) -> None:
        self.is_running = False
        self._was_running = False
        self._thread_id = 0
        # Opened to end the thread.
        self._gate = _thread.allocate_lock()

    def start(self) -> None:
        """Start the thread, unless there is one."""
        if self.is_running or self.is_off:
            return
        self.is_running = True
        self._thread_id = 0
        gate = _thread.allocate_lock()
        gate.acquire()
        self._gate = gate
        try:
            # Unknown to `threading`, which would wait for it at exit, or show it to the program.
            _thread.start_new_thread(self._run, (gate,))
        except RuntimeError:  # no thread is to be had: the next allocation tries again
            self.is_running = False

    def _run(self, gate: _thread.LockType) -> None:
        self._thread_id = _thread.get_native_id()
        try:
            arena, seen, idle, pause, at_first = self._arena, -1, 0, PAUSE_SECONDS, 0
            idle_since = time.monotonic()
            while not gate.acquire(timeout=pause):
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
                # What is in use may be dropped later, and nobody tells.
                if keep == 0 and arena.statistics().used_bytes <= self.floor:
                    break
                pause = PAUSE_SECONDS if keep > self.floor else min(2 * pause, _LONGEST_PAUSE_SECONDS)
        except OSError:  # a kernel that cannot give memory back, or has no room to be asked
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
        # It may not have begun.
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
    # A group has no total of its own here: what matters is how near its limit is.
    return available < total * _SHORT or (left is not None and left < min(total * _SHORT, 64 * 2**20))
