"""Decides how long to spin before sleeping.

Waking a sleeping process on another core takes 60 to 150 us; checking again takes 1 us. So both ends of a channel spin
for a short while. If other processes need the cores, spinning takes time from the very process that is waited for. The
scheduler compensates for it with pauses of milliseconds, and sleeping at once is ten times faster. No cheap counter of
the system shows which case it is. So each end measures: it mostly does what has been faster recently, and sometimes
tries the other way.
"""

from __future__ import annotations

from forkshm.backend import kernel

__all__ = ("SPINNERS", "Spin")

_cores = kernel.usable_cores()

SPINNERS = _cores - 1
"""Number of workers of a pool that may spin at a time: one core is left for the process that they wait for."""

_SECONDS = 400e-6
# One in so many waits tries the other way, and fewer do if the other way was far slower.
_EXPLORE = 16
_EXPLORE_FAR_WORSE = 64
# Weight of the last wait in the average.
_WEIGHT = 1 / 8
# Longer waits tell nothing about waking up; they count as this.
_CLIP = 2e-3


class Spin:
    """Decides whether one end of a channel spins before it sleeps."""

    __slots__ = ("_average", "_count", "_looks")

    def __init__(self) -> None:
        # Average times of sleeping at once and of spinning first. Begin with spinning.
        self._average = [_SECONDS, 0.0]
        self._count = 0
        self._looks = False

    def begin(self, *, may_look: bool = True) -> float:
        """Begin a wait, and return how many seconds to spin."""
        self._looks = False
        if not SPINNERS or not may_look:
            return 0.0
        sleeping, looking = self._average
        better, worse = sorted(self._average)
        self._count += 1
        explore = self._count % (_EXPLORE if worse < 2 * better else _EXPLORE_FAR_WORSE) == 0
        self._looks = (looking <= sleeping) != explore
        return _SECONDS if self._looks else 0.0

    def end(self, seconds: float) -> None:
        """End a wait that took so many seconds."""
        average = self._average[self._looks]
        self._average[self._looks] = average + _WEIGHT * (min(seconds, _CLIP) - average)
