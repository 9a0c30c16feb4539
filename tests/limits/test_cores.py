"""The default number of workers: affinity, quotas of control groups, and Python's own option."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from forkshm.backend import _groups, kernel

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities of processes")

PRINT = "import forkshm; print(forkshm.Executor()._max_workers)"


def run(code, *options, **environment):
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write files of control groups, and use them instead of the system's."""

    def write(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(_groups, "_MEMBERSHIP", str(tmp_path / "membership"))
        monkeypatch.setattr(_groups, "_V2", str(tmp_path / "mounted"))
        monkeypatch.setattr(_groups, "_V1_CPU", str(tmp_path / "mounted/cpu"))

    return write


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        # A container sees its own group as the root of the mount.
        ("0::/docker/1234\n", {"cpu.max": "100000 50000\n"}, 2.0),
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "250000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "20000\n", "cpu/x/cpu.cfs_period_us": "nonsense\n"}, None),
        ("4:cpuset:/x\n", {"cpu/cpu.cfs_quota_us": "20000\n", "cpu/cpu.cfs_period_us": "10000\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_quota_of_a_control_group(groups, membership, files, quota):
    groups(membership, files)
    assert _groups.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "cores"), [("10000", 1), ("110000", 2), ("350000", 4), ("99900000", 8), ("max", 8)])
def test_cores_are_within_the_quota_rounded_up(groups, quota, cores):
    groups("0::/\n", {"cpu.max": f"{quota} 100000\n"})
    assert _groups.within_quota(8) == cores


def test_a_real_group_limits_the_default_number_of_workers():
    if kernel.usable_cores() < 2:
        pytest.skip("needs two cores")
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        mount = (
            "/sys/fs/cgroup/cpu" if "cpu" in controllers.split(",") else "/sys/fs/cgroup" if not controllers else None
        )
        if mount is None:
            continue
        directory = pathlib.Path(f"{mount}{group.rstrip('/')}/forkshm-cores-{os.getpid()}")
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            if (directory / "cpu.max").exists():
                (directory / "cpu.max").write_text("100000 100000")
            elif (directory / "cpu.cfs_quota_us").exists():
                (directory / "cpu.cfs_quota_us").write_text("100000")
            else:
                continue
            move = f"import os; open({str(directory / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            assert run(move + PRINT) == "1"
            return
        except OSError:
            continue
        finally:
            directory.rmdir()
    pytest.skip("no control group of its own for a test")


def test_affinity_limits_the_default_number_of_workers():
    core = min(os.sched_getaffinity(0))
    assert run(f"import os; os.sched_setaffinity(0, {{{core}}})\n{PRINT}") == "1"


@pytest.mark.skipif(sys.version_info < (3, 13), reason="needs os.process_cpu_count")
def test_the_number_given_to_python_is_taken():
    assert run(PRINT, "-X", "cpu_count=7") == "7"
    assert run(PRINT, PYTHON_CPU_COUNT="5") == "5"


def test_the_cpu_count_option_of_python_is_used(monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 7, raising=False)
    assert kernel.default_workers() == 7
    monkeypatch.setattr(os, "process_cpu_count", lambda: len(os.sched_getaffinity(0)))
    assert kernel.default_workers() == kernel.usable_cores()
