"""The upstream tests, as a module that processes of every start method can import.

Environment variables, which children inherit, name the suite, the start method, and the implementation to test.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import os
import sys

SUITES = {"multiprocess": "multiprocess.tests", "cpython": "test._test_multiprocessing"}


def _sub_tests(names, cases, /, **_):
    """A replacement for a helper that some Pythons lack: run a test with each of several arguments."""
    names = names.replace(",", " ").split()

    def decorate(test):
        @functools.wraps(test)
        def run_each(self, *args, **options):
            for case in cases:
                given = dict(zip(names, case if len(names) > 1 else [case], strict=True))
                with self.subTest(**given):
                    test(self, *args, **options, **given)

        return run_each

    return decorate


def _import_multiprocess(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002 - as it is called
    """``__import__`` that gives CPython's tests multiprocess, the fork of multiprocessing."""
    top, dot, rest = name.partition(".")
    if top == "multiprocessing" and not level:
        name = f"multiprocess{dot}{rest}"
    return builtins.__import__(name, globals, locals, fromlist, level)


def load(name, whose="theirs"):
    """Return a suite's module; it tests its own package, or "multiprocess", or, for "ours", forkshm."""
    try:
        from test import support

        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ModuleNotFoundError(f"this Python has no {name}, or not the test package that it needs", name=name)
    if not hasattr(support, "subTests"):
        support.subTests = _sub_tests
    module = importlib.util.module_from_spec(spec)
    if whose == "ours":
        import _names

        module.__builtins__ = {**vars(builtins), "__import__": _names.import_ours}
    elif whose == "multiprocess":
        module.__builtins__ = {**vars(builtins), "__import__": _import_multiprocess}
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)
    spec.loader.exec_module(module)
    return module


if "FORKSHM_ANCESTOR" in os.environ:
    suite, method, whose = os.environ["FORKSHM_ANCESTOR"].split()
    module = load(SUITES[suite], whose)
    # The name of the module: that of the tests under ``python -m unittest``.
    module.install_tests_in_module_dict(globals(), method)
