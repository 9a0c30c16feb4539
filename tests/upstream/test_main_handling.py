"""CPython's tests of how children find scripts, packages, zip files and ``python -m`` again, with forkshm."""

from __future__ import annotations

import importlib
import unittest

import pytest

NAME = "test.test_multiprocessing_main_handling"


@pytest.mark.nightly
def test_main_modules():
    try:
        suite = importlib.import_module(NAME)
    except (ModuleNotFoundError, unittest.SkipTest) as error:
        pytest.skip(f"this Python has no {NAME}: {error}")
    for name in ("test_source", "test_source_main_skipped_in_children"):
        changed = getattr(suite, name).replace("from multiprocessing import", "from forkshm import")
        assert "import multiprocessing" not in changed
        setattr(suite, name, changed)
    # Otherwise they are isolated from the packages of the environment.
    helpers = [suite._make_test_script, suite._make_test_zip_pkg]
    for helper in helpers:
        helper.__defaults__ = tuple(
            suite.test_source if isinstance(default, str) else default for default in helper.__defaults__
        )
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(suite).run(result)
    assert not result.errors + result.failures, "\n".join(why for _, why in result.errors + result.failures)
    assert result.testsRun > len(result.skipped)
