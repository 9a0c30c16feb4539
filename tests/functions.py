"""Functions and classes in a module of their own, so that they are sent by name."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.util
import multiprocessing.process
import os
import signal
import sys
import threading
import time

from capability_skips import has

from forkshm._multiprocess import process as _process
from forkshm._multiprocess import util
from forkshm.backend import kernel
from forkshm.channel import Receiver, Sender
from forkshm.pool import _worker
from forkshm.region import MappedRegion


def nothing(*args, **kwargs):
    return None


@functools.cache
def keeps_exit_codes():
    """Return whether the kernel keeps the exit code of a process that was reaped for its pidfd."""
    if not has("pidfds"):
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    process = kernel.open_process(pid)
    os.waitpid(pid, 0)
    try:
        return kernel.exit_of_reaped(process) == 0
    finally:
        os.close(process)


def itself(x):
    return x


def map_and_write(opened):
    with MappedRegion(opened) as region:
        region.buf[0] = 7
    return opened.closed


def square(x):
    return x * x


def add(x, y=0):
    return x + y


def echo(*args, **kwargs):
    return args, kwargs


def fail(x):
    raise ValueError(f"bad {x}")


def fail_on_three(x):
    if x == 3:
        raise ValueError("three")
    return x


def pid(*_):
    return os.getpid()


def die(how):
    end(how)


def die_on_three(x, how):
    if x == 3:
        end(how)
    return x


def end(how):
    if how == "exit":
        os._exit(17)
    if how == "sys.exit":
        sys.exit(17)
    if how == "bad memory access":
        faulthandler._sigsegv() if has("signals") else faulthandler._read_null()
    if how == "MemoryError":
        import resource  # missing on some systems

        resource.setrlimit(resource.RLIMIT_AS, (0, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return bytearray(2**30)
    return stop(how)


def stop(how):
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(60)


def hang(path):
    """Report that the task has begun, and never end."""
    open(path, "w").close()
    threading.Event().wait()


def hang_on(path):
    """Do the same as `hang`, and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang(path)


def begin_late(path):
    """Sleep as an initializer."""
    time.sleep(0.2)
    (path / f"initializer-{os.getpid()}").touch()


def leave(path, state):
    """Record that worker_exit was called."""
    (path / f"exit-{os.getpid()}").touch()


def threads_here():
    return threading.active_count()


def die_once(path, value):
    """Die the first time; return the second time."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return value
    os.kill(os.getpid(), signal.SIGKILL)
    return None


class Counter:
    """A class whose method is sent by name, with a number of its own."""

    def __init__(self):
        self.number = 0

    def read(self):
        return self.number

    def count(self, *_):
        self.number += 1
        return self.number


class Custom(Exception):
    """An exception that survives pickling."""

    def __init__(self, message, code):
        super().__init__(message, code)
        self.code = code


class Unbuildable(Exception):
    """An exception that does not survive pickling, because its own reduction is wrong."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")

    def __reduce__(self):
        return type(self), (1,)


def raise_custom():
    raise Custom("no", 42)


def raise_unbuildable():
    raise Unbuildable(1, 2)


class DieAtPickle:
    """Kills the process that pickles it."""

    def __init__(self, how, where):
        self.how, self.where = how, where

    def __reduce__(self):
        if os.getpid() != self.where:
            end(self.how)
        return DieAtPickle, (self.how, self.where)


class DieAtUnpickle:
    """Kills the process that unpickles it, unless it was created there."""

    def __init__(self, how):
        self.how, self.where = how, os.getpid()

    def __reduce__(self):
        return unpickle_and_die, (self.how, self.where)


def unpickle_and_die(how, where):
    if os.getpid() != where:
        end(how)


class InterruptedAtUnpickle:
    """Sends Ctrl-C when another process unpickles it."""

    def __init__(self):
        self.where = os.getpid()

    def __reduce__(self):
        return unpickle_interrupted, (self.where,)


def unpickle_interrupted(where):
    if os.getpid() != where:
        signal.raise_signal(signal.SIGINT)


class HangAtUnpickle:
    """Creates a file whose name begins with *path* in each process that unpickles it, and blocks that process."""

    def __init__(self, path):
        self.path, self.where = path, os.getpid()

    def __reduce__(self):
        return unpickle_and_hang, (self.path, self.where)


def unpickle_and_hang(path, where):
    if os.getpid() != where:
        hang(f"{path}{os.getpid()}")


class RaiseAtPickle:
    def __reduce__(self):
        raise RuntimeError("will not be pickled")


def unpickle_and_raise():
    raise RuntimeError("will not be unpickled")


class RaiseAtUnpickle:
    def __reduce__(self):
        return unpickle_and_raise, ()


def make(kind, *args):
    return kind(*args)


def touch_file(path, value):
    """Append a line to a file for each run."""
    with open(path, "a") as file, _alone_at(path):
        file.write(f"{value}\n")
        file.flush()
    return value


