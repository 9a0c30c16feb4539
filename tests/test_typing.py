"""What an editor knows: the files of tests/typing are never run, and mypy finds nothing to say."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

TYPING = pathlib.Path(__file__).parent / "typing"


@pytest.mark.slow
def test_type_checkers_know_the_results():
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *map(str, sorted(TYPING.glob("*.py")))],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=TYPING.parent.parent,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
