"""gevent and eventlet replace the blocking functions of a process: pools and managers raise, and queues work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from started import methods

PATCHES = [
    ("gevent", "from gevent import monkey; monkey.patch_all()"),
    ("eventlet", "import eventlet; eventlet.monkey_patch()"),
]


def run(library, program, *arguments):
    # Not imported here: eventlet warns at each fork of its process.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"no {library}")
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(("what", "start"), [("a pool", "Pool(1).map(abs, [1])"), ("a manager", "Manager()")])
@pytest.mark.parametrize(("library", "patch"), PATCHES)
def test_waiting_for_other_processes_is_refused(library, patch, what, start):
    done = run(library, f"{patch}\nimport forkshm\nforkshm.{start}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"UnsupportedError: {what} cannot run here" in last, done.stderr
    assert library in last


WORKS = """
import forkshm
{late}
context = forkshm.get_context({method!r})
queue = context.Queue()
process = context.Process(target=queue.put, args=([1, 2],))
process.start()
print(queue.get(timeout=20))
process.join()
here, there = context.Pipe()
there.send("sent")
print(here.poll(5), here.recv())
"""


@pytest.mark.needs("fork")
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("method", [*methods("fork"), pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("library", "patch"), PATCHES)
def test_queues_pipes_and_processes_work(library, patch, method, is_late):
    program = WORKS.format(late=patch if is_late else "", method=method)
    done = run(library, program if is_late else f"{patch}\n{program}")
    if (library, method, is_late) == ("eventlet", "spawn", False):  # it removes what sends fds
        assert "UnsupportedError: a process that is not forked cannot run here" in done.stderr
        return
    assert done.stdout == "[1, 2]\nTrue sent\n", done.stderr
    assert "forkshm" not in done.stderr
