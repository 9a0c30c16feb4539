"""Fixtures created once for all workers of pytest-xdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("xdist")
pytest.importorskip("numpy")

pytestmark = [pytest.mark.slow, pytest.mark.needs("unix_sockets")]

CONFTEST = """
import os, pathlib, time
import numpy as np
import pytest
from forkshm.pytest import shared_fixture

LOG = pathlib.Path(__file__).with_name("log")

def note(text):
    with LOG.open("a") as file:
        file.write(f"{text}\\n")
"""


@pytest.fixture
def run(tmp_path):
    def run(conftest, tests, *options, plugin=True):
        tmp_path.joinpath("conftest.py").write_text(CONFTEST + conftest)
        tmp_path.joinpath("test_it.py").write_text(tests)
        tmp_path.joinpath("pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
        if plugin:
            command += ["-p", "forkshm.pytest"]
        if "no:xdist" not in options:
            command += ["-p", "xdist"]
        environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment |= {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        log = tmp_path.joinpath("log")
        counts = {
            kind: int(count) for count, kind in re.findall(r"(\d+) (passed|xfailed|failed|error|skipped)", done.stdout)
        }
        return counts, log.read_text().split() if log.exists() else [], done.stdout + done.stderr

    return run


TABLE = """
@shared_fixture
def table(tmp_path_factory):
    note("made")
    time.sleep(0.3)
    return {"rows": np.ones(100_000), "small": [1, 2]}
"""

TESTS = """
import pathlib, time
import pytest

@pytest.mark.parametrize("number", range(8))
def test_table(table, number):
    time.sleep(0.1)
    assert table["rows"].sum() == 100_000 and table["small"] == [1, 2]
"""


@pytest.mark.parametrize(("workers", "made"), [("0", 1), pytest.param("1", 1, marks=pytest.mark.nightly), ("3", 1)])
def test_a_shared_fixture_is_created_once(run, workers, made):
    counts, log, said = run(TABLE, TESTS, "-n", workers)
    assert (counts, len(log)) == ({"passed": 8}, made), said


@pytest.mark.nightly
def test_without_xdist(run):
    counts, log, said = run(TABLE, TESTS, "-p", "no:xdist")
    assert (counts, len(log)) == ({"passed": 8}, 1), said


@pytest.mark.parametrize(("mode", "seen"), [("copy_on_write", 1), ("read_write", 2)])
def test_each_mode_decides_which_workers_see_a_write(run, mode, seen):
    fixture = f"""
@shared_fixture(mode={mode!r})
def table():
    return np.zeros(100_000)
"""
    # One worker for each test; the tests wait for each other.
    tests = """
import pathlib, time
import pytest

