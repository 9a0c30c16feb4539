"""Fixtures for all tests."""

from __future__ import annotations

import collections
import faulthandler
import gc
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
from forkshm.backend import experiments, kernel
from forkshm.testing import check_leaks

if sys.platform == "win32":
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "windows"))
    import _capabilities

    _capabilities.stand_in()


if experiments():
    # The output of programs that tests start is compared, and pytest's own filters do not reach them. Python drops an
    # option -W that repeats an entry of this variable, so this one differs from IGNORE_EXPERIMENTS.
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:forkshm on "]))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts this in the background ignores SIGINT; programs that tests start and interrupt would inherit
    # that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


if CAN_FORK:
    # The fork server of the tests imports forkshm once, and not each of its processes. Programs that tests start have
    # fork servers of their own, which import nothing.
    forkshm.set_forkserver_preload(["forkshm"])


# Files for type checkers, run by `test_typing`, and a program of tests that are skipped.
collect_ignore = ["typing"]
if importlib.util.find_spec("distributed") is None:
    collect_ignore.append("cluster/two_machines.py")


def pytest_ignore_collect(collection_path):
    """Do not import files that are skipped as a whole, because they might not be importable."""
    if sys.platform == "win32" and collection_path.suffix == ".py":
        name = collection_path.relative_to(os.path.dirname(__file__)).as_posix()
        return True if reason_to_skip(kernel.name, f"tests/{name}") is not None else None
    return None


def pytest_collection_modifyitems(items):
    """Skip tests of capabilities that this backend lacks."""
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
    """Print the backend, and the number of tests skipped for each missing capability."""
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
    """Check that every test releases the fds, processes, threads, mappings and blocks that it took."""
    with check_leaks(timeout=5.0 if sys.platform != "win32" else 1.5):
        yield
        request.node.funcargs.clear()  # releases the values of the test's fixtures
    # What lives longer than its test need not be looked at by the garbage collections around the next: after a few
    # hundred tests, each would take 40 ms.
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give nightly tests and their fixtures more time: the watchdog in pyproject.toml is for tests of seconds."""
    if item.get_closest_marker("nightly"):
        faulthandler.dump_traceback_later(3000, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True, scope="session")
def _resource_tracker_of_the_standard_library():
    # Since Python 3.14, any lock of the standard library's default context starts its tracker, whose process stays and
    # keeps a name. tqdm creates such a lock with its first bar.
    if sys.version_info >= (3, 14) and CAN_FORK:
        importlib.import_module("multiprocessing.resource_tracker").ensure_running()
        if importlib.util.find_spec("tqdm") is not None:
            importlib.import_module("tqdm").tqdm.get_lock()


@pytest.fixture(scope="session")
def _warm_up():
    # The first pool of a process leaves modules and the resource tracker.
    with forkshm.Pool(1) as pool:
        pool.apply(int)


@pytest.fixture
def pool(_warm_up):
    """Provide a pool of two workers."""
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
