"""Manager: objects of the standard library, reached through forkshm's connections."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time

import numpy as np
import pytest
import started

import forkshm
from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.channel.manager import Accepting


@pytest.fixture(scope="module", autouse=True)
def _warm_up():
    # Modules, and objects that multiprocessing creates once.
    with forkshm.Manager():
        pass


@pytest.fixture
def manager():
    with forkshm.Manager() as made:
        yield made


@pytest.mark.needs("fork")
def test_an_interrupted_shutdown_leaves_no_process():
    manager = forkshm.Manager()
    process = manager._process
    join, calls = process.join, []

    def interrupted(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(timeout)

    process.join = interrupted
    with pytest.raises(KeyboardInterrupt):
        manager.shutdown()
    with pytest.raises(ChildProcessError):  # it was reaped
        os.waitpid(process.pid, os.WNOHANG)
    process.close()


def test_a_server_without_fds_for_its_clients_takes_no_processor_time():
    class Listener:
        calls = 0

        def accept(self):
            self.calls += 1
            if time.monotonic() > end:
                raise SystemExit
            raise OSError(errno.EMFILE, "too many open files")

    end = time.monotonic() + 0.1
    accepting = Accepting()
    accepting.listener = Listener()
    with pytest.raises(SystemExit):
        accepting.accepter()
    assert accepting.listener.calls < 10


def test_dicts_lists_and_the_rest(manager):
    items = manager.list([3, 1, 2])
    items.sort()
    assert list(items) == [1, 2, 3]
    mapping = manager.dict(a=1)
    mapping["items"] = items
    assert list(mapping["items"]) == [1, 2, 3]
    space = manager.Namespace(x=1)
    space.y = 2
    assert (space.x, space.y) == (1, 2)
    value = manager.Value("i", 5)
    value.value += 1
    assert value.value == 6
    queue = manager.Queue()
    queue.put("item")
    assert queue.get() == "item"
    with manager.Lock():
        pass


def test_errors_come_back(manager):
    with pytest.raises(KeyError):
        manager.dict()["missing"]
    with pytest.raises(AttributeError):
        getattr(manager.Namespace(), "missing")  # noqa: B009


def test_shared_memory_passes_as_itself_and_other_arrays_by_value(manager):
    mapping = manager.dict()
    shared = forkshm.zeros(10)
    mapping["shared"] = shared
    mapping["shared"][3] = 7
    assert shared[3] == 7
    plain = np.arange(1_000_000)
    mapping["plain"] = plain
    got = mapping["plain"]
    assert np.array_equal(got, plain)
    got[0] = 1
    assert mapping["plain"][0] == 0


def test_children_and_workers_that_are_there_already_use_proxies(pool, in_child, manager):
    items = manager.list()
    pool.map(items.append, range(20))
    assert sorted(items) == list(range(20))

    assert in_child(lambda: items.append("child")) == 0
    assert items[-1] == "child"


def test_the_context_has_a_manager():
    with forkshm.get_context(*started.methods("fork")).Manager() as manager:
        assert manager.dict(a=1).copy() == {"a": 1}


def test_a_wrong_key_is_refused(manager):
    from forkshm.channel.manager import Client

    with pytest.raises(_multiprocess.context.AuthenticationError, match="digest"):
        Client(manager.address, authkey=b"wrong")
    assert manager.dict(a=1)["a"] == 1


def test_a_silent_connection_blocks_no_other(manager):
    with contextlib.closing(kernel.call(manager.address)) as stranger:
        assert manager.dict(a=1)["a"] == 1
        stranger.send(b"nonsense")
        assert manager.dict(a=1)["a"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_is_not_let_in(manager, in_child):
    from forkshm.channel.manager import Client

    def call():
        key = bytes(_multiprocess.current_process().authkey)
        os.setuid(65534)
        with pytest.raises(Exception, match="belongs to user 0"):
            Client(manager.address, authkey=key)

    assert in_child(call) == 0
    assert manager.dict(a=1)["a"] == 1


def test_a_manager_leaves_no_file():
    with forkshm.Manager() as manager:
        assert manager.address.startswith("\0forkshm-") or os.path.exists(manager.address)
    assert manager.address.startswith("\0forkshm-") or not os.path.exists(os.path.dirname(manager.address))


def test_the_manager_process_ends_with_a_killed_parent(run_script, wait_until):
    done = run_script(
        """
import forkshm, os
manager = forkshm.Manager()
print(manager._process.pid, flush=True)
os.kill(os.getpid(), 9)
""",
        check=False,
    )
    assert done.returncode == started.KILLED
    pid = int(done.stdout)

    wait_until(lambda: not kernel.is_running(pid))


def test_a_killed_manager_is_told(manager):
    mapping = manager.dict(a=1)
    os.kill(manager._process.pid, signal.SIGKILL)
    with pytest.raises((EOFError, OSError)):
        for _ in range(3):
            mapping["a"]


def test_a_collected_manager_ends():
    forkshm.Manager().dict(a=1)  # the leak check finds what stays


def test_the_pool_of_a_manager_is_one_of_forkshm():
    with forkshm.get_context(*started.methods("fork")).Manager() as manager, manager.Pool(1) as pool:
        assert pool.map(lambda x: x + 1, range(3)) == [1, 2, 3]
        with pytest.raises(forkshm.WorkerDiedError):
            pool.apply(os._exit, (1,))
        assert list(pool.imap(abs, [-1])) == [1]


def test_an_initializer_that_cannot_be_called_is_refused_here():
    from forkshm.channel.manager import SyncManager

    with pytest.raises(TypeError, match="initializer must be a callable, got 1"):
        SyncManager().start(1)


# The limit of the manager leaves room for the stacks of a few threads.
OUT_OF_MEMORY = """
import resource, threading, time
import forkshm
from forkshm.managers import SyncManager

def limit():
    with open("/proc/self/statm") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    threading.stack_size(16 * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, resource.RLIM_INFINITY))

def use():
    try:
        shared["key"] = 1
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    everyone.wait()  # keeps the connection of this thread

if __name__ == "__main__":
    manager = SyncManager(ctx=forkshm.get_context("fork"))
    manager.start(limit)
    shared = manager.dict()
    said, everyone = [], threading.Barrier(12)
    threads = [threading.Thread(target=use) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said, "the limit was not reached"
    assert all("has closed the connection" in line for line in said), said
    deadline = time.monotonic() + 30
    while True:
        try:
            assert shared["key"] == 1
            break
        except EOFError:  # the threads of the others have not all ended yet
            assert time.monotonic() < deadline
    del shared
    manager.shutdown()
    print("done")
"""


@pytest.mark.needs("fork")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_client_that_a_manager_has_no_memory_for_is_refused(run_script):
    assert run_script(OUT_OF_MEMORY) == "done\n"
