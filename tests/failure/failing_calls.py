"""Failing system calls: each call site of the backend, each errno of its man page, the first and the last call.

A scenario creates its objects and uses them. It runs in a process of its own for each such *point*. The call fails in
any process that reaches the site, including workers. Afterwards the same objects must work, or report that they are
broken. Answers must be correct; nothing may be left behind, and nothing may hang.

``python tests/failure/failing_calls.py [scenario] [--every N]`` prints what was tested, and the faults.
"""

from __future__ import annotations

import _socket
import argparse
import contextlib
import errno as e
import faulthandler
import fcntl
import mmap
import os
import queue
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import types

import numpy as np

import forkshm
import forkshm.region
from forkshm import managers
from forkshm.backend import _syscalls, _unix, kernel
from forkshm.backend.posix import _record_locks
from forkshm.processes import _popen_fork
from forkshm.testing import check_leaks

if kernel.name == "linux":
    from forkshm.backend import _linux

    OWN = (_linux,)
else:
    from forkshm.backend.posix import _backend, _companions, _leases, _messages, _objects, _waiting

    OWN = (_backend, _companions, _leases, _messages, _objects, _waiting)

# The errnos of the man pages, without those that only a mistake of the caller causes.
ERRNOS = {
    "memfd_create": (e.EMFILE, e.ENFILE, e.ENOMEM),
    "ftruncate": (e.EIO, e.EFBIG, e.EPERM),
    "posix_fallocate": (e.ENOSPC, e.EIO, e.EFBIG),
    "fcntl": (e.ENOLCK, e.EACCES, e.EPERM),
    "lockf": (e.ENOLCK,),
    "open": (e.EMFILE, e.ENFILE, e.ENOMEM, e.EACCES, e.ENOENT),
    "dup": (e.EMFILE,),
    "pipe": (e.EMFILE, e.ENFILE),
    "fork": (e.EAGAIN, e.ENOMEM),
    "pidfd_open": (e.EMFILE, e.ENFILE, e.ENOMEM, e.ESRCH),
    "socketpair": (e.EMFILE, e.ENFILE, e.ENOMEM),
    "mmap": (e.ENOMEM, e.ENFILE, e.EAGAIN, e.EPERM),
    "mmap_into": (e.ENOMEM, e.ENFILE, e.EAGAIN, e.EPERM),
    "mmapping": (e.ENOMEM, e.ENFILE, e.EAGAIN, e.EPERM),
    "munmap": (e.ENOMEM,),
    "munmap_from": (e.ENOMEM,),
    "madvise": (e.EAGAIN, e.ENOMEM, e.EIO),
    "shm_open_into": (e.EMFILE, e.ENFILE, e.ENOSPC, e.EACCES),
    "shm_open": (e.EMFILE, e.ENFILE, e.ENOSPC, e.EACCES),
    "shm_unlink": (e.EACCES,),
    "fstat": (e.ENOMEM,),
    "stat": (e.ENOMEM, e.EACCES),
    "lseek": (e.EINVAL,),
    "pread": (e.EIO,),
    "poll": (e.ENOMEM,),
    "waitid": (e.ECHILD,),
    "pidfd_send_signal": (e.ESRCH, e.EPERM),
    "kill": (e.EPERM,),
    "sched_setaffinity": (e.EINVAL,),
    "set_blocking": (e.EPERM,),
    "mkstemp": (e.EMFILE, e.ENOSPC, e.EACCES),
}
# Where an fd is left open if the call fails, because nothing else can tell whether it belongs to another file by now.
# The second and third are those of `MessageEnd`.
TELLS_NOTHING = {("close_own", "fstat"), ("close", "fstat"), ("__del__", "fstat")}

# Time limit of one run.
SECONDS = 20


