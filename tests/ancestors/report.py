"""Run the suites of multiprocess and of CPython unchanged and with forkshm, and print the table of what passed.

    python tests/ancestors/report.py                           this Python, the suite of multiprocess: some minutes
    python tests/ancestors/report.py --suite cpython --python /path/to/venv/bin/python --method fork --jobs 4

Exits with 1 when a test that passes unchanged fails with forkshm, and is no known difference.
"""

from __future__ import annotations

import argparse
import collections
import sys

import _runs
from _differences import REASONS
from _suite import SUITES


def count(became):
    """Return how many tests passed, and how many were skipped."""
    counts = collections.Counter(what for what, _ in became.values())
    return counts["passed"], counts["skipped"]


def compare(theirs, ours):
    """Return the known differences, and {test: why} of those that are not."""
    failed = {test: why for test, (what, why) in ours.items() if what == "failed"}
    known = [test for test in failed if test in REASONS]
    unknown = {
        test: why for test, why in failed.items() if test not in REASONS and theirs.get(test, ["passed"])[0] == "passed"
    }
    return known, unknown


def version_of(python):
    """Return the version of an interpreter."""
    import subprocess

    said = subprocess.run([python, "-V"], capture_output=True, text=True, check=True, timeout=60).stdout
    return said.split()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="an interpreter that has forkshm; may be given several times")
    parser.add_argument("--suite", choices=SUITES, default="multiprocess")
    parser.add_argument("--method", choices=_runs.METHODS, action="append")
    parser.add_argument("--jobs", type=int, default=2, help="classes that run at the same time")
    options = parser.parse_args()
    bad = {}
    all_known = set()
    print(f"| Python | method | {options.suite}: passed | forkshm: passed | known differences |")
    print("| --- | --- | --- | --- | --- |")
    for python in options.python or [sys.executable]:
        version = version_of(python)
        for method in options.method or _runs.METHODS:
            theirs = _runs.run_suite(python, options.suite, method, "theirs", jobs=options.jobs)
            if theirs is None:
                print(f"| {version} | {method} | has no tests installed | | |", flush=True)
                continue
            ours = _runs.run_suite(python, options.suite, method, "ours", jobs=options.jobs)
            known, unknown = compare(theirs, ours)
            all_known.update(known)
            bad.update({f"{version} {method} {test}": why for test, why in unknown.items()})
            row = [version, method, count(theirs)[0], count(ours)[0], len(known)]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    for test in sorted(all_known):
        print(f"\n{test}: {REASONS[test]}", end="")
    print()
    for test, why in bad.items():
        print(f"\n==== {test}\n{why}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