@pytest.mark.parametrize("number", range(2))
def test_write(table, number):
    here = pathlib.Path(__file__).parent
    table[number] = 1
    here.joinpath(f"ready-{number}").touch()
    deadline = time.monotonic() + 30
    while not here.joinpath(f"ready-{1 - number}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert table.sum() == SEEN
""".replace("SEEN", str(seen))
    counts, _, said = run(fixture, tests, "-n", "2")
    assert counts == {"passed": 2}, said


@pytest.mark.nightly
def test_read_only(run):
    fixture = TABLE.replace("@shared_fixture", '@shared_fixture(mode="read_only")')
    tests = TESTS + '    with pytest.raises(ValueError):\n        table["rows"][0] = 5\n'
    counts, _, said = run(fixture, tests, "-n", "2")
    assert counts == {"passed": 8}, said


SMALL = """
@shared_fixture(mode="read_write")
def counts():
    return np.zeros(3)

@shared_fixture(mode="read_only", scope="session")
def constants():
    return np.zeros(3)
"""

SMALL_TESTS = """
import time
import pytest

def test_both(counts, worker_id):
    counts[int(worker_id[-1])] = 1
    deadline = time.monotonic() + 30
    while counts.sum() < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counts.tolist() == [1, 1, 0]

def test_constants(constants):
    with pytest.raises(ValueError, match="read-only"):
        constants[0] = 1
"""


def test_small_arrays_have_the_mode_of_their_fixture(run):
    counts, _, said = run(SMALL, SMALL_TESTS, "-n", "2", "--dist", "each")
    assert counts == {"passed": 4}, said


KINDS = """
class Sub(np.ndarray):
    pass

@shared_fixture(mode="read_write")
def kinds():
    whole = np.zeros((6, 8))
    return {
        "columns": whole[:, ::2],
        "reversed": np.zeros(4)[::-1],
        "record": np.zeros(4, [("a", "i4"), ("b", "f8")]).view(np.recarray),
        "field": np.zeros(4, [("a", "i4"), ("b", "f8")])["b"],
        "matrix": np.zeros((2, 2)).view(np.matrix),
        "subclass": np.zeros(4).view(Sub),
        "transposed": np.zeros((2, 3, 4)).transpose(1, 0, 2),
        "fortran": np.zeros((2, 3), order="F"),
    }
"""

KINDS_TESTS = """
import time
import numpy as np
import pytest

def count(array):
    return sum(bool(each) for each in np.asarray(array)["a" if array.dtype.names else ...].ravel().tolist())

def test_both(kinds, worker_id):
    number = int(worker_id[-1])
    for name, array in kinds.items():
        (array["a"] if array.dtype.names else array)[..., number] = 1
    assert type(kinds["record"]) is np.recarray and type(kinds["subclass"]).__name__ == "Sub"
    deadline = time.monotonic() + 30
    least = {"columns": 12, "matrix": 4, "transposed": 12, "fortran": 4}
    while time.monotonic() < deadline:
        private = [name for name, array in kinds.items() if count(array) < least.get(name, 2)]
        if not private:
            return
        time.sleep(0.01)
    raise AssertionError(private)
"""


def test_every_kind_of_array_is_shared_for_writing(run):
    counts, _, said = run(KINDS, KINDS_TESTS, "-n", "2", "--dist", "each")
    assert counts == {"passed": 2}, said


MASKED = """
@shared_fixture(mode="read_write")
def masked():
    return [np.ma.masked_less(np.arange(4.0), 2)]
"""


def test_an_array_that_cannot_be_shared_for_writing_is_refused(run):
    counts, _, said = run(MASKED, "def test_it(masked): pass", "-n", "2")
    assert counts == {"error": 1}, said
    assert "cannot share a MaskedArray for writing" in said
    counts, _, said = run(MASKED.replace("read_write", "copy_on_write"), "def test_it(masked): pass", "-n", "2")
    assert counts == {"passed": 1}, said


LOCKS = """
import forkshm

@shared_fixture
def shared():
    return {
        "lock": forkshm.Lock(), "again": forkshm.RLock(), "value": forkshm.Value("i"), "number": forkshm.RawValue("i"),
        "barrier": forkshm.Barrier(2), "event": forkshm.Event(), "memory": forkshm.anonymous_shared_memory(100),
        "limit": forkshm.BoundedSemaphore(1), "condition": forkshm.Condition(), "table": np.zeros(10_000),
    }
"""

LOCKS_TESTS = """
def test_locks(shared, worker_id):
    shared["barrier"].wait(30)
    for _ in range(2000):
        with shared["lock"], shared["again"], shared["limit"]:
            shared["number"].value += 1
    with shared["value"].get_lock():
        shared["value"].value += 1
    shared["memory"].buf[int(worker_id[-1])] = 1
    shared["table"][0] += 1
    if shared["barrier"].wait(30) == 0:
        shared["event"].set()
    assert shared["event"].wait(30)
    assert shared["number"].value == 4000 and shared["value"].value == 2
    assert bytes(shared["memory"].buf[:2]) == b"\\1\\1" and shared["table"][0] == 1
"""


def test_locks_and_memory_are_shared_in_each_mode(run):
    counts, _, said = run(LOCKS, LOCKS_TESTS, "-n", "2", "--dist", "each")
    assert counts == {"passed": 2}, said


METHODS = """
from forkshm.pytest import shared_fixture
from conftest import note

class Base:
    number = 0

    @shared_fixture
    def value(self, request):
        note("made")
        return self.number, request.scope

    @shared_fixture
    def other(self):
        yield type(self).__name__

    def test_it(self, value, other):
        assert value == (self.number, "session") and other == type(self).__name__

    def test_again(self, value, other):
        self.test_it(value, other)

class TestOne(Base):
    number = 1

class TestTwo(Base):
    number = 2
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_method_is_a_fixture_of_each_class_that_inherits_it(run, workers):
    counts, log, said = run("", METHODS, "-n", workers)
    assert (counts, len(log)) == ({"passed": 4}, 2), said


def test_a_value_that_cannot_be_pickled_is_named(run):
    conftest = "@shared_fixture\ndef rows():\n    return {'rows': (row for row in range(3))}\n"
    _, _, said = run(conftest, "def test_it(rows):\n    pass\n", "-n", "1")
    assert "(the value of the shared fixture rows['rows']: generator)" in said


def test_scopes_other_than_the_session_are_refused():
    from forkshm.pytest import shared_fixture

    with pytest.raises(ValueError, match="with scope 'module'"):
        shared_fixture(scope="module")(lambda: 1)


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ('raise LookupError("no table")', "error"),
        ('pytest.skip("no table")', "skipped"),
        pytest.param('pytest.fail("no table")', "error", marks=pytest.mark.nightly),
        pytest.param('raise SystemExit("no table")', "error", marks=pytest.mark.nightly),
        pytest.param('pytest.xfail("no table")', "xfailed", marks=pytest.mark.nightly),
    ],
)
def test_a_maker_that_fails_fails_everywhere(run, what, outcome):
    fixture = f"""
@shared_fixture
def table():
    note("made")
    time.sleep(0.3)
    {what}
"""
    counts, log, said = run(fixture, TESTS, "-n", "3")
    assert "no table" in said
    assert (counts, len(log)) == ({outcome: 8}, 1), said


