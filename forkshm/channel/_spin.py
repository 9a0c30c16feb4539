"""How long to look before sleeping.

Waking a sleeping process on another core takes 60 to 150 us, looking again 1 us. So both
ends of a channel look for a short while. But where others want the cores, looking takes
time from the very process that is waited for, and the scheduler makes up for it with
pauses of milliseconds: there, sleeping at once is ten times faster. No counter of the
system says cheaply which it is, so each end measures: it mostly does what has been
faster of late, and now and then the other.
"""

from __future__ import annotations

from forkshm.backend import kernel

__all__ = ("SPINNERS", "Spin")

_cores = kernel.usable_cores()

#: How many workers of a pool may look at a time: one core is for whom they wait for.
SPINNERS = _cores - 1

_SECONDS = 400e-6
# One in so many waits tries the other way; one in more waits, where the other way was far worse.
_EXPLORE = 16
_EXPLORE_FAR_WORSE = 64
#: How much the last wait counts in the average.
_WEIGHT = 1 / 8
#: Longer waits say nothing about waking up; they count as this.
_CLIP = 2e-3


class Spin:
    """Decides whether one end of a channel spins before it sleeps."""

    __slots__ = ("_average", "_count", "_looks")

    def __init__(self) -> None:
        # The average of sleeping at once, and of spinning first. Begin with spinning.
        self._average = [_SECONDS, 0.0]
        self._count = 0
        self._looks = False

    def begin(self, *, may_look: bool = True) -> float:
        """Begin a wait; return how many seconds to look."""
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
        """End a wait that took so long."""
        average = self._average[self._looks]
        self._average[self._looks] = average + _WEIGHT * (min(seconds, _CLIP) - average)
