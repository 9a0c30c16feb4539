"""Tools that follow processes through functions of the standard library reach forkshm's processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from started import methods

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import forkshm as mp

def in_pool(x):
    y = x + 1
    return y

def in_process():
    z = 5
    print(z)

def in_executor(x):
    w = x * 2
    return w

def in_process_that_fails():
    v = 1
    sys.exit(v + 2)

if __name__ == "__main__":
    ctx = mp.get_context(sys.argv[1])
    pool = ctx.Pool(2)
    assert pool.map(in_pool, range(4)) == [1, 2, 3, 4]
    pool.close()
    pool.join()
    with mp.Executor(1, ctx) as executor:
        assert executor.submit(in_executor, 2).result() == 4
    p = ctx.Process(target=in_process)
    p.start()
    p.join()
    assert p.exitcode == 0, p.exitcode
    p = ctx.Process(target=in_process_that_fails)
    p.start()
    p.join()
    assert p.exitcode == 3, p.exitcode
"""

# A tool that patches like coverage does, and records the processes in a file.
TOOL = """
import multiprocessing.process, multiprocessing.spawn, os, sys
Base = multiprocessing.process.BaseProcess

class Stowaway:
    def __setstate__(self, state):
        patch(state["path"])
    def __getstate__(self):
        return {"path": self.path}

def patch(path):
    inner, data = Base._bootstrap, multiprocessing.spawn.get_preparation_data
    def _bootstrap(self, *args, **kwargs):
        with open(path, "a") as file: file.write(f"begin {os.getpid()} {self.name}\\n")
        try:
            return inner(self, *args, **kwargs)
        finally:
            with open(path, "a") as file: file.write(f"end {os.getpid()}\\n")
    def get_preparation_data(name):
        stowaway = Stowaway()
        stowaway.path = path
        return {**data(name), "stowaway": stowaway}
    Base._bootstrap = _bootstrap
    multiprocessing.spawn.get_preparation_data = get_preparation_data
"""

USES_TOOL = """
import multiprocessing, os, sys
import tool, forkshm

def who(_):
    return os.getpid(), multiprocessing.current_process().name, multiprocessing.current_process().daemon

if __name__ == "__main__":
    tool.patch(sys.argv[2])
    ctx = forkshm.get_context(sys.argv[1])
    with ctx.Pool(1) as pool:
        pid, name, daemon = pool.apply(who, (1,))
        assert "PoolWorker" in name and daemon, (name, daemon)
    lines = open(sys.argv[2]).read().splitlines()
    assert lines == [f"begin {pid} {name}", f"end {pid}"], (lines, pid)
    print("seen")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", methods("fork", "forkserver", "spawn"))
def test_coverage_measures_forkshm_processes(tmp_path, method):
    pytest.importorskip("coverage")
    (tmp_path / "prog.py").write_text(PROGRAM)
    (tmp_path / ".coveragerc").write_text(
        "[run]\nconcurrency = multiprocessing\nparallel = True\nsource = .\nsigterm = True\n"
    )
    coverage = [sys.executable, "-m", "coverage"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}

    def run(*words):
        subprocess.run([*coverage, *words], cwd=tmp_path, env=environment, check=True, timeout=90, capture_output=True)

    run("run", "prog.py", method)
    run("combine")
    run("json")
    seen = json.loads((tmp_path / "coverage.json").read_text())["files"]["prog.py"]
    assert seen["missing_lines"] == []


@pytest.mark.parametrize("method", methods("fork", "forkserver", "spawn"))
def test_patches_of_the_standard_library_reach_forkshm_processes(tmp_path, method):
    (tmp_path / "tool.py").write_text(textwrap.dedent(TOOL))
    (tmp_path / "prog.py").write_text(USES_TOOL)
    done = subprocess.run(
        [sys.executable, "prog.py", method, str(tmp_path / "seen")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("seen\n", 0), done.stderr