def test_a_maker_that_is_killed_is_replaced(run):
    fixture = """
@shared_fixture
def table():
    note("made")
    time.sleep(0.3)
    if len(LOG.read_text().split()) == 1:
        os.kill(os.getpid(), 9)
    return {"rows": np.ones(100_000), "small": [1, 2]}
"""
    counts, log, said = run(fixture, TESTS, "-n", "3")
    # The test that the killed worker was running has failed.
    assert (counts, len(log)) == ({"passed": 7, "failed": 1}, 2), said


@pytest.mark.nightly
def test_the_value_outlives_its_maker(run):
    tests = (
        TESTS
        + """
def test_die(table):
    import os
    os.kill(os.getpid(), 9)

@pytest.mark.parametrize("number", range(8))
def test_again(table, number):
    assert table["rows"].sum() == 100_000
"""
    )
    counts, log, said = run(TABLE, tests, "-n", "1")
    assert (counts, len(log)) == ({"passed": 16, "failed": 1}, 1), said


@pytest.mark.nightly
def test_each_param_is_one(run):
    fixture = """
@shared_fixture(params=[1, 2, 3])
def table(request):
    note(request.param)
    return request.param
"""
    counts, log, said = run(fixture, "def test_it(table): pass\ndef test_other(table): pass", "-n", "2")
    assert (counts, sorted(log)) == ({"passed": 6}, ["1", "2", "3"]), said


def test_params_of_other_fixtures_and_of_tests_decide_the_value(run):
    fixtures = """
@shared_fixture(params=["x", "y"])
def letter(request):
    return request.param

@shared_fixture
def table(letter):
    note(letter)
    return letter * 2

@shared_fixture
def size(request):
    note(request.param)
    return request.param
"""
    tests = """
import pytest

@pytest.mark.parametrize("number", range(2))
def test_letter(table, letter, number):
    assert table == letter * 2

@pytest.mark.parametrize("size", [1, 2], indirect=True)
def test_small(size):
    assert size in (1, 2)

@pytest.mark.parametrize("size", [2, 3], indirect=True)
def test_large(size):
    assert size in (2, 3)
"""
    counts, log, said = run(fixtures, tests, "-n", "2")
    assert counts == {"passed": 8}, said
    assert sorted(log) == ["1", "2", "3", "x", "y"]


