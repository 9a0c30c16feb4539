"""Fixtures of every test."""

from __future__ import annotations

import collections
import faulthandler
import importlib
import importlib.util
import os
import signal
import sys
import time

import pytest
from capability_skips import reason_to_skip, why_missing
from started import run_program

import forkshm
from forkshm._system import CAN_FORK
from forkshm.backend import kernel
from forkshm.testing import check_leaks

if sys.platform == "win32":
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "windows"))
    import _capabilities

    _capabilities.stand_in()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Whoever runs this in the background has it ignored, and so would the programs that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# For type checkers; `test_typing` runs them.
collect_ignore = ["typing"]


def pytest_ignore_collect(collection_path):
    """Do not even import a file that is left out as a whole where it might not be importable."""
    if sys.platform == "win32" and collection_path.suffix == ".py":
        name = collection_path.relative_to(os.path.dirname(__file__)).as_posix()
        return True if reason_to_skip(kernel.name, f"tests/{name}") is not None else None
    return None


def pytest_collection_modifyitems(items):
    """Leave out what is about something that this backend has not."""
    for item in items:
        asked = [
            why_missing(kernel.name, *mark.args, mark.kwargs.get("only", ""), item.nodeid)
            for mark in item.iter_markers("needs")
        ]
        for why in (reason_to_skip(kernel.name, item.nodeid), *asked):
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))
                break


def pytest_terminal_summary(terminalreporter):
    """Say which backend this was, and how many tests were left out for want of what."""
    if kernel.name == "linux":
        return
    missing = collections.Counter(
        report.longrepr[2].partition("needs ")[2]
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple) and "needs " in report.longrepr[2]
    )
    terminalreporter.section(f"backend {kernel.name}: {missing.total()} tests left out")
    for reason, count in missing.most_common():
        terminalreporter.line(f"{count:5} need {reason}")


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Every test gives back the fds, processes, threads, mappings and blocks that it took."""
    with check_leaks(patience=5.0 if sys.platform != "win32" else 1.5):
        yield
        request.node.funcargs.clear()  # what the test was given may be freed by now


@pytest.fixture(autouse=True)
def _patience_with_nightly_tests(request):
    # The watchdog of pyproject.toml is for those that take seconds.
    if request.node.get_closest_marker("nightly"):
        faulthandler.dump_traceback_later(3000, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True, scope="session")
def _resource_tracker_of_the_standard_library():
    # Since Python 3.14 any lock of its default context starts the tracker, whose process stays, and keeps a name. tqdm
    # makes such a lock with its first bar.
    if sys.version_info >= (3, 14) and CAN_FORK:
        importlib.import_module("multiprocessing.resource_tracker").ensure_running()
        if importlib.util.find_spec("tqdm") is not None:
            importlib.import_module("tqdm").tqdm.get_lock()


@pytest.fixture(scope="session")
def _warm_up():
    # What the first pool of a process leaves: modules, the resource tracker of nobody.
    with forkshm.Pool(1) as pool:
        pool.apply(int)


@pytest.fixture
def pool(_warm_up):
    """A pool of two workers."""
    with forkshm.Pool(2) as made:
        yield made


@pytest.fixture
def wait_until():
    """Poll for a condition, with a deadline."""

    def wait(condition, seconds=20.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{condition} did not come true within {seconds} s"
            time.sleep(0.002)

    return wait


@pytest.fixture
def run_script(tmp_path):
    """Run a program in a fresh interpreter, which has one thread, and return what it printed."""

    def run(source, *args, **options):
        path = tmp_path / "script.py"
        path.write_text(source)
        return run_program([path], args, **options)

    return run


@pytest.fixture
def in_child():
    """Fork, run a callable in the child, and return its exit code; it always ends."""

    def run(action):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = int(action() or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run
