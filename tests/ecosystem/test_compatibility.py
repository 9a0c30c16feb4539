"""The programs of the compatibility table pass, and the table has a row for each of them."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.needs("proc")]

DOCS = pathlib.Path(__file__).parents[2] / "docs"
if not DOCS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

spec = importlib.util.spec_from_file_location("make_compatibility", DOCS / "make_compatibility.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)

CASES = [pytest.param(name, marks=[] if found.quick else pytest.mark.nightly) for name, found in table.PROGRAMS.items()]


@pytest.mark.parametrize("name", CASES)
def test_the_library_runs_on_forkshm(name):
    found = table.PROGRAMS[name]
    if absent := table.missing(found):
        pytest.skip(f"not installed: {', '.join(absent)}")
    assert table.run(found) == "passed"


def test_the_page_has_a_row_for_every_program_and_all_pass():
    rows = table.rows_of(table.FILE.read_text())
    wanted = {(table.library_of(found), found.job, found.takes) for found in table.PROGRAMS.values()}
    assert set(rows) == wanted
    assert [row for row in rows.values() if not row.endswith("| passed |")] == []
