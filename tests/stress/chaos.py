"""Chaos: workers, and whole pools with their parents, are killed at random under mixed load.

    python tests/stress/chaos.py --kills 2000 --seed 1

Each round submits tasks of all kinds, and kills workers (idle, busy, any) at random moments. Then it takes every
answer: each is correct, by checksum, or a `WorkerDiedError`. None is missing, and none is late because of another one.
After each ten rounds, a whole pool is killed with its parent, and so are senders and receivers of a queue. Then nothing
may be left: no fd, process, thread, mapping or block. A table shows what was survived; the exit code is 1 if there was
a fault. The same seed makes the same plan, though not the same timing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import random
import select
import signal
import sys
import time
import zlib

import numpy as np

import forkshm
from forkshm.pool._status import FIRST_TASK
from forkshm.testing import check_leaks

# Seconds after which an answer counts as missing.
PATIENCE = 60
# Seconds in which workers must end after their parent.
ORPHANS = 5


@dataclasses.dataclass
class Survived:
    """Counts of events."""

    rounds: int = 0
    workers_killed: int = 0
    busy_ones_killed: int = 0
    parents_killed: int = 0
    senders_killed: int = 0
    receivers_killed: int = 0
    tasks: int = 0
    answered: int = 0
    died: int = 0
    queue_items: int = 0
    bytes_checked: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


# -- functions that workers run -------------------------------------------------------


def square(x):
    return x * x


def checksum(array):
    return zlib.crc32(array)


def flip(array):
    """Return a received array, changed, with the checksum of the original."""
    was = zlib.crc32(array)
    array += 1
    return was, array


def nested(n, size):
    array = np.full(size, float(n))
    return {"n": n, "whole": array, "parts": [array[: size // 2], array[size // 2 :]], "text": "x" * (size // 8)}


def stamp(shared, start, end, n):
    shared[start:end] = n
    return n


def put(queue, n, size):
    queue.put((n, np.full(size, float(n))))
    return n


def compute(x, steps):
    total = 0
    for k in range(steps):
        total += k * x
    return total


# -- submitted tasks ------------------------------------------------------------------


class Load:
    """Tasks of all kinds, each with its expected answer."""

    def __init__(self, pool, rng, survived, context):
        self.pool, self.rng, self.survived = pool, rng, survived
        self.shared = forkshm.zeros(64 * 1024)
        self.slots = len(self.shared) // 256
        self.queue = context.Queue()
        self.sent_to_queue = {}
        self.number = 0

    def submit(self, pending):
        """Submit one task and record it."""
        kind = self.rng.choice(["square"] * 6 + ["compute"] * 4 + ["checksum", "flip", "nested", "stamp", "put", "map"])
        self.number += 1
        check, handle = getattr(self, f"_{kind}")(self.number)
        pending.append((kind, self.number, check, handle))
        self.survived.tasks += 1

    def _square(self, n):
        return lambda got: got == n * n, self.pool.apply_async(square, (n,))

    def _compute(self, n):
        steps = self.rng.choice([2_000, 2_000, 60_000])
        return lambda got: got == n * (steps * (steps - 1) // 2), self.pool.apply_async(compute, (n, steps))

    def _array(self):
        return np.frombuffer(self.rng.randbytes(8 * self.rng.choice([100, 4_000, 50_000, 300_000])), np.uint64).copy()

    def _checksum(self, n):
        array = self._array()
        expected = zlib.crc32(array)
        return lambda got: self._bytes(array.nbytes) and got == expected, self.pool.apply_async(checksum, (array,))

    def _flip(self, n):
        array = self._array()
        before = array.copy()

        def check(got):
            self._bytes(2 * array.nbytes)
            return got[0] == zlib.crc32(before) and (got[1] == before + 1).all() and (array == before).all()

        return check, self.pool.apply_async(flip, (array,))

    def _nested(self, n):
        size = self.rng.choice([10, 5_000, 100_000])

        def check(got):
            self._bytes(2 * size * 8)
            whole = np.concatenate(got["parts"])
            return got["n"] == n and (got["whole"] == n).all() and (whole == n).all() and len(got["text"]) == size // 8

        return check, self.pool.apply_async(nested, (n, size))

    def _stamp(self, n):
        slot = n % self.slots
        start, end = slot * 256, (slot + 1) * 256

        def check(got):
            self._bytes((end - start) * 8)
            # A later round may have written here again, but never an earlier one.
            return got == n and (self.shared[start:end] >= n).all()

        return check, self.pool.apply_async(stamp, (self.shared, start, end, n))

    def _put(self, n):
        size = self.rng.choice([10, 20_000])
        self.sent_to_queue[n] = size
        return lambda got: got == n, self.pool.apply_async(put, (self.queue, n, size))

    def _map(self, n):
        count = self.rng.choice([5, 500])
        return (
            lambda got: got == [x * x for x in range(count)],
            self.pool.map_async(square, range(count), chunksize=self.rng.choice([None, 1, 7])),
        )

    def _bytes(self, nbytes):
        self.survived.bytes_checked += nbytes
        return True

    def collect(self, pending):
        """Take all answers of a round."""
        survived, done = self.survived, set()
        for kind, number, check, handle in pending:
            try:
                got = handle.get(PATIENCE)
            except forkshm.WorkerDiedError as error:
                survived.died += 1
                if error.exitcode != -signal.SIGKILL:
                    survived.faults.append(f"{kind} {number}: {error}")
                continue
            except BaseException as error:
                survived.faults.append(f"{kind} {number}: {error!r}")
                continue
            survived.answered += 1
            done.add(number)
            if not check(got):
                survived.faults.append(f"{kind} {number}: a wrong answer")
        self._empty_queue(done)

    def _empty_queue(self, done):
        # A worker killed after its put has put its item; one that answered has certainly put it.
        arrived = set()
        while not self.queue.empty():
            number, array = self.queue.get(timeout=PATIENCE)
            if number in arrived or number not in self.sent_to_queue:
                self.survived.faults.append(f"queue: item {number} came twice, or from nowhere")
                continue
            arrived.add(number)
            self._bytes(array.nbytes)
            if len(array) != self.sent_to_queue[number] or not (array == number).all():
                self.survived.faults.append(f"queue: item {number} has wrong contents")
        missing = (self.sent_to_queue.keys() & done) - arrived
        if missing:
            self.survived.faults.append(f"queue: items {sorted(missing)} are lost")
        self.survived.queue_items += len(arrived)
        self.sent_to_queue.clear()


def workers_of(context):
    return [process.pid for process in context.active_children()]


def kill_a_worker(worker_group, rng, survived):
    workers = list(worker_group.workers)
    busy = [worker for worker in workers if worker_group.status.state(worker.slot) >= FIRST_TASK]
    idle = [worker for worker in workers if worker not in busy]
    victims = rng.choice([busy, idle, workers]) or workers
    if not victims:  # the last dead workers are not replaced yet
        return
    victim = rng.choice(victims)
    with contextlib.suppress(ProcessLookupError):  # it died meanwhile
        os.kill(victim.pid, signal.SIGKILL)
        survived.workers_killed += 1
        survived.busy_ones_killed += victim in busy


def one_round(load, rng, survived, context, how_many):
    pending = []
    for _ in range(how_many):
        load.submit(pending)
        if rng.random() < 0.08:
            if context.get_start_method() != "fork":
                # A pool whose workers all die while starting gives up; these workers start slowly.
                pending[-1][3].wait(PATIENCE)
            time.sleep(rng.random() * rng.choice([0, 0.0003, 0.004]))
            kill_a_worker(load.pool._worker_group, rng, survived)
    load.collect(pending)
    survived.rounds += 1


# -- the ends of a queue --------------------------------------------------------------


def count_up(queue, who, progress):
    """Send numbers, each with an array of it; *progress* is the number that were certainly sent."""
    number = 0
    while True:
        queue.put((who, number, np.full(10 if number % 3 else 3_000, float(number))))
        number += 1
        progress[0] = number


def pass_on(queue, back):
    while True:
        back.put(queue.get())


def kill_ends_of_a_queue(rng, survived, context, kills=4):
    """Check that items arrive whole, once and in order, except for one item of each receiver."""
    # Bounded, so that nothing waits in a process that is going to be killed.
    queue, back = context.Queue(40), context.Queue(40)
    progress = []
    counts = {}
    lost = may_be_lost = 0

    def start(target, *args):
        process = context.Process(target=target, args=args, daemon=True)
        process.start()
        return process

    def start_sender():
        progress.append(forkshm.zeros(1, "int64"))
        return start(count_up, queue, len(progress) - 1, progress[-1])

    def take():
        nonlocal lost
        item = back.get(timeout=PATIENCE)
        if item is None:
            return False
        who, number, array = item
        lost += number - counts.get(who, 0)
        if number < counts.get(who, 0) or not (array == number).all():
            survived.faults.append(f"queue: item {number} of sender {who} came twice, too late, or is wrong")
        counts[who] = number + 1
        survived.queue_items += 1
        survived.bytes_checked += array.nbytes
        return True

    sender, receiver = start_sender(), start(pass_on, queue, back)
    try:
        for _ in range(kills):
            for _ in range(rng.randrange(5, 100)):
                take()
            if rng.random() < 0.5:
                end(sender)
                survived.senders_killed += 1
                sender = start_sender()
            else:
                end(receiver)
                survived.receivers_killed += 1
                may_be_lost += 1
                receiver = start(pass_on, queue, back)
        end(sender)
        survived.senders_killed += 1
        queue.put(None)
        while take():
            pass
        lost += sum(max(int(sent[0]) - counts.get(who, 0), 0) for who, sent in enumerate(progress))
        if lost > may_be_lost:
            survived.faults.append(f"queue: {lost} items are lost, and only {may_be_lost} receivers were killed")
    finally:
        end(sender)
        end(receiver)
        queue.close()
        back.close()


def end(process):
    if process._closed:
        return
    process.kill()
    process.join()
    process.close()


# -- parents --------------------------------------------------------------------------


def doomed_parent(out, seed, method):
    """Run a pool under load until this process is killed."""
    rng = random.Random(seed)
    context = forkshm.get_context(method)
    with context.Pool(2) as pool:
        load = Load(pool, rng, Survived(), context)
        os.write(out, (" ".join(map(str, workers_of(context))) + "\n").encode())
        while True:
            pending = []
            for _ in range(20):
                load.submit(pending)
            load.collect(pending)


def kill_a_parent(rng, survived, method):
    read_end, write_end = os.pipe()
    seed = rng.random()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            doomed_parent(write_end, seed, method)
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        if not select.select([read_end], [], [], PATIENCE)[0]:
            survived.faults.append("a parent did not start its pool")
        said = os.read(read_end, 4096)
        time.sleep(rng.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        survived.parents_killed += 1
        deadline = time.monotonic() + ORPHANS
        orphans = [int(one) for one in said.split()]
        while orphans := [one for one in orphans if is_alive(one)]:
            if time.monotonic() > deadline:
                survived.faults.append(f"workers {orphans} outlive their parent")
                break
            time.sleep(0.005)
    finally:
        os.close(read_end)


def is_alive(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


# -- the whole run --------------------------------------------------------------------


def some_rounds(kills, rng, survived, context, workers, tasks_in_round):
    with context.Pool(workers) as pool:
        load = Load(pool, rng, survived, context)
        for _ in range(10):
            one_round(load, rng, survived, context, tasks_in_round)
            if survived.workers_killed >= kills or survived.faults:
                break
        load.queue.close()
        pool.close()
        pool.join()


def run(kills, seed, method="fork", workers=3, tasks_in_round=60):
    """Continue until that many workers were killed; return the counts."""
    rng = random.Random(seed)
    survived = Survived()
    context = forkshm.get_context(method)
    warm = context.Process()  # a fork server, for example, stays
    warm.start()
    warm.join()
    warm.close()
    try:
        with check_leaks():
            while survived.workers_killed < kills and not survived.faults:
                with check_leaks():
                    some_rounds(kills, rng, survived, context, workers, tasks_in_round)
                with check_leaks():
                    kill_a_parent(rng, survived, method)
                with check_leaks():
                    kill_ends_of_a_queue(rng, survived, context)
    except AssertionError as error:
        survived.faults.append(str(error))
    return survived


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000, help="workers to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--method", choices=["fork", "forkserver", "spawn"], default="fork")
    arguments = parser.parse_args()
    began = time.monotonic()
    survived = run(arguments.kills, arguments.seed, arguments.method, arguments.workers)
    print(f"seed {arguments.seed}, {arguments.method}, {arguments.workers} workers, {time.monotonic() - began:.0f} s")
    for field in dataclasses.fields(survived):
        value = getattr(survived, field.name)
        if field.name != "faults":
            print(f"  {field.name.replace('_', ' '):16} {value:>16,}")
    print(f"  {'lost or leaked':16} {len(survived.faults):>16,}")
    for fault in survived.faults:
        print(f"    {fault}")
    return bool(survived.faults)


if __name__ == "__main__":
    sys.exit(main())
