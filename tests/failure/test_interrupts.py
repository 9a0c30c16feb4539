"""Ctrl-C at any moment ends a program at once, with one traceback, and leaves no process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading

import functions as f
import pytest
import started

from forkshm import _interrupts
from forkshm._system import CAN_FORK

pytestmark = pytest.mark.slow

TESTS = os.path.dirname(f.__file__)


# -- held back ------------------------------------------------------------------------


def test_an_interrupt_comes_after_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with _interrupts.held_back():
            with _interrupts.held_back():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
            if CAN_FORK:  # otherwise no signal can come from outside
                # To this thread: another one, which does not block it, would be interrupted at some later moment.
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        done.append("not this")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not CAN_FORK or signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_error_in_the_block_is_the_interrupts_context():
    with pytest.raises(KeyboardInterrupt) as caught, _interrupts.held_back():
        signal.raise_signal(signal.SIGINT)
        raise OSError(11, "no process")
    assert isinstance(caught.value.__context__, OSError)


@pytest.mark.needs("interrupts")
def test_an_event_loop_gets_the_interrupt_once(in_child):
    def child():
        heard = []

        async def main():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, heard.append, 1)
            with _interrupts.held_back():
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.01)
            for _ in range(10):
                await asyncio.sleep(0)

        asyncio.run(main())
        assert heard == [1]

    assert in_child(child) == 0


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_python_has_no_handler_there_is_none_afterwards(handler, in_child):
    def child():
        signal.signal(signal.SIGINT, handler)
        with _interrupts.held_back():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler

    assert in_child(child) == (0 if handler == signal.SIG_IGN else -signal.SIGINT)


@pytest.mark.needs("interrupts")
def test_a_process_that_another_thread_starts_meanwhile_has_the_handler_of_the_program(in_child):
    def child():
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        codes = []

        def start():
            def grandchild():
                _interrupts.begin(ignores=False)
                signal.raise_signal(signal.SIGINT)
                assert heard

            codes.append(in_child(grandchild))

        with _interrupts.held_back():
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
        assert codes == [0]
        assert not heard

    assert in_child(child) == 0


# -- while processes start ------------------------------------------------------------

IN_A_HOOK = """
import os, signal, forkshm
interrupt = [True]
def hook():
    if interrupt.pop():
        signal.raise_signal(signal.SIGINT)
    interrupt.append(False)
os.register_at_fork({when}=hook)
try:
    {start}
except KeyboardInterrupt:
    print("interrupted")
interrupt[:] = [False]
with forkshm.Pool(1) as pool:
    print(pool.apply(abs, (-5,)))
"""


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("start", ["forkshm.Pool(2)", "forkshm.Process(target=int).start()"])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
def test_an_interrupt_in_fork_hooks_is_not_lost(run_script, when, start):
    """Python ignores exceptions raised there."""
    assert run_script(IN_A_HOOK.format(when=when, start=start)) == "interrupted\n5\n"


AT_BIRTH = """
import sys, forkshm
sys.path.insert(0, {tests!r})
import functions as f
if __name__ == "__main__":
    context = forkshm.get_context({method!r})
    with context.Pool(1, f.nothing, (f.InterruptedAtUnpickle(),)) as pool:
        print(pool.apply(abs, (-5,)), pool.statistics().workers_replaced)
    process = context.Process(target=print, args=("not reached", f.InterruptedAtUnpickle()))
    process.start()
    process.join()
    print(process.exitcode)
    process.close()
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"] if CAN_FORK else ["spawn"])
def test_a_starting_worker_ignores_the_interrupt_and_a_process_ends_silently(run_script, method):
    done = run_script(AT_BIRTH.format(method=method, tests=TESTS), check=False)
    assert (done.stdout, done.stderr) == ("5 0\n1\n", "")


