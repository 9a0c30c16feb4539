"""The programs of README.md about several processes run when they are copied."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("numpy")

README = pathlib.Path(__file__).parents[2] / "README.md"


def programs():
    section = README.read_text().partition("\n## Several processes, one program\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "True\n"), (1, ""), (2, "1 workers: 332833500.0\n"), (3, "drained after True\n")],
    ids=["team", "launch", "script", "supervise"],
)
def test_a_program_runs_when_it_is_copied(number, said, run_script):
    found = programs()
    assert len(found) == 4
    assert run_script(found[number]) == said


def test_the_script_runs_in_several_workers(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(programs()[2])
    command = [sys.executable, "-m", "forkshm", "run", "-n", "3", str(path)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "3 workers: 332833500.0\n"
