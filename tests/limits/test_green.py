"""gevent and eventlet replace the blocking functions of a process; a pool raises there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("library", "patch"),
    [
        ("gevent", "from gevent import monkey; monkey.patch_all()"),
        ("eventlet", "import eventlet; eventlet.monkey_patch()"),
    ],
)
def test_a_pool_is_refused_where_blocking_functions_are_replaced(library, patch):
    # Not imported here: eventlet warns at each fork of its process.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"no {library}")
    program = f"{patch}\nimport forkshm\nforkshm.Pool(1).map(abs, [1])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "UnsupportedError: a pool cannot run here" in last, done.stderr
    assert library in last