def interrupt(path, ready, wait_until):
    """Run a program like a terminal does, press Ctrl-C once *ready* files exist, and return the output."""
    process = subprocess.Popen(
        [sys.executable, str(path / "script.py")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        wait_until(lambda: len(list(path.glob("ready*"))) >= ready)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait() == -signal.SIGINT
    gone = []

    def group_is_gone():  # including the fork server and the resource tracker
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            gone.append(True)
        return gone

    wait_until(group_is_gone)
    assert errors.count("Traceback (most recent call last)") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    return errors


STARTING = """
import sys, forkshm
sys.path.insert(0, {tests!r})
import functions as f
if __name__ == "__main__":
    with forkshm.get_context({method!r}).Pool(2, f.nothing, (f.HangAtUnpickle({path!r} + "/ready"),)) as pool:
        pool.map(abs, range(10))
"""


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_while_workers_are_starting(method, tmp_path, wait_until):
    (tmp_path / "script.py").write_text(STARTING.format(method=method, tests=TESTS, path=str(tmp_path)))
    interrupt(tmp_path, 2, wait_until)


# -- at the end -----------------------------------------------------------------------

AT_THE_END = """
import sys, forkshm
sys.path.insert(0, {tests!r})
import functions as f
if __name__ == "__main__":
    pool = forkshm.get_context({method!r}).Pool(2)
    pool.map_async(f.{task}, [{path!r} + "/ready" + str(i) for i in range(8)], chunksize=1)
    pool.close()
    drive = pool._dispatcher.drive
    def drive_and_say_so(*args):
        open({path!r} + "/ready_to_join", "w").close()
        return drive(*args)
    pool._dispatcher.drive = drive_and_say_so
    pool.join()
"""


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("task", ["hang", "ignore_sigterm_and_hang"])
@pytest.mark.parametrize("method", started.methods("fork", "forkserver"))
def test_while_a_closed_pool_is_joined(method, task, tmp_path, wait_until):
    (tmp_path / "script.py").write_text(AT_THE_END.format(method=method, tests=TESTS, path=str(tmp_path), task=task))
    assert "pool.join()" in interrupt(tmp_path, 3, wait_until)


LEAVING = """
import sys, time, forkshm
sys.path.insert(0, {tests!r})
from forkshm._multiprocess import util
def linger():
    open({path!r} + "/ready", "w").close()
    time.sleep(60)
def initialize():
    util.Finalize(None, linger, exitpriority=1)
if __name__ == "__main__":
    pool = forkshm.Pool(1, initialize)
    pool.close()
    pool.join()
"""


@pytest.mark.needs("interrupts")
def test_while_workers_of_a_closed_pool_are_leaving(tmp_path, wait_until):
    (tmp_path / "script.py").write_text(LEAVING.format(tests=TESTS, path=str(tmp_path)))
    assert "pool.join()" in interrupt(tmp_path, 1, wait_until)


MAPS = {
    "Executor.map": """
with forkshm.Executor(2) as executor:
    list(executor.map(begin, range(40)))
""",
    "chunks of Executor.map": """
with forkshm.Executor(2) as executor:
    list(executor.map(begin, range(40), chunksize=10))
""",
    "parallel.map": "forkshm.parallel(workers=2)(begin).map(range(40))",
    "parallel.imap": "list(forkshm.parallel(workers=2)(begin).imap(range(40)))",
    "parallel.map in any order": "forkshm.parallel(workers=2, ordered=False)(begin).map(range(40))",
    "submitted": """
with forkshm.Executor(2) as executor:
    futures = [executor.submit(begin, x) for x in range(40)]
    try:
        futures[-1].result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
""",
    "consumer that raises": """
with forkshm.Executor(2) as executor:
    for _ in executor.map(begin, range(40)):
        raise KeyboardInterrupt
""",
}


@pytest.mark.skipif(not CAN_FORK, reason="the script defines its function after the start")
@pytest.mark.parametrize("name", MAPS)
def test_an_interrupted_map_begins_no_more_items(name, tmp_path):
    """Calls that no worker has begun are cancelled, wherever they wait; running calls are finished."""
    script = tmp_path / "script.py"
    begun = tmp_path / "begun"
    begun.mkdir()
    script.write_text(
        f"""
import os, pathlib, signal, sys, time
import forkshm
PARENT = os.getpid()
def begin(x):
    pathlib.Path({str(begun)!r}, str(x)).touch()
    if x == 2 and {not name.startswith("consumer")}:
        os.kill(PARENT, signal.SIGINT)
    time.sleep(0.1)
try:
{textwrap.indent(MAPS[name], "    ")}
except KeyboardInterrupt:
    sys.exit(3)
"""
    )
    done = subprocess.run([sys.executable, str(script)], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    # Each of two workers may have taken another item before the interrupt was seen.
    assert len(list(begun.iterdir())) < 15


IN_AN_IMPORT = """
import sys
import forkshm

def use():
    try:
        forkshm.zeros(3)
    except forkshm.ForkshmError as error:
        print(error)

def hook(event, arguments, came=[]):
    if event == "import" and arguments[0] == "numpy" and not came:
        came.append(True)
        use()  # as a signal handler would

sys.addaudithook(hook)
print(forkshm.zeros(3).sum())
"""


def test_a_handler_that_interrupts_the_import_it_needs_is_told(run_script):
    said, total = run_script(IN_AN_IMPORT).splitlines()
    assert said.startswith("cannot use forkshm.zeros here: this signal handler or finalizer has interrupted the import")
    assert total == "0.0"


IN_A_FORK_HOOK = """
import logging, os, signal, sys, threading
import forkshm

def handle(*_):
    raise TimeoutError("the alarm")

def hook():
    if armed:
        armed.clear()
        os.kill(os.getpid(), signal.SIGUSR1)

armed = []
signal.signal(signal.SIGUSR1, handle)
os.register_at_fork({when}=hook)
armed.append(True)
try:
    {start}
except TimeoutError as error:
    print(error)
print(signal.getsignal(signal.SIGUSR1) is handle)
# The lock of `logging`, which its hook takes, is free.
thread = threading.Thread(target=logging.warning, args=("",))
logging.disable()
thread.start()
thread.join(10)
print(thread.is_alive())
"""


@pytest.mark.needs("interrupts")
@pytest.mark.parametrize("start", ["forkshm.Pool(2)", "forkshm.Process(target=int).start()"])
@pytest.mark.parametrize("when", ["before", "after_in_parent"])
def test_an_exception_of_any_handler_in_fork_hooks_is_not_lost(run_script, when, start):
    assert run_script(IN_A_FORK_HOOK.format(when=when, start=start)) == "the alarm\nTrue\nFalse\n"


WHILE_STARTING = """
import os, signal, forkshm

def handle(*_):
    print("handled in", "the child" if os.getpid() != parent else "the parent", flush=True)

parent = os.getpid()
signal.signal(signal.SIGUSR1, handle)
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGUSR1))
process = forkshm.get_context("fork").Process(target=int)
process.start()
process.join()
print(process.exitcode)
"""


@pytest.mark.needs("interrupts")
def test_a_signal_to_a_starting_process_is_handled_there(run_script):
    assert run_script(WHILE_STARTING) == "handled in the child\n0\n"
