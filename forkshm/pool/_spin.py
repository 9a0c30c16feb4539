"""How long to look before sleeping.

Waking a sleeping process on another core takes some 60 us, looking again 1 us. So both
ends of a channel look for a short while; never where it would take the core away from
the process that is waited for.
"""

from __future__ import annotations

import os

__all__ = ("SPINNERS", "SPIN_SECONDS")

_cores = len(os.sched_getaffinity(0))

#: How long; zero on one core.
SPIN_SECONDS = 100e-6 if _cores > 1 else 0.0

#: How many workers of a pool may look at a time: one core is for whom they wait for.
SPINNERS = _cores - 1
