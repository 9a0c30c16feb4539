"""Compare the test reports of the backends: tests collected, passed and skipped on each.

    pytest --junitxml=linux.xml
    FORKSHM_BACKEND=posix pytest --junitxml=posix.xml
    tests/windows/run all --junitxml=windows.xml
    python tests/backend/counts.py linux=linux.xml posix=posix.xml windows=windows.xml

A backend may be given several reports. The others are compared with the first backend: a test that passed there must
pass on them, or be skipped for a missing capability named in ``tests/capability_skips.py`` or
``tests/windows/_capabilities.py``. Exits with 1, and lists the exceptions, if a test is not accounted for.
"""

from __future__ import annotations

import argparse
import ast
import collections
import pathlib
import re
import sys
import xml.etree.ElementTree as ET

TESTS = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from capability_skips import FILES, MISSING  # noqa: E402 - tests are no package

# Skip reasons for missing parts of the machine, and the names of these parts.
OF_THE_MACHINE = {
    "could not import": "libraries that the other Python has",
    "uvloop is not installed": "libraries that the other Python has",
    "PyTorch is not installed": "libraries that the other Python has",
    "only root": "another user",
    "needs root": "another user",
    "becomes another user": "another user",
    "gives a file to another user": "another user",
    "the example needs": "libraries that the other Python has",
    "no C": "a compiler",
}

# Tests of other start methods that run with this method where processes are spawned.
SPAWNING = {"windows"}
_METHOD = re.compile(r"(?<=[\[-])(fork|forkserver|spawn)(?=[\]-])")

# Tests that exist for one backend only, with the reason.
OF_ITS_OWN = {"tests.windows.": "windows"}


def outcomes(path):
    """Return the outcome of each test in a report: passed, failed, or the reason for a skip."""
    found = {}
    for case in ET.parse(path).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed"
            elif child.tag == "skipped" and outcome == "passed":
                outcome = child.get("message") or "skipped"
                if said := re.search(r"Skipped: ([^\n]*)", child.text or ""):  # the reason for a whole module
                    outcome = said[1]
        name = f"{case.get('classname')}::{case.get('name')}"
        # An error at the end of a test has a test case of its own.
        if found.get(name) != "failed":
            found[name] = outcome
    return found


def named_capabilities():
    """Return the names of all capabilities whose lack skips tests."""
    tree = ast.parse((TESTS / "windows" / "_capabilities.py").read_text())
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    names = set(ast.literal_eval(assigned["CAPABILITIES"]))
    return names.union(*FILES.values(), *MISSING.values())


NAMED = named_capabilities()


def capability_of(outcome):
    """Return the missing capability for which a test was skipped, or None."""
    found = re.match(r"needs ([\w ]+): ", outcome)
    if found and found[1] in NAMED:
        return found[1]
    return next((called for said, called in OF_THE_MACHINE.items() if outcome.startswith(said)), None)


def as_on_first(mine, first):
    """Give each test of a skipped file that outcome, and each spawned test its name there.

    The first backend knows the names.
    """
    found = {}
    for name, outcome in mine.items():
        module = name.removeprefix("::") if name.startswith("::") else None
        if module is not None:  # the whole file was skipped
            found.update({each: outcome for each in first if each.startswith((f"{module}::", f"{module}."))})
        else:
            found[name] = outcome
    for name in found.keys() - first.keys():
        forked = _METHOD.sub("fork", name)
        if forked in first and forked not in found:
            found[forked] = found.pop(name)
    return found


def is_of_another_method(backend, name, mine):
    """Return whether a test is about a start method that the backend lacks, and runs with another one there."""
    return backend in SPAWNING and any(_METHOD.sub(method, name) in mine for method in ("fork", "spawn"))


def file_left_out(backend, name):
    """Return the missing capability for which the file of a test is not even imported."""
    path = name.partition("::")[0].removeprefix("tests.").replace(".", "/")
    for capability, (_, files) in FILES.get(backend, {}).items():
        for file in files:
            if file.endswith(".py") and f"{path}/".startswith(file.removesuffix(".py") + "/"):
                return capability
    return None


def account(backend, mine, first):
    """Count the outcomes of the tests, and list those that are not accounted for."""
    counts, wrong = collections.Counter(), []
    missing = collections.Counter()
    for name in sorted(mine.keys() | first.keys()):
        own = next((of for start, of in OF_ITS_OWN.items() if name.startswith(start)), None)
        theirs = first.get(name)
        outcome = mine.get(name)
        if outcome is None:
            capability = file_left_out(backend, name)
            if own is not None and own != backend:
                continue
            counts["not collected"] += 1
            if capability is None and is_of_another_method(backend, name, mine):
                capability = "fork context"
            if capability is None:
                wrong.append(f"not collected: {name}")
            else:
                missing[capability] += 1
            continue
        counts["collected"] += 1
        if theirs is None and own is None:
            wrong.append(f"collected on {backend} only: {name}")
        if outcome in ("passed", "failed"):
            counts[outcome] += 1
            if outcome == "failed":
                wrong.append(f"failed: {name}")
            continue
        counts["skipped"] += 1
        capability = capability_of(outcome)
        if capability is not None:
            missing[capability] += 1
        elif theirs == "passed":
            wrong.append(f"skipped for no capability ({outcome}): {name}")
        else:  # skipped on the first backend as well, for a missing tool or lack of room
            missing["(skipped on the first, too)"] += 1
    return counts, missing, wrong


def main():
    """Print a table for each backend; return 1 if a test is not accounted for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="backend=report.xml")
    parser.add_argument("--most", type=int, default=40, help="so much of what is not accounted for is listed (40)")
    options = parser.parse_args()
    results: dict[str, dict[str, str]] = {}
    for argument in options.reports:
        backend, _, path = argument.partition("=")
        results.setdefault(backend, {}).update(outcomes(path))
    first = next(iter(results.values()))
    results = {backend: as_on_first(mine, first) for backend, mine in results.items()}
    print("| backend | collected | passed | skipped | failed | not collected | not accounted for |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    accounts = {backend: account(backend, mine, first) for backend, mine in results.items()}
    for backend, (counts, _, wrong) in accounts.items():
        columns = [counts[each] for each in ("collected", "passed", "skipped", "failed", "not collected")]
        print("|", " | ".join([backend, *(f"{column:,}" for column in (*columns, len(wrong)))]), "|")
    print()
    names = list(accounts)
    print(f"| needs | {' | '.join(names)} |")
    print(f"| --- |{' --- |' * len(names)}")
    for capability in sorted({each for _, missing, _ in accounts.values() for each in missing}):
        print(f"| {capability} | {' | '.join(str(accounts[name][1][capability]) for name in names)} |")
    for backend, (_, _, wrong) in accounts.items():
        for line in wrong[: options.most]:
            print(f"{backend}: {line}")
        if len(wrong) > options.most:
            print(f"{backend}: and {len(wrong) - options.most} more")
    return int(any(wrong for _, _, wrong in accounts.values()))


if __name__ == "__main__":
    sys.exit(main())
