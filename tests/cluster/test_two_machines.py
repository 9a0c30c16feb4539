"""Executors on nodes in network namespaces of their own, as on several machines."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("numpy")
pytest.importorskip("distributed")

pytestmark = pytest.mark.slow

PROGRAM = pathlib.Path(__file__).parent / "two_machines.py"


def can_make_networks():
    """Return whether this user may make network namespaces, and bridges in them."""
    try:
        made = subprocess.run(
            ["unshare", "--net", "ip", "link", "add", "bridge0", "type", "bridge"], capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return os.getuid() == 0 and made.returncode == 0


def test_an_array_crosses_to_each_machine_once_and_the_death_of_one_loses_no_call(tmp_path):
    if not can_make_networks():
        pytest.skip("needs root, ip and unshare")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, str(PROGRAM)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["networks"] == 2
    assert not found["is here"]
    assert found["is right"]
    assert found["survived"]
    assert all(0.9 < copies < 1.2 for copies in found["copies"]), found
