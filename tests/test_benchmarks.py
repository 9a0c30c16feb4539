"""The benchmarks run with tiny sizes, which shows that they work. Times are not checked."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from room import needs_room_in_shm

pytestmark = pytest.mark.slow

pytest.importorskip("numpy", reason="the benchmarks send NumPy arrays")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = [
    "apply",
    "map_single",
    "map_chunks",
    "array_argument",
    "array_result",
    "array_born_shared",
    "small_array_argument",
    "bytes_argument",
    "bytes_result",
    "dict_argument",
    "shared_argument",
    "large_shared_argument",
    "shared_result",
    "closure",
    "queue_small",
    "queue_arrays",
    "start",
    "memory",
]
# Peers that need the same libraries as forkshm.
ALWAYS = ["multiprocessing", "multiprocess", "concurrent.futures"]
# Simulates a machine without a library.
WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
sys.path.insert(0, sys.argv.pop(1))
import transport
sys.exit(transport.main())
"""


@pytest.fixture
def room_for_peers():
    """Unlike forkshm, these peers keep shared data and locks in /dev/shm."""
    needs_room_in_shm(16 * 2**20)


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
    )


def report_of(program, path, *options, **environment):
    """Return the output files and the output of a quick run."""
    done = run(BENCHMARKS / program, "--quick", "--json", path, *options, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    # A peer that dies for lack of room may leave its data there, and then other peers have none.
    needs_room_in_shm(16 * 2**20)
    path = tmp_path_factory.mktemp("benchmarks") / "numbers.json"
    return report_of("transport.py", path, "--peers", ",".join(ALWAYS))


def test_a_quick_run_reports_every_row(report):
    numbers, printed = report
    assert [row["name"] for row in numbers["rows"]] == ROWS
    for row in numbers["rows"]:
        assert row["title"] in printed


@pytest.mark.usefixtures("room_for_peers")
def test_every_side_is_measured_or_says_why_not(report):
    for row in report[0]["rows"]:
        assert row["failed"] == {}
        assert {"forkshm", *ALWAYS} <= set(row["sides"]) | set(row["cannot"]), row["name"]
        assert all(row["cannot"].values())


def test_every_median_is_of_something(report):
    for row in report[0]["rows"]:
        for side, taken in row["sides"].items():
            # Less memory than before is noise, at a hundredth of the size.
            assert taken["count"] > 0
            assert taken["median"] > 0 or row["name"] == "memory", (row["name"], side)


def test_tiny_sizes_are_not_judged(report):
    for row in report[0]["rows"]:
        assert row["bounds"]
        assert set(row["bounds"].values()) == {None}


def test_the_machine_and_the_versions_are_told(report):
    numbers, printed = report
    assert set(numbers["machine"]) == {"cpu", "cores", "memory", "kernel", "python", "numpy", "load"}
    assert numbers["machine"]["cpu"] in printed
    assert set(numbers["versions"]) == {"forkshm", *ALWAYS}


@pytest.mark.usefixtures("room_for_peers")
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["joblib", "joblib (multiprocessing)", "loky", "mpire"])
def test_an_optional_peer_runs_every_supported_row(peer, tmp_path):
    pytest.importorskip(peer.split()[0])
    numbers, _ = report_of("transport.py", tmp_path / "numbers.json", "--peers", peer)
    assert numbers["left_out"] == {}
    for row in numbers["rows"]:
        assert peer in row["sides"] or row["cannot"][peer], row["failed"]


@pytest.mark.slow
def test_ray_does_rows_of_each_kind(tmp_path):
    pytest.importorskip("ray")
    numbers, printed = report_of(
        "transport.py",
        tmp_path / "numbers.json",
        "--peers",
        "ray",
        "--rows",
        "apply,map_chunks,closure,shared_argument",
    )
    if "ray" in numbers["left_out"]:
        pytest.skip(f"ray does not start here: {printed}")
    for row in numbers["rows"]:
        assert "ray" in row["sides"], row["failed"]


@pytest.mark.usefixtures("room_for_peers")
def test_the_cold_rows_are_measured(tmp_path):
    numbers, printed = report_of("cold.py", tmp_path / "numbers.json", "--peers", ",".join(ALWAYS))
    assert len(numbers["rows"]) == 15
    for row in numbers["rows"]:
        assert row["title"] in printed
        assert row["failed"] == {}
        assert row["sides"]["forkshm"]["count"] > 0


