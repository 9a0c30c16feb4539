"""Send real SIGINTs about a millisecond apart to pipes, pools and executors with checked data.

``python signals.py [--seconds 60]`` prints what was done, and exits with 1 if anything was wrong, hung or left behind.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

import forkshm
from forkshm.testing import check_leaks

# Sends the signals from another process, at random intervals.
_SENDER = """
import os, random, signal, sys, time
pid, seconds = int(sys.argv[1]), float(sys.argv[2])
end = time.monotonic() + seconds
sys.stdin.readline()
while time.monotonic() < end:
    # Now and then there is time to complete an operation, also on a busy machine.
    time.sleep(0.1 if random.random() < 0.02 else random.uniform(0.0002, 0.0018))
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        break
"""


def double(array):
    return array * 2


def square(number):
    return number * number


class Storm:
    """Return the operations that are interrupted repeatedly."""

    def __init__(self):
        self.here, self.there = forkshm.Pipe()
        self.pool = forkshm.Pool(2)
        self.executor = forkshm.Executor(2)
        self.executor.submit(square, 2).result()
        self.pool.map(square, range(4))
        self.queue = forkshm.Queue()
        self.problems = []
        self.number = 0

    def wrong(self, what):
        self.problems.append(what)

    def pipe(self):
        while self.there.poll():
            self.there.recv()
        self.number += 1
        self.here.send(np.full(20_000, float(self.number)))
        got = self.there.recv()
        if not (got == got[0]).all() or got[0] > self.number:
            self.wrong(f"pipe: {set(got.tolist())}")

    def through_queue(self):
        while not self.queue.empty():
            self.queue.get()
        self.number += 1
        self.queue.put(np.full(20_000, float(self.number)))
        got = self.queue.get()
        if not (got == got[0]).all() or got[0] > self.number:
            self.wrong(f"queue: {set(got.tolist())}")

    def map(self):
        if (got := self.pool.map(square, range(20), chunksize=3)) != [number * number for number in range(20)]:
            self.wrong(f"map: {got}")

    def arrays(self):
        for value in (1.0, 2.0):
            if not (self.pool.apply(double, (np.full(20_000, value),)) == 2 * value).all():
                self.wrong("apply with an array")

    def imap(self):
        if (got := list(self.pool.imap(square, range(8)))) != [number * number for number in range(8)]:
            self.wrong(f"imap: {got}")

    def calls(self):
        futures = [self.executor.submit(square, number) for number in range(5)]
        if (got := [future.result() for future in futures]) != [0, 1, 4, 9, 16]:
            self.wrong(f"submit: {got}")

    def executor_map(self):
        if (got := list(self.executor.map(square, range(8)))) != [number * number for number in range(8)]:
            self.wrong(f"executor map: {got}")

    def close(self):
        self.pool.terminate()
        self.pool.join()
        self.executor.shutdown()
        self.here.close()
        self.there.close()
        self.queue.close()
        self.queue.join_thread()


def storm(seconds):
    """Run all operations; return the number of runs of each, and the faults."""
    counts = collections.Counter()
    problems = []
    with check_leaks():
        it = Storm()
        kinds = [it.pipe, it.through_queue, it.map, it.arrays, it.imap, it.calls, it.executor_map]
        chosen = random.Random(1)
        sender = subprocess.Popen(
            [sys.executable, "-c", _SENDER, str(os.getpid()), str(seconds)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        armed = []

        def handle(*_):
            # Only while the library works: the lines below would otherwise need the same care.
            if armed:
                armed.clear()
                counts["interrupts"] += 1
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, handle)
        unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None
        end = time.monotonic() + seconds
        sender.stdin.write(b"go\n")
        sender.stdin.flush()
        while time.monotonic() < end and len(problems) < 20:
            faulthandler.dump_traceback_later(20, exit=True)
            kind = chosen.choice(kinds)
            try:
                armed.append(True)
                kind()
                armed.clear()
                counts[kind.__name__] += 1
            except KeyboardInterrupt:
                pass
            except BaseException as error:
                problems.append(f"{kind.__name__}: {error!r}"[:500])
            armed.clear()
        sender.wait()
        sender.stdin.close()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = unraisable
        faulthandler.dump_traceback_later(20, exit=True)
        # Run all operations once more, without signals.
        for kind in kinds:
            kind()
        it.close()
        problems += it.problems
        del it, kinds, kind
        faulthandler.cancel_dump_traceback_later()
    return {"interrupts": counts.pop("interrupts", 0), "done": dict(counts), "problems": problems}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    result = storm(options.seconds)
    print(result)
    return bool(result["problems"])


if __name__ == "__main__":
    sys.exit(main())
