"""The programs of README.md run when they are copied, and say what is written beside them."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from forkshm import _system

pytest.importorskip("numpy")

pytestmark = pytest.mark.slow

README = pathlib.Path(__file__).parent.parent / "README.md"


def programs(section):
    text = ("\n" + README.read_text()).partition(f"\n{section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


#: Of each section: what its programs say; what ends in a bracket is only how they begin.
SAID = {
    "# forkshm": ["250000000.0\n"],
    "## Doors": [
        "9 [0, 1, 4, 9, 16] 49\n0\n1\n4\n9\n16\n",
        "[1, 1, 4, 27, 256]\nWorkerDiedError(",
        "45\n1\n2\n3\nstopped\n",
        "['to', 'be', 'or', 'not']\n36\n",
    ],
    "## Memory without a pool": [""],
    "## Several processes, one program": ["True\n", "", "1 workers: 332833500.0\n", "drained after True\n"],
}


def test_every_program_is_known():
    assert {section: len(programs(section)) for section in SAID} == {
        section: len(said) for section, said in SAID.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "number"),
    [(section, number) for section, said in SAID.items() for number in range(len(said))],
    ids=lambda value: str(value).strip("# ").replace(" ", "-"),
)
def test_a_program_runs_when_it_is_copied(section, number, run_script):
    # Four GB are more than a machine that tests may have.
    source = programs(section)[number].replace("500_000_000", "500_000")
    expected = SAID[section][number].replace("250000000", "250000")
    if not _system.CAN_FORK:  # where a program is imported by its children
        source = f'if __name__ == "__main__":\n{textwrap.indent(source, "    ")}'
    said = run_script(source)
    assert said.startswith(expected)
    assert said == expected or expected.endswith("(")


def test_arrays_are_born_shared_as_it_says(run_script):
    (program,) = [each for each in programs("## From multiprocessing to forkshm") if "shared_allocations" in each]
    assert run_script(program) == "4995007000.0 0\n"


def test_the_script_runs_in_several_workers(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(programs("## Several processes, one program")[2])
    command = [sys.executable, "-m", "forkshm", "run", "-n", "3", str(path)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "3 workers: 332833500.0\n"
