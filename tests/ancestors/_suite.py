"""The tests of others, as a module that processes of every start method can import.

Which suite, which start method, and whose multiprocessing is said by the environment, which children inherit.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys

SUITES = {"multiprocess": "multiprocess.tests", "cpython": "test._test_multiprocessing"}


def load(name, ours):
    """Return a suite's module; with *ours*, it finds forkshm where it imports what it tests."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"this Python has no {name}", name=name)
    module = importlib.util.module_from_spec(spec)
    if ours:
        import _names

        module.__builtins__ = {**vars(builtins), "__import__": _names.import_ours}
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if "FORKSHM_ANCESTOR" in os.environ:
    suite, method, whose = os.environ["FORKSHM_ANCESTOR"].split()
    module = load(SUITES[suite], whose == "ours")
    # What it says to be: the tests of ``python -m unittest`` in a module of this name.
    module.install_tests_in_module_dict(globals(), method)
