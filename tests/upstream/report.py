"""Run the suites of multiprocess and of CPython unchanged and with forkshm, and print a table of passed tests.

CPython's suite is run with multiprocess as well, because forkshm is built on it, and it fails some tests itself.

    python tests/upstream/report.py                           this Python, the suite of multiprocess: some minutes
    python tests/upstream/report.py --suite cpython --python /path/to/venv/bin/python --method fork --jobs 4

Exits with 1 if a test that passes unchanged fails with forkshm, and is not a known difference.
"""

from __future__ import annotations

import argparse
import sys

import _runs
from _differences import REASONS
from _suite import SUITES


def count(became):
    """Return the number of tests that passed."""
    return sum(what == "passed" for what, _ in became.values())


def compare(theirs, ours):
    """Return the known differences, and {test: reason} of the other failures."""
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
    # The implementations that are tested besides forkshm.
    others = ["theirs"] if options.suite == "multiprocess" else ["theirs", "multiprocess"]
    names = [options.suite, "multiprocess"][: len(others)]
    columns = " | ".join(f"{name}: passed" for name in [*names, "forkshm"])
    print(f"| Python | method | {columns} | known differences |")
    print("| --- " * (len(others) + 4) + "|")
    for python in options.python or [sys.executable]:
        version = version_of(python)
        for method in options.method or _runs.METHODS:
            runs = {}
            for whose in [*others, "ours"]:
                runs[whose] = _runs.run_suite(python, options.suite, method, whose, jobs=options.jobs)
            if None in runs.values():
                print(f"| {version} | {method} | has no tests installed{' |' * (len(others) + 2)}", flush=True)
                continue
            known, unknown = compare(runs["theirs"], runs["ours"])
            all_known.update(known)
            bad.update({f"{version} {method} {test}": why for test, why in unknown.items()})
            row = [version, method, *(count(became) for became in runs.values()), len(known)]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    for test in sorted(all_known):
        print(f"\n{test}: {REASONS[test]}", end="")
    print()
    for test, why in bad.items():
        print(f"\n==== {test}\n{why}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
