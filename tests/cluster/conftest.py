"""Fixtures of the tests of clusters."""

from __future__ import annotations

import gc

import pytest

import forkshm


@pytest.fixture(autouse=True)
def no_leaks():
    """Dask's threads and sockets live as long as its client, so only memory is looked at; a test looks at processes."""
    before = forkshm.statistics().regions
    yield
    gc.collect()
    assert forkshm.statistics().regions <= before + 1  # an array that is kept for calls to come
