"""Fixtures that run the same tests on the standard library, as the reference, and on forkshm."""

from __future__ import annotations

import multiprocessing

import pytest
import started

import forkshm

if not started.CAN_FORK:
    from started import _what_there_is, in_child, run_script  # noqa: F401


@pytest.fixture(params=["multiprocessing", "forkshm"])
def mp(request):
    """Provide the contexts of the standard library and of forkshm. They fork where that is possible."""
    (method,) = started.methods("fork")
    return (multiprocessing if request.param == "multiprocessing" else forkshm).get_context(method)


@pytest.fixture
def run(mp, request):
    """Run functions in processes of the context; all must exit with code 0."""
    if not started.CAN_FORK and request.node.callspec.params["mp"] == "multiprocessing":
        pytest.skip("needs fork: functions of tests reach processes of the standard library by fork only")
    processes = []

    def start(function, *args):
        process = mp.Process(target=function, args=args)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.join(30)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail("a process did not end")
        code = process.exitcode
        process.close()
        assert code == 0
