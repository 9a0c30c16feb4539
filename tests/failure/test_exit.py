"""Programs that end with open objects, or close them in a __del__ or an exit function, end silently and at once."""

import sys

import pytest
import started
from capability_skips import has

from forkshm.backend import IS_FREE_THREADED

PROGRAM = '''
import atexit, sys, time
import forkshm as mp


def f(x):
    return x


class Owner:
    """A user's object."""

    def __init__(self, *actions):
        self.actions = actions

    def __del__(self, write=sys.stdout.write, flush=sys.stdout.flush):
        for action in self.actions:
            action()
        write("done\\n")
        flush()


def pool(ctx):
    pool = ctx.Pool(2)
    return pool, (pool.close, pool.terminate, pool.join)


def used_pool(ctx):
    pool = ctx.Pool(2)
    result = pool.map_async(f, range(4))
    result.get()
    return (pool, result), (result.ready, result.wait, result.get, pool.terminate, pool.join)


def busy_pool(ctx):
    pool = ctx.Pool(2)
    return (pool, pool.map_async(time.sleep, [30] * 4)), (pool.close, pool.terminate)


def pool_with_a_thread(ctx):
    pool = ctx.Pool(2)
    return (pool, pool.map_async(time.sleep, [30] * 4, callback=f)), (pool.terminate,)


def iterator(ctx):
    pool = ctx.Pool(2)
    results = pool.imap(f, range(100))
    next(results)
    return (pool, results), (pool.terminate,)


def closed_pool(ctx):
    pool = ctx.Pool(2)
    pool.close()
    return pool, (pool.join,)


def executor(ctx):
    executor = mp.Executor(2, mp_context=ctx)
    executor.submit(f, 1).result()
    return executor, (executor.shutdown,)


def queue(ctx):
    queue = ctx.Queue()
    queue.put(bytes(1000))
    return queue, (queue.cancel_join_thread, queue.close)


def pipe(ctx):
    ends = ctx.Pipe()
    return ends, [end.close for end in ends]


def process(ctx):
    process = ctx.Process(target=time.sleep, args=(30,), daemon=True)
    process.start()
    return process, (process.terminate,)


def manager(ctx):
    manager = ctx.Manager()
    return (manager, manager.dict()), (manager.shutdown,)


def region(ctx):
    region = mp.anonymous_shared_memory(10_000)
    return region, (region.close,)


def mutex(ctx):
    mutex = mp.region.Mutex(mp.anonymous_shared_memory(4096))
    mutex.acquire()
    return mutex, (mutex.release,)


def locks(ctx):
    made = [ctx.Lock(), ctx.RLock(), ctx.Semaphore(2), ctx.BoundedSemaphore(2), ctx.Condition()]
    for lock in made:
        lock.acquire()
    return made, (made[4].notify_all, *(lock.release for lock in made), ctx.Event().set, ctx.Barrier(1).wait)


def locks_in_a_region(ctx):
    made = [mp.region.RWLock(mp.anonymous_shared_memory(4096)), mp.region.Semaphore(mp.anonymous_shared_memory(4096))]
    made[0].acquire_write()
    return made, (made[0].release, made[1].release)


def values(ctx):
    value, array = ctx.Value("i", 1), ctx.Array("d", 3)
    return (value, array), (
        lambda: setattr(value, "value", 2),
        lambda: array.__setitem__(0, 2.0),
        value.get_lock().acquire,
    )


def messages(ctx):
    bounded, joinable, simple = ctx.Queue(3), ctx.JoinableQueue(), ctx.SimpleQueue()
    here, there = ctx.Pipe()
    return (bounded, joinable, simple, here), (
        lambda: [channel.put(1) for channel in (bounded, joinable, simple)],
        lambda: [channel.get() for channel in (bounded, joinable, simple)],
        joinable.task_done,
        lambda: here.send([1]),
        there.recv,
    )


def shared_memory(ctx):
    memory = mp.shared_memory.SharedMemory(create=True, size=100)
    items = mp.shared_memory.ShareableList([1, "two"])
    return (memory, items), (
        memory.close,
        memory.unlink,
        lambda: items.__setitem__(0, 2),
        items.shm.close,
        items.shm.unlink,
    )


def ended_process(ctx):
    process = ctx.Process(target=f, args=(1,))
    process.start()
    return process, (process.join, process.close)


if __name__ == "__main__":
    method, kind, place = sys.argv[1:]
    thing, actions = globals()[kind](mp.get_context(method))
    if place == "__del__":
        owner = Owner(*actions)
    elif place == "__del__ in a cycle":
        owner = Owner(*actions)
        owner.itself = owner
    elif place == "__del__ of a module's":
        mp.errors.kept = Owner(*actions)
    elif place == "exit function":
        atexit.register(lambda: [action() for action in actions])
    elif place == "nowhere":
        sys.kept = thing
        del thing
'''

KINDS = [line[4 : line.index("(")] for line in PROGRAM.splitlines() if line.startswith("def ") and "(ctx)" in line]
PLACES = ["global", "nowhere", "__del__", "__del__ in a cycle", "__del__ of a module's", "exit function"]
SOME = [("fork", kind, "__del__") for kind in KINDS] + [
    ("fork", kind, "global") for kind in ("pool", "busy_pool", "executor")
]
ALL = [(method, kind, place) for method in ("fork", "forkserver", "spawn") for kind in KINDS for place in PLACES]


