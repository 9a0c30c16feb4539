"""``breakpoint()`` in a worker."""

from __future__ import annotations

import os
import sys

import pytest

pytestmark = pytest.mark.needs("terminals")

PROGRAM = """
import forkshm

def look(number):
    answer = number * 2
    breakpoint()
    return answer

if __name__ == "__main__":
    with forkshm.get_context({method!r}).Pool(1) as pool:
        print("result", pool.apply(look, (21,)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_debugger_uses_the_terminal(method, tmp_path):
    import pty

    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(method=method))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(path)])
    said = b""
    try:
        while b"(Pdb" not in said:
            said += os.read(terminal, 4096)
        os.write(terminal, b"p answer + 1000\n")
        while b"1042" not in said:
            said += os.read(terminal, 4096)
        os.write(terminal, b"c\n")
        while b"result 42" not in said:
            said += os.read(terminal, 4096)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    assert b"(Pdb " in said


def test_without_a_terminal_the_error_says_what_to_do(run_script):
    said = run_script("""
import os
import forkshm

def look():
    breakpoint()

if __name__ == "__main__":
    os.setsid() if os.getpid() != os.getsid(0) else None
    with forkshm.get_context("fork").Pool(1) as pool:
        try:
            pool.apply(look)
        except RuntimeError as error:
            print(error)
""")
    assert "cannot stop at breakpoint()" in said
    assert "PYTHONBREAKPOINT" in said


def test_pdb_on_an_empty_standard_input_gets_a_note(run_script):
    said = run_script("""
import pdb
import forkshm

def look():
    pdb.set_trace()
    return 1

if __name__ == "__main__":
    with forkshm.get_context("fork").Pool(1) as pool:
        try:
            pool.apply(look)
        except Exception as error:
            print(type(error).__name__, error.__notes__)
        print("next", pool.apply(abs, (-5,)))
        try:
            pool.apply(exit, (3,))
        except SystemExit as error:
            print("exit", error.code)
""")
    assert "BdbQuit" in said
    assert "next 5" in said
    assert "exit 3" in said
    assert "Call breakpoint(), which uses the terminal." in said


def test_another_debugger_is_left_alone(run_script):
    said = run_script("""
import sys
import forkshm

sys.breakpointhook = lambda: print("mine", flush=True)

if __name__ == "__main__":
    with forkshm.get_context("fork").Pool(1) as pool:
        pool.apply(breakpoint)
""")
    assert "mine" in said
