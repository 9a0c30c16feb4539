"""Run the tests of one class of a suite, or list the classes, and print one line of JSON.

``report.py`` starts this program; children of every start method import it, too.
"""

from __future__ import annotations

import _suite

if __name__ == "__main__":
    import faulthandler
    import json
    import signal
    import sys
    import unittest

    class Result(unittest.TextTestResult):
        """Records the outcome of each test."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.became = {}

        def _note(self, test, what, why=""):
            self.became[test.id().removeprefix("_suite.")] = [what, why]

        def addSuccess(self, test):
            super().addSuccess(test)
            self._note(test, "passed")

        def addFailure(self, test, error):
            super().addFailure(test, error)
            self._note(test, "failed", self._exc_info_to_string(error, test))

        def addError(self, test, error):
            super().addError(test, error)
            self._note(test, "failed", self._exc_info_to_string(error, test))

        def addSkip(self, test, reason):
            super().addSkip(test, reason)
            self._note(test, "skipped", reason)

        def addSubTest(self, test, subtest, error):
            super().addSubTest(test, subtest, error)
            if error is not None:
                self._note(test, "failed", self._exc_info_to_string(error, test))

        def addExpectedFailure(self, test, error):
            super().addExpectedFailure(test, error)
            self._note(test, "passed")

    command, *names = sys.argv[1:]
    if command == "list":
        classes = {
            name: unittest.defaultTestLoader.getTestCaseNames(found)
            for name, found in sorted(vars(_suite).items())
            if isinstance(found, type) and issubclass(found, unittest.TestCase)
        }
        print(json.dumps(classes))
    else:
        # A shell that starts this in the background ignores SIGINT, which the tests send.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.dump_traceback_later(float(command), exit=True)
        tests = unittest.defaultTestLoader.loadTestsFromNames(names, _suite)
        runner = unittest.TextTestRunner(resultclass=Result, verbosity=2)
        became = runner.run(tests).became
        faulthandler.cancel_dump_traceback_later()
        print("\nRESULT " + json.dumps(became), flush=True)
