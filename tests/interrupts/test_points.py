"""Every scenario, interrupted at a spread of points by default, and at every point with ``-m nightly``."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import all as program
import test_owners
from scenarios import SCENARIOS
from signals import storm

from forkshm.backend import IS_FREE_THREADED

# Number of points that are tested by default.
FEW = 6
# These take longer and are left to the nightly run.
SLOW = {
    "Team",
    "StartTerminate",
    "StartClose",
    "ExecutorFirstCall",
    "Processes",
    "Close",
    "Terminate",
    "SuperviseReplaces",
    "Cluster",
    "ClusterShutdown",
}


def _tell(bad):
    return "\n".join(f"{at} {where}: {problem}" for at, where, problem in bad)


@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - SLOW))
def test_spread(name):
    # One variant of each scenario; the nightly run has all.
    variant = program.VARIANTS[sorted(SCENARIOS).index(name) % len(program.VARIANTS)]
    first = 7 + 5 * program.VARIANTS.index(variant)
    total, _, bad = program.run(name, variant, step=97, first=first, last=first + 97 * FEW)
    assert total, "nothing was interrupted"
    assert not bad, _tell(bad)


def test_a_child_that_hangs_ends_with_its_trial():
    code = "import os, time; print('made', flush=True); os.fork() or time.sleep(1000); os._exit(3)"
    assert program.run_alone([sys.executable, "-c", code], os.environ) == ("made\n", "", 3)


@pytest.mark.skipif(not IS_FREE_THREADED, reason="test_owners.py is run as it is")
@pytest.mark.parametrize("test", [name for name in dir(test_owners) if name.startswith("test_")])
def test_owners_in_a_process_of_its_own(test):
    """Code that was traced stays marked, and then makes each thread that runs it stop all others, once.

    A process that another thread forks at that moment hangs: it inherits a lock of CPython that nobody releases.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{test_owners.__file__}::{test}"]
    out, errors, status = program.run_alone(command, {**environment, test_owners.ALONE: "1"})
    assert status == 0, out + errors


# Where a second exception comes while the first one is handled: its class, the points of the first, and how many points
# later.
TWICE = [
    ("PoolMap", "exception", 101, 146, 1),
    ("PoolApplyAsync", "exception", 61, 81, 6),
    ("ExecutorSubmit", "exception", 41, 71, 2),
    ("RegionLocks", "exception", 97, 120, 3),
    ("ClassicLocks", "exception", 41, 51, 2),
    ("ClassicLocks", "exception", 203, 217, 1),
    ("Barriers", "interrupt", 11, 27, 1),
    ("Barriers", "exception", 11, 27, 5),
    ("Queue", "exception", 175, 195, 1),
    ("Pipe", "exception", 170, 190, 1),
    ("JoinablePut", "interrupt", 6, 31, 2),
]


@pytest.mark.parametrize(("name", "variant", "first", "last", "again"), TWICE)
def test_twice(name, variant, first, last, again):
    _, tried, bad = program.run(name, variant, first=first, last=last, again=again)
    # The number of points depends on the version of Python.
    assert tried > (last - first) // 2, "nothing was interrupted"
    assert not bad, _tell(bad)


@pytest.mark.nightly
@pytest.mark.parametrize("variant", program.VARIANTS)
@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_whole(name, variant):
    total, _, bad = program.run(name, variant)
    assert total, "nothing was interrupted"
    assert not bad, _tell(bad)


@pytest.mark.slow
def test_signals():
    result = storm(seconds=2)
    assert result["interrupts"] > 50
    assert not result["problems"], result
