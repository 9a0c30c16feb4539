"""Hugging Face's datasets under patch(): its workers are forkshm processes."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.needs("signals")]

if importlib.util.find_spec("datasets") is None:
    pytest.skip("datasets is not installed: pip install 'forkshm[ecosystem]'", allow_module_level=True)

PROGRAM = """
import os
import forkshm

assert not [name for name in forkshm.patch() if name.startswith("datasets")]
import datasets

def double(row):
    import multiprocess
    return {"pid": os.getpid(), "kind": type(multiprocess.current_process()).__module__, "twice": row["x"] * 2}

def die(row):
    if row["x"] == 60:
        os.kill(os.getpid(), 9)
    return row

if __name__ == "__main__":
    rows = datasets.Dataset.from_dict({"x": list(range(100))})
    got = rows.map(double, num_proc=2)
    assert got["twice"][:] == [x * 2 for x in range(100)]
    assert set(got["kind"]) == {"forkshm.processes"} and os.getpid() not in got["pid"]
    try:
        rows.map(die, num_proc=2)
    except (forkshm.WorkerDiedError, RuntimeError) as error:  # theirs when they notice first
        assert "SIGKILL" in str(error) or "abruptly died" in str(error), error
    else:
        raise SystemExit("no error")
    print("done")
"""


def test_map_runs_in_our_workers(run_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_script(PROGRAM).split()[-1] == "done"
