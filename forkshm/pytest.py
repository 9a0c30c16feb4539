"""The pytest plugin ``-p forkshm.pytest``: fixtures that are created once for all workers of pytest-xdist."""

from forkshm.integrations.pytest import (
    pytest_configure_node,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    pytest_testnodedown,
    pytest_unconfigure,
    shared_fixture,
)

__all__ = (
    "pytest_configure_node",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_testnodedown",
    "pytest_unconfigure",
    "shared_fixture",
)
