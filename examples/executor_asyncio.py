"""forkshm.Executor and forkshm.aio: futures and awaits over the same kind of pool.

An event loop hashes the modules of the standard library in worker processes, once through ``run_in_executor`` and once
through `forkshm.aio`, and stays responsive. A worker is killed meanwhile: one future fails, and the executor continues.

    pip install forkshm
    python examples/executor_asyncio.py
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pathlib
import signal
import sys

import forkshm
from forkshm import aio

SOURCES = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:60]


def digest(path: pathlib.Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sleep_forever() -> None:
    """Run a call that is going to be cancelled."""
    signal.pause()


def die() -> None:
    """Kill this worker, as the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


async def main() -> int:
    """Hash twice, and compare."""
    loop = asyncio.get_running_loop()
    with forkshm.Executor(2) as executor:
        doomed = executor.submit(die)
        by_executor = await asyncio.gather(*(loop.run_in_executor(executor, digest, path) for path in SOURCES))
        print(f"executor: {len(by_executor)} files hashed; one future failed: {type(doomed.exception()).__name__}")

    async with aio.Pool(2) as pool:
        by_aio = [answer async for answer in pool.imap(digest, SOURCES)]
        try:
            await asyncio.wait_for(pool.call(sleep_forever), 0.1)
        except TimeoutError:
            print("aio: a call that took too long was cancelled, and its worker ended")
        # As many calls as there are workers: each worker is free, or new.
        again = await asyncio.gather(*(pool.call(digest, path) for path in SOURCES[:2]))

    if not by_executor == by_aio == [digest(path) for path in SOURCES] or again != by_aio[:2]:
        print("executor_asyncio: the answers differ", file=sys.stderr)
        return 1
    print("proved: executor, asyncio and plain calls have the same answers")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