class Failing:
    """The state shared by all processes of one run."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._log = tempfile.TemporaryFile()
        self.target: tuple[str, int] | None = None
        self.nth = 0

    @property
    def armed(self) -> bool:
        return self._shared[0] != 0

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._shared[0] = int(armed)

    @property
    def has_failed(self) -> bool:
        return self._shared[1] != 0

    def called(self, name: str, code: types.CodeType, line: int) -> None:
        # No argument is a frame, because a function that has one counts as a signal handler.
        if not self.armed or (code.co_name, name) in TELLS_NOTHING:
            return
        where = f"{os.path.basename(code.co_filename)}:{line} {name}"
        if self.target is None:
            os.write(self._log.fileno(), f"{where}\n".encode())
        elif where == self.target[0]:
            count = struct.unpack_from("I", self._shared, 8)[0] + 1
            struct.pack_into("I", self._shared, 8, count)
            if count == self.nth:
                self._shared[1] = 1
                raise OSError(self.target[1], os.strerror(self.target[1]))

    def counts(self) -> dict[str, int]:
        self._log.seek(0)
        found: dict[str, int] = {}
        for line in self._log.read().decode().splitlines():
            found[line] = found.get(line, 0) + 1
        return found


failing = Failing()


def _caller() -> tuple[types.CodeType, int]:
    frame = sys._getframe(2)
    return frame.f_code, frame.f_lineno


class Proxy(types.ModuleType):
    """A module with some failing functions."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        self.real = real

    def __getattr__(self, name: str) -> object:
        found = getattr(self.real, name)
        if name not in ERRNOS or not callable(found):
            setattr(self, name, found)
            return found

        def call(*args: object, **kwargs: object) -> object:
            failing.called(name, *_caller())
            return found(*args, **kwargs)

        if name == "mmapping":  # fails when it is advanced to its item

            def call(*args: object) -> object:  # type: ignore[misc]
                caller = _caller()

                def made() -> object:
                    failing.called(name, *caller)
                    yield from found(*args)

                return made()

        if name == "poll":

            def call() -> object:  # type: ignore[misc]
                return _Poll(found())

        setattr(self, name, call)
        return call


class _Poll:
    def __init__(self, real: object) -> None:
        self._real = real
        self.register, self.unregister, self.modify = real.register, real.unregister, real.modify

    def poll(self, *args: object) -> object:
        failing.called("poll", *_caller())
        return self._real.poll(*args)


def install() -> None:
    proxies = {module: Proxy(module) for module in (os, fcntl, _socket, socket, select, signal, tempfile, _syscalls)}
    for module in (*OWN, _unix, _record_locks, _popen_fork):
        for name, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType) and value in proxies:
                setattr(module, name, proxies[value])
    for module in OWN:
        if hasattr(module, "_lseek"):
            module._lseek = lambda *args: proxies[os].lseek(*args)
    _unix.fallocate = proxies[os].posix_fallocate
    for module in OWN:
        if hasattr(module, "fallocate"):
            module.fallocate = _unix.fallocate


# -- scenarios: (make) -> objects; (use) -> answer; (end) --------------------------------------------------------------

BIG = np.arange(200_000.0)


def double(x):
    return x * 2


def send_back(x):
    return x


class Scenario:
    wanted: object = None

    def make(self):
        return None

    def use(self, thing):
        raise NotImplementedError

    def end(self, thing):
        pass


class PoolMap(Scenario):
    wanted = ([0, 2, 4, 6], float(BIG.sum() * 2))

    def make(self):
        return forkshm.Pool(2)

    def use(self, pool):
        return pool.map(double, range(4), chunksize=1), float(pool.apply(double, (BIG,)).sum())

    def end(self, pool):
        pool.terminate()
        pool.join()


class PoolAsync(PoolMap):
    wanted = ([0, 2, 4], [0, 2, 4])

    def use(self, pool):
        return pool.map_async(double, range(3)).get(), list(pool.imap(double, range(3)))


class PoolStart(Scenario):
    """Start a pool, use it, and end it."""

    wanted = 4

    def use(self, _):
        with forkshm.Pool(2) as pool:
            answer = pool.apply(double, (2,))
            pool.close()
            pool.join()
        return answer


class PoolTerminate(Scenario):
    wanted = "ended"

    def use(self, _):
        pool = forkshm.Pool(2)
        pool.map_async(time.sleep, [60] * 3)
        pool.terminate()
        pool.join()
        return "ended"


