"""``python -m forkshm``: doctor, ls, top, clean."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import forkshm
from forkshm import _system
from forkshm.__main__ import COMMANDS, main
from forkshm._commands import _scan, _table, clean
from forkshm._commands._scan import SHM, scan
from forkshm.backend import kernel

pytestmark = pytest.mark.slow


@pytest.fixture
def shell():
    """Run a command in another process; return its exit code and its output."""

    def run(*words, typed=""):
        done = subprocess.run(
            [sys.executable, "-m", "forkshm", *words], input=typed, capture_output=True, text=True, timeout=60
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    return run


@pytest.fixture
def named():
    """Provide a name in /dev/shm for this test."""
    name = f"forkshm-test-{os.getpid()}-clean"
    yield name
    forkshm.SharedMemoryObject.remove(name)


def make(name, nbytes=5000):
    with forkshm.SharedMemoryObject("create_only", name) as memory:
        memory.truncate(nbytes)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_describes_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m forkshm {name}" in capsys.readouterr().out


def test_without_a_command_the_commands_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "doctor" not in capsys.readouterr().out


def test_the_doctor_lists_findings_and_consequences(shell):
    code, out = shell("doctor")
    assert code == 0
    assert forkshm.__version__ in out
    words = {
        "linux": ("memfd", "works", "open files", "/dev/shm", "reported"),
        "posix": ("datagrams", "works", "open files", "/dev/shm", "seal() raises UnsupportedError"),
        "windows": ("are spawned", "cannot be sealed", "handles", "not committed", "FORKSHM_FOLDER", "64.0 KiB"),
    }[kernel.name]
    for word in ("Pool() starts", *words):
        assert word in out


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["ls"], "/proc"),
        (["top", "--count", "1"], "/proc"),
        (["clean", "--dry-run"], "/proc"),
        (["run", "-n", "2", "x.py"], "fork"),
    ],
    ids=["ls", "top", "clean", "run"],
)
def test_a_command_for_which_something_is_missing_says_what(words, telling, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_scan, "PROC", str(tmp_path))
    monkeypatch.setattr(_system, "CAN_FORK", False)
    assert main(words) == 1
    out, said = capsys.readouterr()
    assert not out
    assert said.startswith(f"python -m forkshm {words[0]}: ")
    assert telling in said
    assert said.count("\n") == 1


@pytest.mark.needs("memfd")
def test_the_doctor_measures_the_gain_of_huge_pages(monkeypatch):
    from forkshm._commands import _doctor_unix

    def found():
        return next(line for line in _doctor_unix._huge_pages() if line[0] == "filling new shared memory")

    assert found()[1].endswith(" GB/s")
    monkeypatch.setattr(_doctor_unix, "_read", lambda _: "always [never]")
    monkeypatch.setattr(_doctor_unix, "_fill_shared", lambda _: 0.02)
    monkeypatch.setattr(_doctor_unix, "_fill_private", lambda _: 0.005)
    assert found()[1:3] == (
        "1.7 GB/s",
        f"in huge pages about 6.7 GB/s, after: echo advise > {_doctor_unix._SHMEM_ENABLED} (as root)",
    )
    monkeypatch.setattr(_doctor_unix, "_fill_private", lambda _: 0.019)
    assert found()[2] == ""


@pytest.mark.needs("fd_limit")
def test_the_doctor_marks_missing_features(in_child, capfd):
    def ask():
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        assert main(["doctor"]) == 0
        assert main(["doctor", "--strict"]) == 1

    assert in_child(ask) == 0


@pytest.mark.needs("commands")
@pytest.mark.needs("labels")
def test_ls_names_creator_holders_size_and_resident_bytes(shell, in_child):
    size = 4096 * 1234 + os.getpid() % 4096
    with forkshm.anonymous_shared_memory(size) as region:
        region.buf[:8192] = bytes(8192)
        go_read, go_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go_write)
            os.read(go_read, 1)
            os._exit(0)
        try:
            code, out = shell("ls", "--json", "--pid", str(os.getpid()))
            assert code == 0
            (found,) = [one for one in json.loads(out) if one["size"] == size]
            assert found["kind"] == "region"
            assert found["creator"] == os.getpid()
            assert found["owner"] == os.geteuid()
            assert found["resident"] == 8192
            assert found["holders"] == sorted([os.getpid(), pid])
            assert 0 <= found["age"] < 3600
            _, text = shell("ls", "--pid", str(pid))
            assert f"{os.getpid()} " in text
            assert "4.8 MiB" in text
        finally:
            os.close(go_write)
            os.close(go_read)
            os.waitpid(pid, 0)
    _, out = shell("ls", "--json")
    assert size not in [one["size"] for one in json.loads(out)]


@pytest.mark.needs("commands")
def test_ls_sees_memory_that_is_only_mapped(in_child):
    def look():
        size = 4096 * 4321
        region = forkshm.anonymous_shared_memory(size)
        os.close(region.fileno())
        (found,) = [one for one in scan().memory if one.size == size]
        assert found.resident is None
        assert found.holders == {os.getpid()}
        os._exit(0)

    assert in_child(look) == 0


@pytest.mark.needs("commands")
@pytest.mark.needs("labels")
def test_ls_shows_the_warm_memory_of_pools_and_a_creator_that_ended(pool, shell):
    import numpy as np

    kept = pool.apply(np.ones, (100_000,))
    (worker,) = {one.creator for one in scan().memory if one.kind == "arena" and os.getpid() in one.holders} - {
        os.getpid()
    }
    pool.terminate()
    _, text = shell("ls", "--pid", str(os.getpid()))
    assert f"{worker} (ended)" in text
    assert kept.sum() == 100_000


@pytest.mark.needs("commands")
def test_top_lists_as_often_as_requested(shell):
    code, out = shell("top", "--count", "2", "--interval", "0.01")
    assert code == 0
    assert out.count("memory objects") == 2
    assert shell("top", "--interval", "0")[0] == 2


@pytest.mark.needs("commands")
def test_clean_shows_asks_and_removes(shell, named):
    make(named)
    code, out = shell("clean", named, "--older", "0", "--dry-run")
    assert code == 0
    assert f"{named}" in out
    for refusal in ("n\n", "\n", ""):
        code, out = shell("clean", named, "--older", "0", typed=refusal)
        assert (code, "removed nothing" in out) == (1, True)
        assert os.path.exists(f"{SHM}/{named}")
    code, out = shell("clean", named, "--older", "0", typed="y\n")
    assert (code, f"removed {named}" in out) == (0, True)
    assert not os.path.exists(f"{SHM}/{named}")


@pytest.mark.needs("commands")
def test_clean_keeps_used_young_and_other_objects(shell, named):
    make(named)
    assert "no unused named memory" in shell("clean", named, "--yes")[1]  # younger than a minute
    assert "no unused named memory" in shell("clean", named + "x*", "--older", "0", "--yes")[1]
    with forkshm.SharedMemoryObject("open_only", named):
        assert "no unused named memory" in shell("clean", named, "--older", "0", "--yes")[1]
    with forkshm.SharedMemoryObject("open_only", named) as memory:
        region = forkshm.MappedRegion(memory)
    assert "no unused named memory" in shell("clean", named, "--older", "0", "--yes")[1]
    region.close()
    assert f"removed {named}" in shell("clean", named, "--older", "0", "--yes")[1]


@pytest.mark.needs("commands")
def test_clean_looks_again_after_the_answer(named, monkeypatch, capsys):
    make(named)
    opened = []

    def answer(prompt):
        opened.append(forkshm.SharedMemoryObject("open_only", named))
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    assert main(["clean", named, "--older", "0"]) == 0
    assert "now in use or gone" in capsys.readouterr().out
    assert os.path.exists(f"{SHM}/{named}")
    opened[0].close()


@pytest.mark.needs("commands")
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_clean_keeps_objects_of_other_users(named):
    make(named)
    os.chown(f"{SHM}/{named}", 65534, 65534)
    (found,) = [one for one in scan().memory if one.name == named]
    assert not clean.unused(found, "*", 0)
    os.chown(f"{SHM}/{named}", 0, 0)


def test_tables_are_plain_text_where_rich_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich.markup", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _table.show(("name", ">size"), [["a", "1 B"], ["longer", "100 B"]])
    assert capsys.readouterr().out == "name     size\na         1 B\nlonger  100 B\n"


def test_a_table_of_rich_has_the_same_cells(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _table.show(("name", ">size"), [["[red]a", "1 B"]])
    out = capsys.readouterr().out
    assert "[red]a" in out
    assert "1 B" in out


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5,120.0 GiB"), (None, "?")],
)
def test_bytes_are_said_in_the_unit_that_suits(number, said):
    assert _table.nbytes(number) == said
