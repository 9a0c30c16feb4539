"""forkshm.Executor passes the standard library's own tests of ProcessPoolExecutor, except for those listed here.

They run where the interpreter ships its tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = pathlib.Path(__file__).with_name("run_standard_executor_tests.py")

ONE_FUTURE = "one dead worker fails one future, with WorkerDiedError, and not all with BrokenProcessPool"
UNPICKLING = "an exception raised during unpickling fails only its future, and breaks nothing"
INTERNALS = "asks for attributes of ProcessPoolExecutor that are not its interface"

# Tests that fail, and why that is right.
DIFFERENT = {
    "ProcessPoolExecutorTest.test_killed_child": ONE_FUTURE,
    "ProcessPoolExecutorTest.test_kill_workers": INTERNALS,
    "ProcessPoolExecutorTest.test_saturation": INTERNALS,
    "ProcessPoolExecutorTest.test_terminate_workers": INTERNALS,
    "ProcessPoolExecutorTest.test_traceback": "the cause is a forkshm.errors.RemoteTraceback, not a private class",
    "ProcessPoolExecutorTest.test_max_tasks_per_child": "max_tasks_per_child works with fork",
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": "max_tasks_per_child works with fork",
    "ProcessPoolExecutorTest.test_python_finalization_error": INTERNALS,
    "ProcessPoolShutdownTest.test_context_manager_shutdown": INTERNALS,
    "ProcessPoolShutdownTest.test_del_shutdown": INTERNALS,
    "ProcessPoolShutdownTest.test_processes_terminate": INTERNALS,
    "ProcessPoolShutdownTest.test_shutdown_no_wait": INTERNALS,
    "FailingInitializerTest.test_initializer": "the exception is the cause of BrokenExecutor, and is not logged",
    "ExecutorDeadlockTest.test_crash_at_task_unpickle": ONE_FUTURE,
    "ExecutorDeadlockTest.test_crash_big_data": ONE_FUTURE,
    "ExecutorDeadlockTest.test_crash_during_func_exec_on_worker": ONE_FUTURE,
    "ExecutorDeadlockTest.test_crash_during_result_pickle_on_worker": ONE_FUTURE,
    "ExecutorDeadlockTest.test_exit_at_task_unpickle": ONE_FUTURE,
    "ExecutorDeadlockTest.test_exit_during_func_exec_on_worker": ONE_FUTURE,
    "ExecutorDeadlockTest.test_exit_during_result_pickle_on_worker": ONE_FUTURE,
    "ExecutorDeadlockTest.test_shutdown_deadlock": ONE_FUTURE,
    "ExecutorDeadlockTest.test_error_at_task_pickle": "submit itself raises what pickling the arguments raises",
    "ExecutorDeadlockTest.test_error_at_task_unpickle": UNPICKLING,
    "ExecutorDeadlockTest.test_error_during_result_unpickle_in_result_handler": UNPICKLING,
    "ExecutorDeadlockTest.test_exit_during_result_unpickle_in_result_handler": UNPICKLING,
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": INTERNALS,
}

# Parts of the suite, and the minimum number of tests in each.
PARTS = {"ExecutorTest": 11, "ShutdownTest": 4, "WaitTest": 8, "AsCompletedTest": 4, "Initializer": 1, "Deadlock": 3}


@pytest.mark.needs("library_tests")
@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_standard_librarys_tests_pass(part):
    try:
        found = importlib.util.find_spec("test.test_concurrent_futures")
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip("this interpreter does not ship its tests")
    done = subprocess.run([sys.executable, str(PROGRAM), part], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    # The tests print their duration before this line.
    words = done.stdout.split()
    outcomes = {name: outcome for outcome, name in itertools.pairwise(words) if "." in name}
    outcomes = {name: outcome for name, outcome in outcomes.items() if outcome in ("passed", "failed", "skipped")}
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    assert failed <= set(DIFFERENT), done.stdout
    assert list(outcomes.values()).count("passed") >= PARTS[part], done.stdout
