"""Types as an editor sees them: the files of tests/typing are never run, and type checkers find no errors.

The checkers run in another folder, so they see forkshm as it is installed: from a wheel, or in editable form.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

TYPING = pathlib.Path(__file__).parent / "typing"


@pytest.fixture
def programs(tmp_path):
    """Return the path of a folder that has the files of tests/typing, outside the checkout."""
    return pathlib.Path(shutil.copytree(TYPING, tmp_path / "programs"))


@pytest.mark.slow
def test_type_checkers_know_the_results(programs, tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, *(path.name for path in sorted(programs.glob("*.py")))],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=programs,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_knows_them_too(programs, tmp_path):
    # Only the pyright from PyPI, in its own mode.
    pytest.importorskip("basedpyright")
    config = {
        "include": [str(programs)],
        "typeCheckingMode": "standard",
        # Each line that mypy should find wrong is wrong.
        "reportUnnecessaryTypeIgnoreComment": "error",
        # An import that has types but no source would have a warning in every editor.
        "reportMissingModuleSource": "error",
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
