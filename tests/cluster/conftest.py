"""Fixtures of the tests of clusters."""

from __future__ import annotations

import gc

import pytest

import forkshm


@pytest.fixture(autouse=True)
def no_leaks():
    """Check memory only: Dask's threads and sockets live as long as its client. Tests check processes themselves."""
    before = forkshm.statistics().regions
    yield
    gc.collect()
    assert forkshm.statistics().regions <= before + 1  # one array may be kept for later calls
