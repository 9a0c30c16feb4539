"""A signal handler that raises while a lock is entered never leaves the lock held."""

from __future__ import annotations

import _thread
import ast
import concurrent.futures
import pathlib
import signal
import threading
import time

import pytest

import forkshm
from forkshm import _interrupts

ROOT = pathlib.Path(forkshm.__file__).parent

# Maximum delay of a signal handler.
LONG = 30


class _Trapped(_interrupts.Entered):
    """A lock that gets a SIGINT during its acquisition; one C call does both."""

    acquire = staticmethod(_thread.interrupt_main)

    def __init__(self):
        self.exits = 0

    def __exit__(self, *_):
        self.exits += 1


@pytest.fixture
def _interrupts_raise():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_raise")
@pytest.mark.parametrize("number", range(100))
def test_a_block_whose_lock_was_acquired_is_left_by_exit(number):
    # A hundred times, because CPython replaces instructions by specialized ones.
    lock = _Trapped()
    with pytest.raises(KeyboardInterrupt):
        with lock:
            len("")
            print(end="")
    assert lock.exits == 1


class _Interrupted(Exception):
    pass


@pytest.fixture
def storm():
    """Enter a lock until a signal handler has raised *times* times."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs timers that send signals")

    def raise_it(*_):
        raise _Interrupted

    before = signal.signal(signal.SIGALRM, raise_it)

    def run(lock, is_held, times=150):
        deadline = time.monotonic() + LONG
        came = 0
        while came < times:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + came % 7 * 0.00003)
                while True:  # without a condition: see test_loops.py
                    if time.monotonic() >= deadline:
                        break
                    for _ in range(1000):
                        with lock:
                            pass
                    # A signal that the kernel gave to another thread, of NumPy's for example, is seen after a switch.
                    time.sleep(0)
                pytest.fail(f"{came} signals in {LONG} s")
            except _Interrupted:
                came += 1
                assert not is_held(), f"signal {came} left {lock!r} held"

    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_locks_of_threads(storm):
    lock, recursive = _interrupts.Lock(), _interrupts.RLock()
    storm(lock, lock.locked)
    storm(recursive, recursive._is_owned)


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Condition", "Value"])
def test_locks_of_processes(kind, storm):
    made = {
        "Lock": forkshm.Lock,
        "RLock": forkshm.RLock,
        "Condition": forkshm.Condition,
        "Value": lambda: forkshm.Value("i", 0),
    }[kind]()
    word = (made if kind.endswith("Lock") else made._lock)._core.word
    storm(made, lambda: word.owner != 0)


def test_the_guard_of_all_memory_and_the_futures_of_executors():
    from forkshm.region._lifetime import guard

    assert type(guard) is type(_interrupts.RLock())
    with forkshm.Executor(1) as executor:
        future = executor.submit(int)
        assert type(future._condition._lock) is type(_interrupts.RLock())
        assert concurrent.futures.wait([future], LONG).done


def test_a_lock_keeps_threads_out_and_can_be_released_by_another():
    lock = _interrupts.Lock()
    with lock:
        assert not lock.acquire(blocking=False)
        assert lock.locked()
    lock.acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    assert lock.acquire(timeout=LONG)
    lock.release()


# Locks that no block enters, or that the standard library enters; the latter are created by `threading`.
_OTHERS = {
    ("channel/_simple_queue.py", "_ready"),
    ("backend/posix/_record_locks.py", ""),
    ("integrations/pytest.py", "__init__"),
}


def _plain_locks():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name == "_interrupts.py":
            continue
        tree = ast.parse(path.read_text())
        functions = {
            id(inner): node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node) in (
                "threading.Lock()",
                "threading.RLock()",
                "threading.Condition()",
            ):
                where = name, functions.get(id(node), "")
                if where not in _OTHERS:
                    yield f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_every_lock_that_a_block_enters_can_be_entered_safely():
    assert list(_plain_locks()) == []
