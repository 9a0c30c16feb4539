"""Run the classes of a suite, each in a process of its own with a time limit."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import tempfile

METHODS = ("fork", "forkserver", "spawn")
# Seconds for one class; the longest takes one minute on an idle machine.
TIMEOUT = 400

_PROGRAM = pathlib.Path(__file__).with_name("run.py")


def _call(python, setting, arguments, timeout):
    environment = {**os.environ, "FORKSHM_ANCESTOR": " ".join(setting)}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [python, str(_PROGRAM), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
        try:
            # The process ends itself in time, and prints where it was.
            process.wait(timeout + 30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        output.seek(0)
        return process.returncode, output.read()


def list_classes(python, suite, method, whose):
    """Return the classes of a suite and the names of their tests; None if *python* lacks the suite."""
    code, said = _call(python, (suite, method, whose), ["list"], 100)
    if code:
        if "ModuleNotFoundError" in said and "this Python has no" in said:
            return None
        raise RuntimeError(f"{python} cannot list the tests of {suite}:\n{said}")
    return {name: tests for name, tests in json.loads(said.splitlines()[-1]).items() if tests}


def run_class(python, suite, method, whose, name, tests, timeout=TIMEOUT):
    """Run one class, or only some *tests* of it; return {test: [outcome, reason]}."""
    full = [f"{name}.{test}" for test in tests]
    code, said = _call(python, (suite, method, whose), [str(timeout), *full], timeout)
    _, mark, result = said.rpartition("\nRESULT ")
    if mark:
        became = json.loads(result.splitlines()[0])
        if not any(test in became for test in full) and became:
            return {test: next(iter(became.values())) for test in full}  # its module or class could not be set up
        # A test that was never reached: its class was skipped as a whole.
        return {test: became.get(test, ["skipped", "with its class"]) for test in full}
    why = f"the process ended with {code}, or hung, in:\n{said[-6000:]}"
    done = {}
    for line in said.splitlines():
        test, _, rest = line.partition(" (")
        if rest.endswith("... ok"):
            done[f"{name}.{test}"] = ["passed", ""]
    return {test: done.get(test, ["failed", why]) for test in full}


def run_suite(python, suite, method, whose, *, jobs=2, leave_out=(), only=()):
    """Run a suite; return {test: [outcome, reason]}, or None if *python* lacks the suite."""
    classes = list_classes(python, suite, method, whose)
    if classes is None:
        return None
    became = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(run_class, python, suite, method, whose, name, chosen)
            for name, tests in classes.items()
            if (not only or name in only) and (chosen := [test for test in tests if f"{name}.{test}" not in leave_out])
        ]
        for future in waiting:
            became.update(future.result())
    return dict(sorted(became.items()))
