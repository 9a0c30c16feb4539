"""A /dev/shm of 4 MB, on the backend that uses it: lack of room is an error, and never SIGBUS."""

import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
import forkshm

def make(count):
    return np.ones(count)

def refused(call):
    try:
        call()
    except forkshm.errors.RegionCreateError as error:
        assert error.errno == 28 and "/dev/shm" in str(error), error
        return True
    except forkshm.SerializationError as error:
        assert "/dev/shm" in str(error), error
        return True
    return False

pipe, queue = forkshm.Pipe(), forkshm.Queue()
with forkshm.Pool(2) as pool:
    print(
        refused(lambda: pool.apply(np.sum, (np.ones(1_000_000),))),
        refused(lambda: pool.apply(make, (1_000_000,))),
        refused(lambda: pool.map(np.sum, [np.ones(1_000_000)] * 3)),
        refused(lambda: forkshm.zeros(1_000_000)),
        refused(lambda: forkshm.anonymous_shared_memory(2**22)),
        refused(lambda: pipe[0].send(np.ones(1_000_000))),
        refused(lambda: queue.put(np.ones(1_000_000))),
    )
    pipe[0].send(np.ones(1000))
    print(pool.apply(np.sum, (np.ones(10_000),)), pipe[1].recv().sum())
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs mount namespaces")
def test_memory_beyond_the_size_of_dev_shm_is_refused(tmp_path):
    alone = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    mounted = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    if subprocess.run(["unshare", *alone, "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are unavailable here")
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        ["unshare", *alone, "sh", "-c", f'{mounted} && exec "$@"', "sh", sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "FORKSHM_BACKEND": "posix"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["True"] * 7 + ["10000.0", "1000.0"]
