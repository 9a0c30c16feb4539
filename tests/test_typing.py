"""Types as an editor sees them: the files of tests/typing are never run, and type checkers find no errors."""

from __future__ import annotations

import json
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


@pytest.mark.slow
def test_pyright_knows_them_too(tmp_path):
    # Only the pyright from PyPI, in its own mode.
    pytest.importorskip("basedpyright")
    config = {
        "include": [str(TYPING)],
        "typeCheckingMode": "standard",
        # Each line that mypy should find wrong is wrong.
        "reportUnnecessaryTypeIgnoreComment": "error",
        "extraPaths": [str(TYPING.parent.parent)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "basedpyright",
        "-p",
        str(tmp_path),
        "--pythonpath",
        sys.executable,
        "--outputjson",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = json.loads(done.stdout)
    assert said["generalDiagnostics"] == []
    assert said["summary"]["filesAnalyzed"] >= 1
