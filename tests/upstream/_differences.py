"""Known differences between forkshm's results in the upstream tests and the expected ones, with reasons."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Difference:
    """A test that fails with forkshm, in every suite, Python and start method that has it."""

    test: str
    reason: str
    # The suite in which it fails, if the other suite has a different test of that name.
    only: str | None = None
    # The first version of CPython on which it fails.
    since: tuple[int, int] = (3, 11)
    # Whether it passes on a machine that is slow, or fast, enough.
    sometimes: bool = False


KNOWN = [
    Difference(
        "WithProcessesTestPoolWorkerErrors.test_unpickleable_result",
        "expects that a lambda cannot be returned: here it can",
    ),
    Difference(
        "TestStartMethod.test_mixed_startmethod",
        "expects that a queue made for fork is refused by spawn and forkserver: here it crosses",
    ),
    Difference(
        "TestResourceTracker.test_resource_tracker_sigkill",
        "expects that a semaphore finds the resource tracker dead, and warns: forkshm's locks need no tracker",
    ),
    Difference(
        "TestStartMethod.test_get_all_start_methods",
        "expects that fork is not the default: in forkshm it is, on every version",
        only="cpython",
        since=(3, 14),
    ),
    Difference(
        "TestIgnoreEINTR.test_ignore",
        "expects that a large message waits in its sender: here it is in a block, and the process has ended and is, "
        "under forkserver, collected when it is sent a signal",
        sometimes=True,
    ),
    Difference(
        "WithProcessesTestSharedMemory.test_shared_memory_basics",
        "CPython's patches a private function of multiprocessing.shared_memory by that name",
        only="cpython",
    ),
    Difference(
        "WithProcessesTestSharedMemory.test_shared_memory_recreate",
        "CPython's patches a private function of multiprocessing.shared_memory by that name",
        only="cpython",
    ),
]

REASONS = {difference.test: difference.reason for difference in KNOWN}
