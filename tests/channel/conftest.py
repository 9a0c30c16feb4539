"""The standard library is the oracle: one body of tests, run on it and on ours."""

from __future__ import annotations

import multiprocessing

import pytest

import forkshm


@pytest.fixture(params=["multiprocessing", "forkshm"])
def mp(request):
    """A fork context: the standard library's, and ours."""
    return multiprocessing.get_context("fork") if request.param == "multiprocessing" else forkshm.get_context("fork")


@pytest.fixture
def run(mp):
    """Run functions in processes of the context; all must end well."""
    started = []

    def start(function, *args):
        process = mp.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.join(30)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail("a process did not end")
        code = process.exitcode
        process.close()
        assert code == 0
