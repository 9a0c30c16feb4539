"""Run joblib's own tests of ``Parallel`` with loky and with forkshm in its place, and compare the results.

    python tests/ecosystem/joblib_suite.py [pytest argument ...]

joblib's tests select their backends by name. Here the name ``"loky"`` selects forkshm's backend, with one job by
default like joblib's own backends. The program prints a table, and every test that passes only with loky, with the
reason. It exits with 1 if a test without a reason fails, or if a run hangs.

As a pytest plugin (``-p joblib_suite``) this module replaces the backend.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET

SUITES = ("joblib.test.test_parallel", "joblib.test.test_memmapping")

# Reasons why tests cannot pass, by the name of the test without parameters.
BY_NAME = "compares the name or class of the active backend with loky's"
OF_LOKY = "looks into the executor that only loky has"
TEMPORARY = "looks for the temporary files of joblib's memmapping, which are not needed"
REASONS = {
    "test_auto_memmap_on_arrays_from_generator": TEMPORARY,
    "test_backend_context_manager": BY_NAME,
    "test_backend_hinting_and_constraints": BY_NAME,
    "test_error_capture": OF_LOKY,
    "test_managed_backend_reuse_temp_folder": TEMPORARY,
    "test_memmap_returned_as_regular_array": TEMPORARY,
    "test_memmapping_leaks": TEMPORARY,
    "test_memmapping_temp_folder_thread_safety": TEMPORARY,
    "test_multiple_generator_call_separated_gc": "expects loky to fail: a second call works here",
    "test_nested_parallel_warnings": "expects a warning that loky cannot be used: forkshm's workers can be nested",
    "test_nested_parallelism_limit": BY_NAME,
    "test_parallel_isolated_temp_folders": TEMPORARY,
}

# Seconds after which a test counts as hanging.
HANG = 120
LONGEST = 3600

if "JOBLIB_SUITE_OURS" in os.environ:
    import joblib.parallel

    import forkshm.joblib  # noqa: F401  # registers the backend

    class Replacement(joblib.parallel.BACKENDS.pop("forkshm")):
        default_n_jobs = 1

    joblib.parallel.BACKENDS["loky"] = Replacement


def run(*arguments: str, ours: bool, again: bool = True) -> tuple[dict[str, str], float, str]:
    """Return the outcome of each test, the total seconds, and the output of pytest."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    here = str(pathlib.Path(__file__).parent)
    plugin = []
    if ours:
        environment["JOBLIB_SUITE_OURS"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (here, environment.get("PYTHONPATH"))))
        plugin = ["-p", "joblib_suite"]
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *plugin]
        command += ["-o", f"faulthandler_timeout={HANG}", "-o", "faulthandler_exit_on_timeout=true"]
        command += ["--import-mode=importlib", f"--junit-xml={report}", "--pyargs", *SUITES, *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
        )
        if not report.exists():
            # The tests also use the standard library's pool, which occasionally hangs when it is terminated.
            if again:
                return run(*arguments, ours=ours, again=False)
            raise RuntimeError(f"two runs were ended because a test hung:\n{done.stdout}\n{done.stderr}")
        found, seconds = {}, 0.0
        for case in ET.parse(report).iter("testcase"):
            name = f"{case.get('classname', '')}::{case.get('name')}"
            kinds = {child.tag for child in case}
            found[name] = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
            seconds += float(case.get("time", 0))
    return found, seconds, done.stdout


def compare(*arguments: str) -> tuple[str, list[str]]:
    """Return the report, and the tests without a reason that fail only with forkshm."""
    theirs, their_seconds, _ = run(*arguments, ours=False)
    ours, our_seconds, said = run(*arguments, ours=True)
    lines = ["| | passed | failed | skipped | seconds |", "| --- | --- | --- | --- | --- |"]
    for name, outcomes, seconds in (("loky", theirs, their_seconds), ("forkshm", ours, our_seconds)):
        counts = [sum(outcome in kinds for outcome in outcomes.values()) for kinds in (PASSED, FAILED, SKIPPED)]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {seconds:.0f} |")
    lines += ["", "Passes with loky alone:", ""]
    unexplained = []
    for name, outcome in sorted(theirs.items()):
        if outcome == "passed" and ours.get(name) not in ("passed", "skipped"):
            reason = REASONS.get(re.sub(r".*::|\[.*", "", name))
            lines.append(f"- {name}: {reason or 'NO REASON'}")
            if reason is None:
                unexplained.append(name)
    if unexplained:
        lines += ["", said]
    return "\n".join(lines), unexplained


PASSED, FAILED, SKIPPED = ("passed",), ("failure", "error"), ("skipped",)

if __name__ == "__main__":
    text, failures = compare(*sys.argv[1:])
    print(text)
    sys.exit(bool(failures))