@pytest.mark.usefixtures("room_for_peers")
def test_a_full_run_of_one_row_is_judged(tmp_path):
    path = tmp_path / "numbers.json"
    done = run(BENCHMARKS / "transport.py", "--rows", "start", "--peers", "multiprocessing", "--json", path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert [type(kept) for kept in row["bounds"].values()] == [bool]


def test_rows_can_be_chosen_and_rich_is_optional():
    done = run("-c", WITHOUT, "rich", BENCHMARKS, "--quick", "--peers", "", "--rows", "shared_argument,apply")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "row",
        "1 MB shared array as argument",
        "apply(noop), round trip",
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "aply", "no such row: aply; there are: apply, map_single"),
        ("--peers", "dask", "no such peer: dask; there are: multiprocessing, multiprocess"),
    ],
)
def test_an_unknown_name_is_refused(option, value, message):
    done = run(BENCHMARKS / "transport.py", option, value)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.usefixtures("room_for_peers")
def test_growth_reports_every_size(tmp_path):
    numbers, printed = report_of("growth.py", tmp_path / "numbers.json", "--peers", "multiprocessing")
    steps = [(row["name"], row["parameters"]["size"]) for row in numbers["rows"]]
    assert steps == [
        *(("by_value", 4096), ("by_value", 65536), ("shared", 4096), ("shared", 65536)),
        *(("tasks", 100), ("tasks", 1000), ("regions", 1), ("regions", 10)),
    ]
    for row in numbers["rows"]:
        assert row["title"] in printed
        assert {"forkshm", "multiprocessing"} <= set(row["sides"])


@pytest.mark.parametrize(("program", "rows"), [("transport.py", "apply,start"), ("growth.py", "tasks")])
def test_a_run_can_be_drawn_and_told_again(program, rows, tmp_path):
    pytest.importorskip("matplotlib")
    drawn, again = tmp_path / "drawn.png", tmp_path / "again.png"
    options = ("--rows", rows, "--peers", "multiprocessing", "--chart", drawn)
    _, printed = report_of(program, tmp_path / "numbers.json", *options)
    done = run(BENCHMARKS / program, "--from", tmp_path / "numbers.json", "--chart", again)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert again.read_bytes() == drawn.read_bytes()


# -- peers that fail --------------------------------------------------------------------


BROKEN = {
    "is not installed": "raise ModuleNotFoundError('No module named loky', name='loky')",
    "RuntimeError: no such processor": "raise RuntimeError('no such processor')",
    "exit code 3": "import os\nos._exit(3)",
}


@pytest.mark.usefixtures("room_for_peers")
@pytest.mark.parametrize("reason", BROKEN)
def test_a_peer_that_does_not_start_is_left_out_and_named(reason, tmp_path):
    (tmp_path / "loky.py").write_text(BROKEN[reason])
    options = ("--rows", "apply", "--peers", "loky,multiprocessing")
    numbers, printed = report_of("transport.py", tmp_path / "numbers.json", *options, PYTHONPATH=str(tmp_path))
    assert set(numbers["rows"][0]["sides"]) == {"forkshm", "multiprocessing", "limit"}
    assert reason in numbers["left_out"]["loky"]
    assert f"left out: loky: {numbers['left_out']['loky']}" in printed


LIAR = """
from concurrent.futures import Future

class Executor:
    def submit(self, function, *args):
        if function.__name__ == "ends_of_bytes":
            import os
            os._exit(4)
        answer = Future()
        answer.set_result("something else")
        return answer

    def shutdown(self, wait):
        pass

def get_reusable_executor(workers=2):
    return Executor()
"""


@pytest.mark.usefixtures("room_for_peers")
def test_wrong_answers_and_deaths_affect_no_other_side(tmp_path):
    (tmp_path / "loky.py").write_text(LIAR)
    options = ("--rows", "apply,bytes_argument,start", "--peers", "loky,multiprocessing")
    numbers, printed = report_of("transport.py", tmp_path / "numbers.json", *options, PYTHONPATH=str(tmp_path))
    for row in numbers["rows"]:
        assert set(row["sides"]) == {"forkshm", "multiprocessing", "limit"}
    lie, death, after = (row["failed"]["loky"] for row in numbers["rows"])
    assert "'something else'" in lie
    assert "died" in death
    assert "died" in after
    assert "not loky: failed" in printed


