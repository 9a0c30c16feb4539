"""Programs that are a package, a module of one, a directory or an archive, beside modules named like forkshm's."""

from __future__ import annotations

import os
import subprocess
import sys
import zipapp

import pytest
from started import methods

import forkshm
from forkshm._system import CAN_FORK

PROGRAM = """
import sys, forkshm
def f(x): return x + 1
if __name__ == "__main__":
    with forkshm.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(f, [1, 2]))
"""


@pytest.mark.parametrize("method", [*methods("fork", "spawn"), pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["-m package", "-m module", "directory", "archive", "shadowed"])
def test_a_program_works_in_every_way_to_start_it(tmp_path, way, method):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__main__.py").write_text(PROGRAM)
    words = [str(package)]
    if way.startswith("-m"):
        (package / "__init__.py").touch()
        (package / "module.py").write_text(PROGRAM)
        words = ["-m", "package" if way == "-m package" else "package.module"]
    elif way == "archive":
        words = [str(tmp_path / "program.pyz")]
        zipapp.create_archive(package, words[0])
    elif way == "shadowed":
        for name in ("queues", "pool", "errors", "context"):
            (tmp_path / f"{name}.py").write_text("1 / 0")
        (tmp_path / "program.py").write_text(PROGRAM)
        words = ["program.py"]
    done = subprocess.run(
        [sys.executable, *words, method], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[2, 3]\n", 0), done.stderr


@pytest.mark.parametrize("method", methods("fork", "forkserver", "spawn"))
def test_a_program_on_standard_input_works(tmp_path, method):
    done = subprocess.run(
        [sys.executable, "-", method],
        input=PROGRAM,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("[2, 3]\n", 0), done.stderr


# With a name that another process cannot read the program from.
UNREADABLE = (
    PROGRAM.replace(
        "    with",
        """    import os
    if not __file__.startswith("/dev"):
        os.remove(__file__)
    with""",
    )
    + "    print(bool(__file__))"
)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd")
@pytest.mark.parametrize("way", ["deleted", "pipe", "file"])
def test_a_spawned_worker_needs_no_file_of_the_program(tmp_path, way):
    path = tmp_path / "program.py"
    path.write_text(UNREADABLE)
    fds: tuple[int, ...] = ()
    if way == "pipe":
        fds = os.pipe()
        os.write(fds[1], UNREADABLE.encode())
        os.close(fds[1])
    elif way == "file":
        fds = (os.open(path, os.O_RDONLY),)
    done = subprocess.run(
        [sys.executable, f"/dev/fd/{fds[0]}" if fds else str(path), "spawn"],
        pass_fds=fds[:1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    for fd in fds[:1]:
        os.close(fd)
    assert (done.stdout, done.returncode) == ("[2, 3]\nTrue\n", 0), done.stderr


@pytest.mark.parametrize("tool", ["pdb", "cProfile"])
@pytest.mark.parametrize("method", methods("fork", "spawn"))
def test_a_program_works_inside_a_tool(tmp_path, tool, method):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = ["-c", "continue"] if tool == "pdb" else ["-o", str(tmp_path / "profile")]
    done = subprocess.run(
        [sys.executable, "-m", tool, *words, str(program), method],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "[2, 3]\n" in done.stdout, done.stdout + done.stderr


PRELOAD = """
import sys, warnings
import forkshm
if __name__ == "__main__":
    names = ["json.tool", "no_such_module", "colorsys"]
    forkshm.set_forkserver_preload(names, on_error=sys.argv[1])
    process = forkshm.get_context("forkserver").Process(target=print, args=("started",))
    try:
        process.start()
        process.join()
    except (EOFError, OSError, forkshm.ForkshmError) as error:
        print("refused")
"""


@pytest.mark.skipif(not CAN_FORK, reason="needs a fork server")
@pytest.mark.parametrize("on_error", ["ignore", "warn", "fail"])
def test_a_module_that_the_fork_server_cannot_import(tmp_path, on_error):
    program = tmp_path / "program.py"
    program.write_text(PRELOAD)
    done = subprocess.run(
        [sys.executable, "-W", "always", str(program), on_error], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ("refused\n" if on_error == "fail" else "started\n"), done.stderr
    assert ("no_such_module" in done.stderr) is (on_error != "ignore")
    assert ("ImportWarning: the fork server cannot import 'no_such_module'" in done.stderr) is (on_error == "warn")


@pytest.mark.skipif(not CAN_FORK, reason="needs a fork server")
def test_a_module_that_cannot_be_preloaded_is_refused_at_once():
    with pytest.raises(ValueError, match="'ignore', 'warn' or 'fail'"):
        forkshm.set_forkserver_preload(["json"], on_error="explode")
    with pytest.raises(TypeError):
        forkshm.set_forkserver_preload([1], on_error="warn")
