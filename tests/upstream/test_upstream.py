"""The suites of multiprocess and CPython, with forkshm in place of the module that they test.

By default the quick classes run, with fork. ``pytest -m nightly tests/upstream`` runs all classes with each start
method.
"""

from __future__ import annotations

import faulthandler
import functools
import sys

import _runs
import pytest
from _differences import KNOWN, REASONS

pytestmark = pytest.mark.slow

QUICK = [
    "TestInitializers",
    "TestSimpleQueue",
    "TestStartMethod",
    "TestSyncManagerTypes",
    "WithManagerTestContainers",
    "WithProcessesTestConnection",
    "WithProcessesTestLock",
    "WithProcessesTestPool",
    "WithProcessesTestPoolWorkerErrors",
    "WithProcessesTestPicklingConnections",
    "WithProcessesTestQueue",
    "WithProcessesTestSubclassingProcess",
    "_TestImportStar",
]


@functools.cache
def classes_of(suite, method):
    return _runs.list_classes(sys.executable, suite, method, "ours")


def check(suite, method, only=()):
    """Run classes of a suite: every failure is a known difference, and every known difference fails."""
    # Each class has a time limit of its own, after which it is ended and fails.
    faulthandler.cancel_dump_traceback_later()
    classes = classes_of(suite, method)
    if classes is None:
        pytest.skip(f"this Python has no tests installed: {suite}")
    became = _runs.run_suite(sys.executable, suite, method, "ours", jobs=2, only=only)
    assert became
    failed = {test: why for test, (what, why) in became.items() if what == "failed"}
    unknown = "".join(f"\n==== {test}\n{why}" for test, why in failed.items() if test not in REASONS)
    assert not unknown
    # A difference that no longer fails must be removed from the list.
    assert [test for test, (what, _) in became.items() if what == "passed" and test in _DIFFER[suite]] == []


_DIFFER = {
    suite: {
        known.test
        for known in KNOWN
        if known.only in (None, suite) and not known.sometimes and sys.version_info >= known.since
    }
    for suite in ("multiprocess", "cpython")
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_quick_classes(name):
    check("multiprocess", "fork", [name])


@pytest.mark.nightly
@pytest.mark.parametrize("method", _runs.METHODS)
@pytest.mark.parametrize("suite", ["multiprocess", "cpython"])
def test_suite(suite, method):
    check(suite, method)


def test_every_difference_has_a_reason_and_is_there_once():
    assert len(REASONS) == len(KNOWN)
    assert all(known.reason for known in KNOWN)


def test_a_hang_and_a_death_are_failures():
    name, tests = "WithProcessesTestEvent", ["test_event"]
    hung = _runs.run_class(sys.executable, "multiprocess", "fork", "ours", name, tests, 0.01)
    assert {what for what, _ in hung.values()} == {"failed"}