class Replace(PoolMap):
    """Kill a worker."""

    wanted = ("died", 6)

    def use(self, pool):
        try:
            pool.apply(os._exit, (1,))
        except forkshm.WorkerDiedError:
            pass
        return "died", pool.apply(double, (3,))


class QueueOfArrays(Scenario):
    wanted = (1, float(BIG.sum()), "x" * 1000)

    def make(self):
        return forkshm.Queue()

    def use(self, queue):
        while True:  # drop items of an earlier use
            with contextlib.suppress(Exception):
                queue.get(timeout=0)
                continue
            break
        answer = []
        for item in (1, BIG, "x" * 1000):
            queue.put(item)
            answer.append(queue.get(timeout=10))
        answer[1] = float(answer[1].sum())
        return tuple(answer)

    def end(self, queue):
        queue.close()
        queue.join_thread()


class PipeOfArrays(Scenario):
    wanted = (1, float(BIG.sum()))

    def make(self):
        return forkshm.Pipe()

    def use(self, ends):
        while ends[1].poll(0):
            with contextlib.suppress(OSError, forkshm.ForkshmError):
                ends[1].recv()
        ends[0].send(1)
        answer = [ends[1].recv()]
        ends[0].send(BIG)
        answer.append(float(ends[1].recv().sum()))
        return tuple(answer)

    def end(self, ends):
        for end in ends:
            end.close()


class Regions(Scenario):
    wanted = (b"abc", b"abc", True)

    def use(self, _):
        region = forkshm.anonymous_shared_memory(100_000)
        region.buf[:3] = b"abc"
        one = bytes(region.buf[:3])
        region.close()
        name = f"failing-{os.getpid()}"
        try:
            named = forkshm.SharedMemoryObject(forkshm.region.create_only, name, forkshm.region.read_write)
            named.truncate(100_000)
            mapped = forkshm.MappedRegion(named, forkshm.region.read_write)
            mapped.buf[:3] = b"abc"
            two = bytes(mapped.buf[:3])
            mapped.advise(forkshm.region.Advice.willneed)
            mapped.close()
            named.close()
        finally:
            removed = forkshm.SharedMemoryObject.remove(name)
        return one, two, removed


class Locks(Scenario):
    wanted = (True, True)

    def make(self):
        return forkshm.anonymous_shared_memory(4096)

    def use(self, region):
        mutex, semaphore = forkshm.region.Mutex(region, 0), forkshm.region.Semaphore(region, 1024, 1)
        got = mutex.acquire(timeout=5), semaphore.acquire(timeout=5)
        mutex.release()
        semaphore.release()
        mutex.detach()
        semaphore.detach()
        return got

    def end(self, region):
        region.close()


class Process(Scenario):
    wanted = 7

    def use(self, _):
        process = forkshm.Process(target=os._exit, args=(7,))
        process.start()
        try:
            process.join()
            return process.exitcode
        finally:
            process.join()
            process.close()


class Fork(Scenario):
    """Fork a child that uses its parent's objects: a region is shared, and a copy is the child's own."""

    wanted = (True, 0.0)

    def make(self):
        region = forkshm.anonymous_shared_memory(8192)
        ends = forkshm.Pipe()
        ends[0].send(BIG)
        return region, ends, ends[1].recv()

    def use(self, things):
        region, _, array = things
        pid = os.fork()
        if pid == 0:
            signal.alarm(SECONDS)
            region.buf[:3] = b"abc"
            array[0] = 5
            os._exit(0 if array[1] == 1 else 1)
        os.waitpid(pid, 0)  # a child that cannot get its memory ends
        return bytes(region.buf[:3]) == b"abc", float(array[0])

    def end(self, things):
        region, ends, _ = things
        region.close()
        for end in ends:
            end.close()


class ManagerOfArrays(Scenario):
    wanted = float(BIG.sum())

    def use(self, _):
        with forkshm.Manager() as manager:
            items = manager.dict()
            items["big"] = BIG
            return float(items["big"].sum())


