"""The pytest plugin ``-p forkshm.pytest``: fixtures that are created once for all workers of pytest-xdist.

A conftest.py imports the decorator before pytest loads the plugin, of which pytest warns without this word:
PYTEST_DONT_REWRITE.
"""

from forkshm.integrations.pytest import (
    pytest_configure_node,
    pytest_keyboard_interrupt,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    pytest_testnodedown,
    pytest_unconfigure,
    shared_fixture,
)

__all__ = (
    "pytest_configure_node",
    "pytest_keyboard_interrupt",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_testnodedown",
    "pytest_unconfigure",
    "shared_fixture",
)
