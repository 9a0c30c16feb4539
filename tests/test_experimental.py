"""Experimental systems are reported at import, and by the doctor."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest

import forkshm
from forkshm._ledger import Ledger, ThreadedLedger
from forkshm.backend import IS_FREE_THREADED, experiments
from forkshm.errors import ExperimentalWarning

SUPPORTED = sys.platform == "linux" and not IS_FREE_THREADED


def test_linux_with_the_gil_is_supported():
    assert experiments("linux", is_free_threaded=False) == []


@pytest.mark.parametrize("system", ["darwin", "freebsd15", "win32"])
def test_other_systems_are_experimental(system):
    (clause,) = experiments(system, is_free_threaded=False)
    assert "is experimental" in clause
    assert "none was run on" in clause


def test_free_threaded_python_is_experimental():
    (clause,) = experiments("linux", is_free_threaded=True)
    assert clause.startswith("free-threaded Python is experimental")
    assert len(experiments("darwin", is_free_threaded=True)) == 2


def test_importing_issues_one_forkshm_warning():
    with pytest.warns(ExperimentalWarning) as caught:
        forkshm._warn_of_experiments(experiments("win32", is_free_threaded=True))
    assert len(caught) == 1
    assert isinstance(caught[0].message, forkshm.ForkshmWarning)
    assert str(caught[0].message).startswith("forkshm on Windows is experimental: ")


def test_spawned_processes_do_not_repeat_the_warning(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", "--multiprocessing-fork"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forkshm._warn_of_experiments(experiments("win32", is_free_threaded=True))


def test_importing_warns_only_where_experimental(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import forkshm\n")
    done = subprocess.run([sys.executable, "-W", "always", str(program)], capture_output=True, text=True, check=True)
    assert ("ExperimentalWarning: forkshm on " in done.stderr) is not SUPPORTED
    if not SUPPORTED:
        assert f"{program}:1: " in done.stderr  # the importing line


def test_the_doctor_reports_experimental_support():
    done = subprocess.run(
        [sys.executable, "-m", "forkshm", "doctor"], capture_output=True, text=True, check=True, timeout=60
    )
    (line,) = [line for line in done.stdout.splitlines() if "supported" in line.split()[:2]]
    assert ("yes" in line.split()) is SUPPORTED


@pytest.mark.parametrize("kind", [Ledger, ThreadedLedger])
def test_a_ledger_counts(kind):
    ledger = kind()
    ledger.messages += 1
    ledger.bytes_copied += 100
    ledger.messages += 2
    assert (ledger.tasks, ledger.messages, ledger.bytes_copied, ledger.bytes_shared) == (0, 3, 100, 0)
    ledger.__init__()  # as in a forked child
    assert (ledger.messages, ledger.bytes_copied) == (0, 0)


def test_threads_that_count_at_the_same_time_lose_nothing():
    ledger = ThreadedLedger()
    start = threading.Barrier(8)

    def count():
        start.wait()
        for _ in range(2000):
            ledger.messages += 1

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.messages == 16_000


def test_a_thread_that_counts_between_reading_and_writing_loses_nothing():
    ledger = ThreadedLedger()
    before = ledger.messages

    def count():
        ledger.messages += 5

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    ledger.messages = before + 1
    assert ledger.messages == 6