# The actions of these kinds run Python functions, which look up names of their modules.
PYTHON = {"locks_in_a_region", "values", "messages", "shared_memory", "ended_process"}
if IS_FREE_THREADED:  # modules are cleared one by one there, because CPython 3.13 keeps every function
    PYTHON |= {"queue", "pipe", "region", "mutex", "locks"}


def check(run_script, method, kind, place):
    if place == "__del__ of a module's" and (kind in PYTHON or (kind == "mutex" and not has("mutexes_in_c"))):
        pytest.xfail("these are Python code, and the names of its modules are gone by then")
    done = run_script(PROGRAM, method, kind, place, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in (("", "done\n") if place != "__del__" else ("done\n",))


@pytest.mark.skipif(not started.CAN_FORK, reason="there is no fork")
@pytest.mark.parametrize(("method", "kind", "place"), SOME)
def test_a_program_ends_silently(run_script, method, kind, place):
    check(run_script, method, kind, place)


@pytest.mark.skipif(not started.CAN_FORK, reason="there is no fork")
@pytest.mark.parametrize("kind", ["locks", "values"])
def test_a_program_that_has_no_native_locks_ends_silently(run_script, kind, monkeypatch):
    """As other processors than x86-64 do."""
    monkeypatch.setenv("FORKSHM_NATIVE_LOCKS", "0")
    check(run_script, "fork", kind, "__del__ in a cycle")


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "kind", "place"), [each for each in ALL if each not in SOME])
def test_a_program_ends_silently_with_every_start_method(run_script, method, kind, place):
    if method != "spawn" and not has("fork"):
        pytest.skip("needs fork")
    check(run_script, method, kind, place)


DAEMON = """
import sys, threading, time
import forkshm as mp

def work(call):
    began.set()
    while True:
        call(pool)

CALLS = {
    "map": lambda pool: pool.map(abs, range(100)),
    "apply": lambda pool: pool.apply(time.sleep, (0.01,)),
    "imap": lambda pool: list(pool.imap(abs, range(10))),
    "long": lambda pool: pool.map(time.sleep, [60, 60]),
    "map_async": lambda pool: pool.map_async(time.sleep, [60, 60]).get(),
    "imap, long": lambda pool: list(pool.imap(time.sleep, [60, 60])),
}

if __name__ == "__main__":
    began = threading.Event()
    pool = mp.Pool(2)
    threading.Thread(target=work, args=(CALLS[sys.argv[1]],), daemon=True).start()
    began.wait()
"""


@pytest.mark.parametrize("call", ["map", "apply", "imap", "long", "map_async", "imap, long"])
def test_a_daemon_thread_in_a_call_prints_nothing_at_the_end(run_script, call):
    """As with multiprocessing, where such a thread never gets an answer."""
    done = run_script(DAEMON, call, check=False)
    assert (done.returncode, done.stderr) == (0, "")


WAITS = """
import sys, threading
import forkshm as mp

WAITS = {
    "recv": lambda: ends[0].recv(),
    "recv_bytes": lambda: ends[0].recv_bytes(),
    "poll": lambda: ends[0].poll(None),
    "get": lambda: mp.Queue().get(),
    "SimpleQueue.get": lambda: mp.SimpleQueue().get(),
    "acquire": lambda: taken.acquire(),
    "wait": lambda: mp.Event().wait(),
}

def work():
    began.set()
    WAITS[sys.argv[1]]()

if __name__ == "__main__":
    began, ends, taken = threading.Event(), mp.Pipe(), mp.Lock()
    taken.acquire()
    threading.Thread(target=work, daemon=True).start()
    began.wait()
"""


@pytest.mark.parametrize("wait", ["recv", "recv_bytes", "poll", "get", "SimpleQueue.get", "acquire", "wait"])
def test_a_daemon_thread_that_waits_prints_nothing_at_the_end(run_script, wait):
    done = run_script(WAITS, wait, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="CPython 3.12.1 cannot fork in exit functions")
def test_an_executor_is_imported_while_the_program_exits(run_script):
    program = """
import atexit
import forkshm

def use():
    with forkshm.Executor(1) as executor:
        print(executor.submit(abs, -3).result())

if __name__ == "__main__":
    atexit.register(use)
"""
    done = run_script(program, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.needs("fork")
def test_a_child_runs_its_own_exit_functions_and_not_those_of_its_parent(run_script):
    program = """
import atexit
import os
import sys

import forkshm


def at_exit():
    print("the parent's", os.getpid() == PID, flush=True)


def use():
    atexit.register(print, "the child's", flush=True)


PID = os.getpid()
if __name__ == "__main__":
    atexit.register(at_exit)
    process = forkshm.Process(target=use)
    process.start()
    process.join()
    with forkshm.Pool(1) as pool:
        pool.apply(use)
        pool.close()
        pool.join()
"""
    of_children = "the child's\n" * 2 if sys.version_info >= (3, 13) else ""
    assert run_script(program, check=False).stdout == of_children + "the parent's True\n"
