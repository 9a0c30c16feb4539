"""The short form of chaos.py, and under the mark nightly the long one."""

from __future__ import annotations

import pathlib
import re

import pytest

pytestmark = pytest.mark.slow

CHAOS = pathlib.Path(__file__).with_name("chaos.py")


def survive(run_script, *arguments, timeout=120):
    program = f"import runpy; runpy.run_path({str(CHAOS)!r}, run_name='__main__')"
    said = run_script(program, *arguments, timeout=timeout)
    table = re.findall(r"^  (\D+?) +([\d,]+)$", said, re.MULTILINE)
    return {name.strip(): int(count.replace(",", "")) for name, count in table}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kills"), [("fork", 60), ("forkserver", 5)])
def test_nothing_is_lost_and_nothing_leaks(run_script, method, kills):
    survived = survive(run_script, "--kills", kills, "--seed", 1, "--method", method)
    assert survived["workers killed"] >= kills
    assert survived["parents killed"] >= 1
    assert survived["answered"] + survived["died"] == survived["tasks"] > 0
    assert survived["lost or leaked"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_and_nothing_leaks_over_thousands_of_kills(run_script, seed):
    survived = survive(run_script, "--kills", 2000, "--seed", seed, timeout=1200)
    assert survived["workers killed"] >= 2000
    assert survived["lost or leaked"] == 0
