"""Run the standard library's tests of ProcessPoolExecutor with forkshm.Executor in its place; print the outcomes.

    python run_standard_executor_tests.py [pattern]

The classes that fork are run; each line has an outcome and a test.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import io
import pkgutil
import sys
import unittest

import forkshm

# They wait until the death of one worker has failed all futures. Here it fails one.
WAIT_FOREVER = {"test_broken_process_pool_traceback"}


class ProcessPoolExecutor(forkshm.Executor):
    """The tests check the name of the class."""


class Result(unittest.TestResult):
    def tell(self, outcome, test, error=None):
        where, name = test.id().rsplit(".", 1)
        print(outcome, f"{where.rsplit('.', 1)[1].replace('ProcessPoolFork', '')}.{name}", flush=True)
        if error is not None and "-v" in sys.argv:
            print(self._exc_info_to_string(error, test), flush=True)

    def addSuccess(self, test):
        self.tell("passed", test)

    def addSkip(self, test, reason):
        self.tell("skipped", test)

    def addError(self, test, error):
        self.tell("failed", test, error)

    addFailure = addError


def modules():
    package = importlib.import_module("test.test_concurrent_futures")
    yield package
    for found in pkgutil.iter_modules(getattr(package, "__path__", [])):
        if found.name.startswith("test_") and "thread" not in found.name:
            yield importlib.import_module(f"{package.__name__}.{found.name}")


def main():
    concurrent.futures.ProcessPoolExecutor = ProcessPoolExecutor
    patterns = [argument for argument in sys.argv[1:] if argument != "-v"]
    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    for module in modules():
        for name, thing in vars(module).items():
            if isinstance(thing, type) and name.startswith("ProcessPoolFork") and "Forkserver" not in name:
                for test in loader.loadTestsFromTestCase(thing):
                    is_wanted = test.id().rpartition(".")[2] not in WAIT_FOREVER
                    if is_wanted and all(pattern in test.id() for pattern in patterns):
                        suite.addTest(test)
    stderr, sys.stderr = sys.stderr, io.StringIO()
    suite.run(Result())
    sys.stderr = stderr


if __name__ == "__main__":
    main()
