"""The benchmarks run: with tiny sizes, so that they keep working. Nothing is said about times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the benchmarks send NumPy arrays")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = [
    "apply",
    "map_single",
    "map_chunks",
    "array_argument",
    "array_result",
    "born_result",
    "small_array_argument",
    "bytes_argument",
    "bytes_result",
    "dict_argument",
    "shared_argument",
    "closure",
    "start",
]
#: As on a machine without rich.
WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
sys.path.insert(0, sys.argv.pop(1))
import transport
sys.exit(transport.main())
"""


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a quick run wrote, and what it printed."""
    path = tmp_path_factory.mktemp("benchmarks") / "numbers.json"
    done = run(BENCHMARKS / "transport.py", "--quick", "--json", path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text()), done.stdout


def test_a_quick_run_reports_every_row(report):
    numbers, printed = report
    assert [row["name"] for row in numbers["rows"]] == ROWS
    for row in numbers["rows"]:
        assert row["title"] in printed
        assert row["seconds"]["ours"]["median"] > 0


def test_every_row_has_a_peer_or_says_why_not(report):
    for row in report[0]["rows"]:
        assert ("peer" in row["seconds"]) == (not row["no_peer"]), row


def test_tiny_sizes_are_not_judged(report):
    assert {row["verdict"] for row in report[0]["rows"]} == {"-"}


def test_the_machine_is_told_without_its_name(report):
    numbers, printed = report
    assert set(numbers["machine"]) == {"cpu", "cores", "kernel", "python", "numpy", "forkshm", "load"}
    assert numbers["machine"]["cpu"] in printed


def test_a_full_run_of_one_row_is_judged(tmp_path):
    path = tmp_path / "numbers.json"
    done = run(BENCHMARKS / "transport.py", "--rows", "start", "--json", path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["verdict"] in ("ok", "MISSED")


def test_rows_can_be_chosen_and_rich_is_optional():
    done = run("-c", WITHOUT_RICH, BENCHMARKS, "--quick", "--rows", "shared_argument,apply")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "row",
        "1 GB SharedArray as argument (limit: noop)",
        "apply(noop), round trip",
    ]


def test_an_unknown_row_is_refused_by_name():
    done = run(BENCHMARKS / "transport.py", "--rows", "aply")
    assert done.returncode == 2
    assert "no such row: aply; there are: apply, map_single" in done.stderr


def test_what_a_region_costs_is_printed_beside_its_peer():
    done = run(BENCHMARKS / "regions.py", "--times", "2", "--size", "4096")
    assert done.returncode == 0, done.stderr
    assert "map an fd and close" in done.stdout
    assert done.stdout.count("x") >= 4
