"""Fixtures for the tests of failures."""

from __future__ import annotations

import pytest

import forkshm
from forkshm._system import CAN_FORK

if not CAN_FORK:
    from started import _what_there_is, in_child, run_script  # noqa: F401


@pytest.fixture(scope="session")
def _fork_server():
    # The fork server and the resource tracker live as long as this process. Tests of forkserver are skipped without it.
    if not CAN_FORK:
        return
    with forkshm.get_context("forkserver").Pool(1) as pool:
        pool.apply(int)
