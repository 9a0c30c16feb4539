"""Threads use one executor in every way while workers are killed; the program ends when all results have arrived.

python tests/stress/executor.py --seconds 60 --seed 7
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import faulthandler
import os
import random
import signal
import sys
import threading
import time

import forkshm

PATIENCE = 60.0


def work(x):
    if x % 97 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if x % 50 == 1:
        time.sleep(0.002)
    return x


class Unpicklable:
    def __reduce__(self):
        raise TypeError("not this one")


def check(future, x):
    try:
        assert future.result() == x
    except forkshm.WorkerDiedError:
        assert x % 97 == 0
    except concurrent.futures.CancelledError:
        assert future.cancelled()


class User(threading.Thread):
    def __init__(self, executor, seed, until):
        super().__init__()
        self.executor, self.until, self.random = executor, until, random.Random(seed)
        self.rounds = 0
        self.error = None

    def run(self):
        ways = [self.one, self.completed, self.cancelled, self.mapped, self.called, self.dropped, self.beside]
        try:
            while time.monotonic() < self.until:
                self.random.choice(ways)(self.random.randrange(1, 10_000))
                self.rounds += 1
        except BaseException as error:
            self.error = error
            raise

    def some(self, first):
        return {self.executor.submit(work, x): x for x in range(first, first + self.random.randrange(1, 60))}

    def one(self, x):
        check(self.executor.submit(work, x), x)

    def completed(self, x):
        futures = self.some(x)
        for future in concurrent.futures.as_completed(futures, PATIENCE):
            check(future, futures[future])

    def cancelled(self, x):
        futures = self.some(x)
        for future in futures:
            if self.random.random() < 0.3:
                future.cancel()
        for future, expected in futures.items():
            check(future, expected)

    def mapped(self, x):
        items = range(x, x + self.random.randrange(1, 600))
        with contextlib.suppress(forkshm.WorkerDiedError):
            assert list(self.executor.map(work, items, chunksize=self.random.randrange(1, 20))) == list(items)

    def called(self, x):
        called = threading.Event()
        self.executor.submit(work, x).add_done_callback(lambda _: called.set())
        assert called.wait(PATIENCE)

    def dropped(self, x):
        self.some(x).clear()
        with contextlib.suppress(TypeError):
            self.executor.submit(work, Unpicklable()).result()
            raise AssertionError("it was pickled")

    def beside(self, x):
        results = self.executor.map(work, range(x, x + 300))
        with contextlib.suppress(forkshm.WorkerDiedError):
            next(results)
        results.close()
        assert self.executor.pool.apply_async(work, (2,)).get() == 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--method", choices=["fork", "forkserver"], default="fork")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    faulthandler.dump_traceback_later(options.seconds + 1.5 * PATIENCE, exit=True)
    with forkshm.Executor(3, mp_context=forkshm.get_context(options.method)) as executor:
        until = time.monotonic() + options.seconds
        users = [User(executor, options.seed * 10 + number, until) for number in range(options.threads)]
        for user in users:
            user.start()
        for user in users:
            user.join()
    print(f"{sum(user.rounds for user in users)} rounds")
    left = len(executor._work.arrived), len(executor._work._opening), len(executor._work.kept)
    if left != (0, 0, 0) or any(user.error is not None for user in users):
        print(f"left: {left}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
