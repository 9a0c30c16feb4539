"""Run the suites of multiprocess and of CPython unchanged and with forkshm, and print a table of the results.

CPython's suite is run with multiprocess as well, because forkshm is built on it, and it fails some tests itself.

    python tests/upstream/report.py                           this Python, both suites: half an hour
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
    """Return how many tests passed, were skipped, and failed."""
    outcomes = [what for what, _ in became.values()]
    return ", ".join(str(outcomes.count(what)) for what in ("passed", "skipped", "failed"))


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

    program = (
        "import sys, sysconfig; print(sys.version.split()[0] + 't' * bool(sysconfig.get_config_var('Py_GIL_DISABLED')))"
    )
    said = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    return said.strip()


def report(python, suite, method, jobs):
    """Print the row of a suite; return the known differences, and {test: reason} of the other failures."""
    runs = {whose: _runs.run_suite(python, suite, method, whose, jobs=jobs) for whose in implementations(suite)}
    version = version_of(python)
    if None in runs.values():
        print(f"| {version} | {method} | has no tests installed{' |' * (len(runs) + 1)}", flush=True)
        return [], {}
    known, unknown = compare(runs["theirs"], runs["ours"])
    print(f"| {' | '.join([version, method, *map(count, runs.values()), str(len(known))])} |", flush=True)
    return known, {f"{version} {suite} {method} {test}": why for test, why in unknown.items()}


def implementations(suite):
    """Return the column of each implementation that is tested."""
    columns = {"theirs": f"{suite}, unchanged", "multiprocess": "multiprocess", "ours": "forkshm"}
    if suite == "multiprocess":
        del columns["multiprocess"]
    return columns


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="an interpreter that has forkshm; may be given several times")
    parser.add_argument("--suite", choices=SUITES, action="append")
    parser.add_argument("--method", choices=_runs.METHODS, action="append")
    parser.add_argument("--jobs", type=int, default=2, help="classes that run at the same time")
    options = parser.parse_args()
    bad = {}
    all_known = set()
    for suite in options.suite or SUITES:
        columns = implementations(suite).values()
        print(f"\nSuite of {suite}: passed, skipped, failed\n")
        print(f"| Python | method | {' | '.join(columns)} | known differences |")
        print("| --- " * (len(columns) + 3) + "|", flush=True)
        for python in options.python or [sys.executable]:
            for method in options.method or _runs.METHODS:
                known, unknown = report(python, suite, method, options.jobs)
                all_known.update(known)
                bad.update(unknown)
    for test in sorted(all_known):
        print(f"\n{test}: {REASONS[test]}", end="")
    print()
    for test, why in bad.items():
        print(f"\n==== {test}\n{why}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
