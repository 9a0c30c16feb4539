"""Under ``-W error -X dev -bb``, forkshm causes no warning."""

from __future__ import annotations

import subprocess
import sys

import pytest
from started import IGNORE_EXPERIMENTS

PROGRAMS = {
    "pool": "with forkshm.Pool(2) as pool: assert pool.map(abs, [-1]) == [1]",
    "imap": "with forkshm.Pool(2) as pool: assert list(pool.imap(abs, iter([-1]))) == [1]",
    "callbacks": "with forkshm.Pool(2) as pool: assert pool.apply_async(abs, (-1,), callback=print).get() == 1",
    "process": "process = forkshm.Process(target=print); process.start(); process.join(); process.close()",
    "queue": "queue = forkshm.Queue(); queue.put(1); assert queue.get() == 1; queue.close(); queue.join_thread()",
    "dropped queue": "forkshm.Queue().put(1)",
    "pipe": "a, b = forkshm.Pipe(); a.send(1); assert b.recv() == 1",
    "executor": "executor = forkshm.Executor(2); assert list(executor.map(abs, [-1])) == [1]",
    "manager": "with forkshm.Manager() as manager: assert manager.dict(a=1).copy() == {'a': 1}",
    "locks": "with forkshm.Lock(), forkshm.RLock(): forkshm.Value('i', 3).value += 1",
    "regions": "region = forkshm.anonymous_shared_memory(10); assert len(region.buf) == 10",
    "containers": "assert list(forkshm.SharedDict({1: 2})) == [1]",
    "team": "with forkshm.team(2) as team: pass",
    "launch": "forkshm.launch(print, workers=2)",
    "asyncio": """
import asyncio
async def main():
    async with forkshm.aio.Pool(2) as pool:
        assert await pool.call(abs, -1) == 1
asyncio.run(main())""",
    "arrays": """
import numpy
with forkshm.Pool(2) as pool:
    assert pool.apply(numpy.sum, (numpy.ones(100_000),)) == 100_000
    assert forkshm.zeros(5).sum() == 0""",
    "modules": """
import forkshm.connection, forkshm.heap, forkshm.managers, forkshm.queues, forkshm.shared_memory, forkshm.spawn
import forkshm.synchronize, forkshm.util, forkshm.pool, forkshm.spmd, forkshm.executor, forkshm.testing""",
    "functions by value": """
with forkshm.Pool(1) as pool: assert pool.map(lambda x: x + 1, [1]) == [2]""",
    "spawn": """
if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        with forkshm.get_context(method).Pool(1) as pool:
            assert pool.map(abs, [-1]) == [1]""",
    "arguments of processes": """
def use(a, simple, queue):
    queue.put(1)
    a.send(simple.get())
    a.close()

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        context = forkshm.get_context(method)
        (a, b), simple, queue = context.Pipe(), context.SimpleQueue(), context.Queue()
        process = context.Process(target=use, args=(a, simple, queue))
        process.start()
        simple.put(5)
        assert (b.recv(), queue.get()) == (5, 1)
        process.join()""",
    "doctor": "from forkshm.__main__ import main; main(['doctor'])",
}


@pytest.mark.needs("fork")
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_warns(tmp_path, name):
    path = tmp_path / "program.py"
    path.write_text("import forkshm\n" + PROGRAMS[name])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", IGNORE_EXPERIMENTS, "-X", "dev", "-bb", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # There asyncio also reports slow steps.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.returncode, said) == (0, [])