class ExecutorCalls(Scenario):
    wanted = (0, 2, 4)

    def make(self):
        return forkshm.Executor(2)

    def use(self, executor):
        return tuple([future.result(SECONDS) for future in [executor.submit(double, x) for x in range(3)]])

    def end(self, executor):
        executor.shutdown()


SCENARIOS: dict[str, type[Scenario]] = {
    kind.__name__: kind
    for kind in (
        PoolMap,
        PoolAsync,
        PoolStart,
        PoolTerminate,
        Replace,
        QueueOfArrays,
        PipeOfArrays,
        Regions,
        Locks,
        Process,
        Fork,
        ManagerOfArrays,
        ExecutorCalls,
    )
}

# Exceptions that report a refused call or a broken object.
REFUSALS = (OSError, forkshm.ForkshmError, MemoryError, queue.Empty, EOFError, managers.RemoteError)


def _attempt(scenario: Scenario, thing: object) -> str | None:
    """Use the objects; return the fault, if any."""
    try:
        answer = scenario.use(thing)
    except REFUSALS as error:
        return None if str(error) else f"an error without a text: {error!r}"
    return None if answer == scenario.wanted else f"answered {answer!r}"


def run(name: str, target: tuple[str, int] | None, nth: int) -> None:
    """Run a scenario in this process with one failing call.

    Raises:
        AssertionError: There was a fault.
    """
    scenario = SCENARIOS[name]()
    failing.target, failing.nth = target, nth
    with check_leaks():
        thing = scenario.make()
        failing.armed = True
        try:
            wrong = _attempt(scenario, thing)
        finally:
            failing.armed = False
        if wrong is not None:
            raise AssertionError(f"with the failing call: {wrong}")
        try:
            answer = scenario.use(thing)
        except (forkshm.ForkshmError, ValueError) as error:
            if not failing.has_failed:
                raise
            print("   broken, and says:", error, file=sys.stderr)
        else:
            if answer != scenario.wanted:
                raise AssertionError(f"afterwards: answered {answer!r}")
        scenario.end(thing)
        del thing


def in_child(name: str, target: tuple[str, int] | None, nth: int) -> tuple[str | None, dict[str, int], bool]:
    """Run the scenario in a forked child; return the faults, the calls, and whether the failing one was reached."""
    global failing
    failing = Failing()
    report = tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(report.fileno(), 2)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        code = 1
        try:
            run(name, target, nth)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    report.seek(0)
    text = report.read().decode(errors="replace")
    counts = failing.counts()
    return (f"exit code {code}\n{text[-3000:]}" if code else None), counts, failing.has_failed


def points(name: str) -> list[tuple[tuple[str, int], int]]:
    """Return the functions that can fail in a scenario, and the calls of each."""
    bad, counts, _ = in_child(name, None, 0)
    if bad is not None:
        raise AssertionError(f"{name} fails although no call does: {bad}")
    found = []
    for where, count in sorted(counts.items()):
        for number in ERRNOS[where.split()[1]]:
            found += [((where, number), nth) for nth in sorted({1, count})]
    return found


def check(name: str, every: int = 1) -> tuple[int, int, list[str]]:
    """Test the points of a scenario; return their number, the numbers of calls made and failed, and the faults."""
    install()
    # Create whatever the first run of its kind creates and keeps.
    warm = SCENARIOS[name]()
    thing = warm.make()
    warm.use(thing)
    warm.end(thing)
    del thing
    chosen = points(name)[::every]
    wrong = []
    reached = 0
    for target, nth in chosen:
        bad, _, has_failed = in_child(name, target, nth)
        reached += has_failed
        if bad is not None:
            wrong.append(f"{name}: {target[0]} fails with {e.errorcode[target[1]]}, call {nth}: {bad}")
    return len(chosen), reached, wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    failed = 0
    for name in options.scenario:
        count, reached, wrong = check(name, options.every)
        print(f"{name}: {count} points, {reached} failed as told, {len(wrong)} bad", flush=True)
        for text in wrong:
            print("  ", text.replace("\n", "\n      "), flush=True)
        failed += len(wrong)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