@contextlib.contextmanager
def _alone_at(path):
    """Lock a file where appending is not atomic."""
    if importlib.util.find_spec("msvcrt") is None:
        yield
        return
    import msvcrt

    with open(f"{path}.lock", "a") as guard:
        while True:
            try:
                msvcrt.locking(guard.fileno(), msvcrt.LK_NBLCK, 1)
                break
            except OSError:
                time.sleep(0.001)
        yield  # closing releases the lock


def hold(event_path, until_path):
    """Report that the task has begun, and wait until the gate is opened."""
    open(event_path, "w").close()
    while not os.path.exists(until_path):
        time.sleep(0.001)
    return os.getpid()


STATE = None


def set_state(value):
    global STATE
    STATE = value


def get_state(*_):
    return STATE


def initializer_fails(*_):
    raise LookupError("initializer says no")


def initializer_dies(how):
    end(how)


def die_is_due(path):
    """Return whether this is the first call."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def die_at_sending(how):
    """Return, and die when the answer is about to be sent."""

    def send(*_, **__):
        end(how)

    Sender.send = send


class DieAtUnpickleIn:
    """Kills one process when it unpickles it."""

    def __init__(self, how, where):
        self.how, self.where = how, where

    def __reduce__(self):
        return unpickle_and_die_in, (self.how, self.where)


def unpickle_and_die_in(how, where):
    if os.getpid() == where:
        end(how)


def die_in_parent(how, pid):
    return DieAtUnpickleIn(how, pid)


def die_with_the_next_task(how, path):
    """Return, and die when the next task was received but not named, unless another worker has already died."""
    original = Receiver.receive_nowait

    def receive_nowait(self):
        received = original(self)
        if received is not None and die_is_due(path):
            end(how)
        return received

    Receiver.receive_nowait = receive_nowait


def die_before_the_next_begins(how, path):
    """Return, and die when the next task was received and named, unless another worker has already died."""
    original = _worker.read_message

    def read_message(*args):
        if die_is_due(path):
            end(how)
        return original(*args)

    _worker.read_message = read_message


def die_at_sigusr1(how):
    signal.signal(signal.SIGUSR1, lambda *_: end(how))
    return os.getpid()


def initializer_dies_once(path, how):
    if die_is_due(path):
        end(how)


def die_at_exit(how):
    util.Finalize(None, end, (how,), exitpriority=1)


def die_at_sigterm(path, how):
    signal.signal(signal.SIGTERM, lambda *_: end(how))
    hang(path)


def who_am_i():
    """Return the process as multiprocess and the standard library see it."""
    answers = []
    for process in (_process, multiprocessing.process):
        me, parent = process.current_process(), process.parent_process()
        answers.append(
            {
                "name": me.name,
                "daemon": me.daemon,
                "is_me": me.pid == me.ident == os.getpid(),
                "parent": (parent.name, parent.pid, parent.is_alive()),
                "children": process.active_children(),
            }
        )
    return answers


def exit_code_of_a_standard_child():
    process = multiprocessing.Process(target=nothing)
    process.start()
    process.join()
    return process.exitcode


def send_who_am_i(connection):
    connection.send(who_am_i())


def finalize_later(path):
    import multiprocessing.util

    multiprocessing.util.Finalize(None, touch_file, (path, 1), exitpriority=1)


def secret():
    return bytes(multiprocessing.current_process().authkey)


def ignore_sigterm_and_hang(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang(path)


def put_and_end(it, how):
    # More than fits into the kernel's buffer, so the rest waits in the backlog of this process.
    for number in range(2000):
        it.put((number, bytes(100)))
    end(how)


def get_and_end(it, back, how):
    it.get()
    held = it.get()  # an item with memory, which now belongs to this process
    back.put(held.sum())
    back.close()
    back.join_thread()
    end(how)


def leave_a_grandchild(path):
    if os.fork() == 0:
        signal.alarm(60)
        while not os.path.exists(path):
            time.sleep(0.01)
        os._exit(0)
    os._exit(7)


def close_everything():
    os.closerange(3, 100)
    signal.alarm(60)
    signal.pause()


class OwnEnd(BaseException):
    pass


def raise_kind(kind):
    raise kind(17)


def touch_and_raise(path, kind):
    with open(path, "a") as marks:
        marks.write(".")
    raise kind


class RaiseKindAtUnpickle:
    def __init__(self, kind):
        self.kind = kind

    def __reduce__(self):
        return raise_kind, (self.kind,)


class RaiseKindAtPickle:
    """Can be pickled in one process only."""

    def __init__(self, kind, where):
        self.kind, self.where = kind, where

    def __reduce__(self):
        if os.getpid() != self.where:
            raise_kind(self.kind)
        return RaiseKindAtPickle, (self.kind, self.where)


def inner_threads(_=None):
    """Return the number of threads of OpenBLAS, and the value of OpenMP's environment variable."""
    import numpy as np  # noqa: F401 - it loads OpenBLAS
    import threadpoolctl

    numbers = {info["num_threads"] for info in threadpoolctl.threadpool_info() if info["internal_api"] == "openblas"}
    return numbers, os.environ.get("OMP_NUM_THREADS")
