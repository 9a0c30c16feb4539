"""Processes that a subinterpreter starts (PEP 734)."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info < (3, 14), reason="there is no concurrent.interpreters"),
]

PROGRAM = """
from concurrent import interpreters

IN_IT = '''
import forkshm
with forkshm.get_context({method!r}).Pool(1) as pool:
    print(pool.map(abs, [-1, 2]), flush=True)
process = forkshm.get_context({method!r}).Process(target=abs, args=(1,))
process.start()
process.join()
print(process.exitcode, flush=True)
'''

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        interpreter = interpreters.create()
        interpreter.exec(IN_IT.format(method=method))
        interpreter.close()
    try:
        interpreters.create().exec(IN_IT.format(method="fork"))
    except interpreters.ExecutionFailed as error:
        print(error.excinfo.msg)
"""


def test_a_subinterpreter_starts_processes_that_are_not_forked(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    got = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=100, check=False)
    shown = ["[1, 2]", "0"] * 2 + ["fork not supported for isolated subinterpreters"]
    assert got.stdout.splitlines() == shown, got.stderr
