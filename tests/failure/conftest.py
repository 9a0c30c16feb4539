"""Fixtures of the tests of failure."""

from __future__ import annotations

import pytest

import forkshm


@pytest.fixture(scope="session")
def _fork_server():
    # It lives as long as this process, and so does the tracker of resources.
    with forkshm.get_context("forkserver").Pool(1) as pool:
        pool.apply(int)