def test_a_conftest_loads_the_plugin_without_a_warning(run):
    conftest = TABLE + '\npytest_plugins = ["forkshm.pytest"]\n'
    counts, log, said = run(conftest, TESTS, "-n", "2", "-W", "error", plugin=False)
    assert (counts, len(log)) == ({"passed": 8}, 1), said
    assert "warning" not in said.lower(), said


@pytest.mark.nightly
def test_without_the_plugin_the_error_says_what_to_do(run):
    counts, _, said = run(TABLE, TESTS, "-n", "2", plugin=False)
    assert counts == {"error": 8}
    assert "Run pytest with -p forkshm.pytest" in said


YIELDED = """
@shared_fixture
def table():
    note("made")
    yield {"rows": np.ones(100_000), "small": [1, 2]}
    note("done")

@pytest.fixture(scope="session", autouse=True)
def _worker(table):
    yield
    note("worker")
"""


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.nightly), "3"])
def test_the_code_after_yield_runs_once_and_last(run, workers):
    counts, log, said = run(YIELDED, TESTS, "-n", workers)
    assert counts == {"passed": 8}, said
    assert (log[0], log[-1]) == ("made", "done"), log
    assert set(log[1:-1]) == {"worker"}
    assert len(log) == 2 + max(int(workers), 1)


@pytest.mark.needs("signals")
def test_the_code_after_yield_runs_if_the_run_is_interrupted(run):
    tests = """
import os, signal, time
import pytest

@pytest.mark.parametrize("number", range(3))
def test_table(table, number):
    if number == 2:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    time.sleep(0.1)
"""
    _, log, said = run(YIELDED, tests, "-n", "2")
    assert "KeyboardInterrupt" in said
    assert log.count("made") == log.count("done") == 1, said


@pytest.mark.nightly
def test_the_code_after_yield_waits_for_the_replacement_of_a_killed_worker(run):
    tests = (
        TESTS
        + """
def test_die(table):
    import os
    os.kill(os.getpid(), 9)

@pytest.mark.parametrize("number", range(8))
def test_again(table, number):
    time.sleep(0.1)
    assert table["rows"].sum() == 100_000
"""
    )
    counts, log, said = run(YIELDED, tests, "-n", "3")
    assert (counts["passed"], counts["failed"]) == (16, 1), said
    assert log.count("made") == 1
    # If the killed worker was the one that created the value, the code did not run.
    assert log.count("done") <= 1
    assert log[-1] in ("done", "worker"), log


@pytest.mark.parametrize("dist", ["load", pytest.param("loadfile", marks=pytest.mark.nightly)])
def test_with_parameters_the_code_after_yield_runs_at_the_end(run, dist):
    fixture = """
@shared_fixture(params=[1, 2, 3])
def table(request):
    note(f"made-{request.param}")
    yield request.param
    note(f"done-{request.param}")
"""
    tests = """
import time
def test_it(table):
    time.sleep(0.1)
def test_other(table):
    time.sleep(0.1)
"""
    counts, log, said = run(fixture, tests, "-n", "2", "--dist", dist)
    assert counts == {"passed": 6}, said
    assert sorted(log) == [f"{what}-{number}" for what in ("done", "made") for number in (1, 2, 3)]


def test_an_error_after_yield_is_reported(run):
    fixture = YIELDED.replace('note("done")', 'raise LookupError("no end")')
    counts, _, said = run(fixture, TESTS, "-n", "2")
    assert (counts, said.count("E       LookupError: no end")) == ({"passed": 8, "error": 1}, 1), said


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if False:\n        yield", "did not yield a value"),
        ("yield 1\n    yield 2", "more than one 'yield'"),
        ('raise LookupError("no start")\n    yield', "no start"),
    ],
)
def test_a_generator_that_does_not_yield_once_is_an_error(run, body, message):
    counts, _, said = run(f"@shared_fixture\ndef table():\n    {body}\n", "def test_it(table): pass", "-n", "1")
    assert counts.get("error") == 1, said
    assert message in said


def test_asynchronous_functions_are_refused():
    from forkshm.pytest import shared_fixture

    with pytest.raises(TypeError, match="it is asynchronous"):

        @shared_fixture
        async def table():
            yield 1

    with pytest.raises(ValueError, match="whatever"):
        shared_fixture(mode="whatever")