@pytest.fixture
def modules(monkeypatch):
    """Import the benchmarks' own modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _measure
    import _program
    import _rows

    return types.SimpleNamespace(measure=_measure, program=_program, rows=_rows)


def test_a_side_that_hangs_is_ended(modules, monkeypatch, tmp_path):
    (tmp_path / "loky.py").write_text("import time\ntime.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(modules.measure, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(modules.measure, "END_SECONDS", 0.1)
    with modules.measure.started(["loky"]) as (sides, left_out):
        assert sides == []
        assert left_out == {"loky": "did not answer for 0.5 s"}


@pytest.mark.parametrize(
    ("bound", "ours", "kept", "missed"),
    [
        ("TimesLimit(4)", "forkshm", 4.0, 4.1),
        ("LimitPlus(0.5)", "forkshm", 1.5, 1.6),
        ("TimesFaster(4)", "forkshm", 2.0, 2.1),
        ("TimesFaster(1)", "forkshm", 8.0, 8.1),
        ("AtMost(12e-6)", "forkshm", 12e-6, 13e-6),
    ],
)
def test_bounds_are_kept_up_to_their_edge(modules, bound, ours, kept, missed):
    def sides(value):
        of = {"forkshm": value, "multiprocessing": 8.0, "limit": 1.0}
        return {name: types.SimpleNamespace(median=median) for name, median in of.items()}

    made = eval(bound, vars(modules.rows))
    assert made.is_kept(sides(kept))
    assert not made.is_kept(sides(missed))


def test_a_bound_that_refers_to_a_side_that_is_not_there_is_not_judged(modules):
    row = modules.rows.Row("row", "title", None, (modules.rows.TimesFaster(1), modules.rows.AtMost(2.0)))
    measured = modules.measure.Measured({"forkshm": modules.measure.Timings([1.0])})
    told = modules.program.row_as_json(row, {}, measured, judged=True)
    assert list(told["bounds"].values()) == [None, True]
    assert modules.program.verdict(told) == "-"


def test_a_verdict_on_a_busy_machine_is_in_doubt(modules):
    def verdict(*kept, others):
        return modules.program.verdict({"bounds": dict(enumerate(kept)), "others": others})

    assert verdict(True, True, others=0.1) == "ok"
    assert verdict(True, False, others=0.1) == "MISSED"
    assert verdict(True, True, others=0.11) == "ok?"
    assert verdict(None, False, others=0.11) == "MISSED?"


def test_percentiles_need_enough_measurements(modules):
    few, many = modules.measure.Timings([1.0] * 9), modules.measure.Timings([*range(1, 101)])
    assert few.percentile(90) is None
    assert (many.median, many.percentile(90), many.percentile(99)) == (50.5, 90, 99)


@pytest.mark.usefixtures("room_for_peers")
def test_the_cost_of_a_region_is_printed_beside_its_peer():
    done = run(BENCHMARKS / "regions.py", "--times", "2", "--size", "4096")
    assert done.returncode == 0, done.stderr
    assert "map an fd and close" in done.stdout
    assert done.stdout.count("x") >= 4


def test_a_team_is_measured_beside_pymp_or_alone():
    done = run(BENCHMARKS / "team.py", "--steps", 20, "--side", 30, "--rounds", 1)
    assert done.returncode in (0, 1), done.stderr  # times are not checked
    rows = [line for line in done.stdout.splitlines() if " ms " in line]
    assert len(rows) == 6, done.stdout + done.stderr
    assert all(line.endswith(("ok", "SLOWER", "missing")) for line in rows)


@pytest.mark.usefixtures("room_for_peers")
def test_the_classic_names_are_measured_beside_those_of_multiprocessing():
    done = run(BENCHMARKS / "classic.py", "--quick", "--rounds", 1)
    assert done.returncode in (0, 1), done.stderr  # times are not checked
    rows = [line for line in done.stdout.splitlines() if " us " in line]
    assert len(rows) == 12, done.stdout + done.stderr


def test_the_interfaces_are_measured_beside_their_peers():
    done = run(BENCHMARKS / "interfaces.py", "--rounds", 1, "--scale", 0.01)
    assert done.returncode in (0, 1), done.stderr  # times are not checked
    rows = [line for line in done.stdout.splitlines() if line.startswith(("decorator: ", "executor: ", "containers: "))]
    assert len(rows) == 14, done.stdout + done.stderr
    assert all(line.endswith(("ok", "SLOWER", "missing")) for line in rows)


def test_pairs_are_judged_by_the_median_of_their_ratios(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pairs = importlib.import_module("_pairs")
    values = iter([9, 9, 1, 2, 3, 2, 5, 4, 1, 4])  # the first two do not count; then the peer begins, forkshm next
    turns = pairs.Pair("name", lambda: next(values), lambda: next(values), unit="MB")
    assert pairs.compare([turns], "peer", 4) == 1
    # 2 of 1, 3 of 2, 4 of 5, and 1 of 4.
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.split() == ["name", "2.500", "MB", "3.000", "MB", "1.15x", "SLOWER"]


@pytest.mark.needs("proc")
def test_small_kept_results_hold_little_memory_and_views_copy_their_elements():
    done = run(BENCHMARKS / "kept.py", "--only", "value,broadcast,windows")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [
        line.split("  ")[0] for line in done.stdout.splitlines() if line.startswith(("one value", "8 kB", "windows"))
    ]
