"""Every shared object is shared in every way of sending it; this test writes the table of CROSSING.md."""

from __future__ import annotations

import pathlib

import crossing
import pytest

from forkshm._system import CAN_FORK
from forkshm.backend import kernel

TABLE = pathlib.Path(__file__).with_name("CROSSING.md")


@pytest.mark.slow
@pytest.mark.parametrize("method", crossing.METHODS if CAN_FORK else ("spawn",))
def test_everything_is_shared_in_every_way(method):
    found = crossing.run(kernel.name, [method])[method]
    others = {(name, way): what for name, ways in found.items() for way, what in ways.items() if what != "shared"}
    assert others == {}
    assert set(found) == set(crossing.THINGS)
    assert all(set(ways) == set(crossing.WAYS) for ways in found.values())


def test_the_table_shows_the_tested_combinations():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` " + "| shared " * len(crossing.WAYS) + "|" for name in crossing.THINGS]
