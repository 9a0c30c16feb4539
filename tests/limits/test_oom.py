"""A control group without memory: the kernel's out-of-memory killer, and how forkshm avoids it."""

from __future__ import annotations

import os
import pathlib
import time

import pytest

import forkshm
from forkshm.backend import _groups

pytestmark = pytest.mark.slow

LIMIT = 200 * 2**20

MOVE = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as members:
    members.write(str(os.getpid()))
import forkshm
"""


@pytest.fixture
def small_group():
    """Provide the directory of a control group whose processes may use 200 MB together."""
    made = None
    why = "this process is in no group"
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, limits = "/sys/fs/cgroup", {"memory.max": LIMIT, "memory.swap.max": 0}
        elif "memory" in controllers.split(","):
            root, limits = (
                "/sys/fs/cgroup/memory",
                {"memory.limit_in_bytes": LIMIT, "memory.memsw.limit_in_bytes": LIMIT},
            )
        else:
            continue
        directory = pathlib.Path(f"{root}{group.rstrip('/')}/forkshm-test-{os.getpid()}")
        try:
            directory.mkdir()
        except OSError as error:
            why = str(error)
            continue
        if not (directory / next(iter(limits))).exists():
            directory.rmdir()
            why = f"{directory.parent} does not hand its memory controller on"
            continue
        made = directory
        for name, value in limits.items():
            if (made / name).exists():  # the limit on swap, if there is any
                (made / name).write_text(str(value))
        break
    if made is None:
        pytest.skip(f"no control group of its own for a test: {why}")
    yield made
    deadline = time.monotonic() + 20
    while True:
        try:
            made.rmdir()
        except OSError:  # the kernel has not removed the last processes yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            break


@pytest.mark.needs("memory_limits")
def test_a_worker_that_the_kernel_kills_for_memory_fails_its_task_with_the_evidence(run_script, small_group):
    out = run_script(
        MOVE
        + """
import signal

def eat(nbytes):
    return len(b"x" * nbytes)

def fill(array):
    array.fill(1)

with forkshm.Pool(2) as pool:
    others = [pool.apply_async(abs, (-x,)) for x in range(50)]
    shared = forkshm.zeros(2**26)  # 512 MB, which takes none until somebody writes
    for function, argument in ((eat, 2**30), (fill, shared), (signal.raise_signal, signal.SIGKILL)):
        try:
            pool.apply(function, (argument,))
        except forkshm.WorkerDiedError as error:
            print(error.signal, str(error).partition('; ')[2])
        else:
            raise SystemExit("it was not killed")
        shared = None
    assert [other.get() for other in others] == list(range(50))
    assert pool.map(abs, range(100)) == list(range(100))
""",
        small_group,
    )
    first, second, third = out.splitlines()
    assert first.startswith("SIGKILL the kernel's out-of-memory killer: oom_kill in ")
    assert first.endswith("rose from 0 to 1 meanwhile")
    assert small_group.name in first
    assert second.endswith("rose from 1 to 2 meanwhile")
    assert third == f"SIGKILL not by the out-of-memory killer: oom_kill in {first.split()[7]} did not change"


@pytest.mark.needs("memory_limits")
def test_a_parent_that_the_kernel_kills_for_memory_takes_its_workers_along(run_script, small_group):
    done = run_script(
        MOVE
        + """
with forkshm.Pool(2) as pool:
    pool.map(abs, range(10))
    print(len(b"x" * 2**30))
""",
        small_group,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-9, "")
    deadline = time.monotonic() + 20
    while (small_group / "cgroup.procs").read_text():
        assert time.monotonic() < deadline, "its workers live on"
        time.sleep(0.01)


@pytest.mark.needs("memory_limits")
@pytest.mark.needs("populate")
def test_to_populate_more_than_a_group_has_left_is_an_exception(run_script, small_group):
    out = run_script(
        MOVE
        + """
import errno
small = forkshm.anonymous_shared_memory(50 * 2**20, populate=True)
try:
    forkshm.anonymous_shared_memory(200 * 2**20, populate=True)
except forkshm.errors.RegionCreateError as error:
    print(error.errno == errno.ENOMEM, error)
del small
whole = forkshm.anonymous_shared_memory(100 * 2**20, populate=True)
whole.buf[:] = bytes(whole.size)
""",
        small_group,
    )
    assert out.startswith(
        "True [Errno 12] cannot allocate 209,715,200 bytes of memory: the control group of this process has "
    )
    assert "raise the limit" in out


@pytest.mark.needs("memory_limits")
@pytest.mark.needs("populate")
def test_the_doctor_shows_the_memory_left_in_a_group(run_script, small_group):
    out = run_script(MOVE + "import sys\nfrom forkshm.__main__ import main\nsys.exit(main(['doctor']))\n", small_group)
    (line,) = [line for line in out.splitlines() if "memory of this cgroup" in line]
    assert "MiB left" in line


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Create directories that look like the kernel's, of both versions."""
    monkeypatch.setattr(_groups, "_V1", f"{tmp_path}/memory")
    monkeypatch.setattr(_groups, "_V2", str(tmp_path))
    monkeypatch.setattr(_groups, "_MEMBERSHIP", f"{tmp_path}/membership")
    monkeypatch.setattr(_groups, "_MACHINE", f"{tmp_path}/meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  24000 kB\nSwapFree:   1 kB\n")

    def write(membership, files):
        (tmp_path / "membership").write_text(membership)
        for path, content in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return write


def test_the_tightest_parent_group_counts_in_version_2(groups):
    groups(
        "1:name=systemd:/\n0::/a/b\n",
        {
            "a/memory.max": "1000000\n",
            "a/memory.current": "600000\n",
            "a/memory.stat": "anon 5\ninactive_file 1000\nactive_file 200\nslab_reclaimable 30\nshmem 7\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "500000\n",
            "a/b/memory.stat": "anon 5\n",
        },
    )
    assert _groups.memory_left() == 1_000_000 - 600_000 + 1230 + 1024


def test_the_first_version_of_groups_is_read_too(groups):
    groups(
        "9:cpu:/b\n4:hugetlb,memory:/b\n0::/\n",
        {
            "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "memory/memory.usage_in_bytes": "9999\n",
            "memory/memory.stat": "cache 5\n",
            "memory/b/memory.limit_in_bytes": "50000\n",
            "memory/b/memory.usage_in_bytes": "60000\n",  # the limit was set below the usage
            "memory/b/memory.stat": "cache 5\ninactive_file 1000\n",
        },
    )
    assert _groups.memory_left() == 50_000 - 60_000 + 1000 + 1024


@pytest.mark.needs("memory_limits")
@pytest.mark.needs("populate")
def test_populate_beyond_the_memory_of_a_group_is_refused(groups):
    groups(
        "4:memory:/b\n",
        {
            "memory/b/memory.limit_in_bytes": "50000\n",
            "memory/b/memory.stat": "",
            "memory/b/memory.usage_in_bytes": "60000\n",
        },
    )
    with pytest.raises(forkshm.errors.RegionCreateError, match="has 0 left"):
        forkshm.anonymous_shared_memory(1, populate=True)
    forkshm.anonymous_shared_memory(1).close()


@pytest.mark.parametrize("membership", ["", "0::/\n", "0::/gone\n", "4:memory:/gone\n", "nonsense\n"])
def test_where_no_limit_can_be_read_there_is_none(groups, membership):
    groups(membership, {})
    assert _groups.memory_left() is None


def test_files_that_the_kernel_would_not_write_are_no_limit(groups):
    groups("0::/\n", {"memory.max": "many\n", "memory.stat": ""})
    assert _groups.memory_left() is None
