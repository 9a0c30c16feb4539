"""A program that closes all its fds, and opens files of its own, keeps these files."""

from __future__ import annotations

import socket

import pytest

pytestmark = [
    pytest.mark.needs("fd_numbers"),
    pytest.mark.slow,
]

PROGRAM = """
import os, sys, tempfile
import numpy as np
import forkshm

def add_one(array):
    return array + 1

if __name__ == "__main__":
    context = forkshm.get_context(sys.argv[1])
    with context.Pool(1) as pool:
        pool.map(add_one, [np.ones(200_000)])
    os.closerange(3, 1024)
    with tempfile.TemporaryDirectory() as folder:
        files = [open(f"{folder}/{number}", "w+b", buffering=0) for number in range(30)]
        for file in files:
            file.write(b"mine")
        for _ in range(3):
            with context.Pool(1) as pool:
                assert (pool.apply(add_one, (np.ones(200_000),)) == 2).all()
        for file in files:
            assert os.fstat(file.fileno()).st_ino == os.stat(file.name).st_ino, "a file was closed"
            file.seek(0)
            assert file.read() == b"mine", "a file was written to"
            file.close()
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_files_with_the_numbers_of_closed_fds_are_left_alone(run_script, method):
    assert run_script(PROGRAM, method) == "done\n"


ANEW = """
import os, sys, tempfile
import numpy as np
import forkshm

def pool(array):
    with context.Pool(2) as pool:
        return pool.map(np.negative, [array, array])[1]

def executor(array):
    with forkshm.Executor(1, mp_context=context) as executor:
        return executor.submit(np.negative, array).result()

def queue(array):
    queue = context.Queue()
    kept.append(queue)
    queue.put(-array)
    return queue.get(timeout=5)

def pipe(array):
    here, there = context.Pipe()
    kept.append((here, there))
    here.send(-array)
    return there.recv()

def lock(array):
    lock = context.Lock()
    kept.append(lock)
    with lock:
        return -array

if __name__ == "__main__":
    context = forkshm.get_context("fork")
    kinds = pool, executor, queue, pipe, lock
    array = np.ones(100_000)
    kept = []
    broken = context.Pool(2), context.Queue()
    for _ in range(2):
        for kind in kinds:
            assert (kind(array) == -1).all()
        os.closerange(3, 1024)
        with tempfile.TemporaryDirectory() as folder:
            files = [open(f"{folder}/{number}", "w+b", buffering=0) for number in range(60)]
            for use in (lambda: broken[0].map(np.negative, [array] * 2), lambda: broken[1].put(array)):
                try:
                    use()
                except forkshm.ForkshmError:
                    pass
            for kind in kinds:
                assert (kind(array) == -1).all(), kind
                kept.clear()
            for file in files:
                assert os.fstat(file.fileno()).st_ino == os.stat(file.name).st_ino, "a file was closed"
                assert file.tell() == os.stat(file.name).st_size == 0, "a file was used"
                file.close()
        broken = context.Pool(2), context.Queue()
    print("done")
"""


def test_a_program_that_closed_all_its_fds_can_make_everything_anew(run_script):
    assert run_script(ANEW) == "done\n"


RESTARTED = """
import forkshm
from multiprocess import forkserver

def start():
    with forkshm.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
    return forkserver._forkserver._forkserver_pid

if __name__ == "__main__":
    first = start()
    forkserver._forkserver._stop()
    second, third = start(), start()
    assert first != second == third, (first, second, third)
    print("done")
"""


@pytest.mark.needs("fork")
def test_a_fork_server_that_was_started_anew_stays(run_script):
    assert run_script(RESTARTED) == "done\n"


REAPED = """
import os, signal
import forkshm
from multiprocess import forkserver

def start():
    with forkshm.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
    return forkserver._forkserver._forkserver_pid

def wait_for(pid):
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass

if __name__ == "__main__":
    fds = []
    first = start()
    for action in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGCHLD, action)
        os.kill(first, signal.SIGKILL)
        wait_for(first)
        fds.append(len(os.listdir("/proc/self/fd")))
        second = start()
        assert first != second
        first = second
    print(fds[0] == fds[1])
"""


@pytest.mark.needs("fork")
def test_a_fork_server_that_other_code_reaped_is_started_anew(run_script):
    assert run_script(REAPED) == "True\n"


CLEANED = """
import os, shutil, tempfile
import forkshm

def use():
    with forkshm.get_context("forkserver").Pool(1) as pool:
        return pool.apply(abs, (-1,))

def clean(folder):
    for name in os.listdir(folder):
        shutil.rmtree(os.path.join(folder, name))

if __name__ == "__main__":
    folder = tempfile.tempdir = tempfile.mkdtemp()
    use()
    pool = forkshm.get_context("forkserver").Pool(1)
    clean(folder)
    print(use(), pool.apply(abs, (-2,)))
    pool.terminate()
    clean(folder)
    print(use())
    clean(folder)
    os.rmdir(folder)
    try:
        use()
    except forkshm.WorkerStartError as error:
        print("does not exist. Set TMPDIR" in str(error))
"""


@pytest.mark.needs("fork")
def test_a_fork_server_whose_directory_was_deleted_is_started_anew(run_script):
    assert run_script(CLEANED) == "1 2\n1\nTrue\n"


CHANNEL = """
import os, tempfile
import forkshm

here, there = forkshm.Pipe()
fds = here.fileno(), there.fileno()
for fd in fds:
    os.close(fd)
files = [tempfile.TemporaryFile() for _ in fds] if REUSED else []
for call in (lambda: here.send(1), there.recv):
    try:
        call()
    except forkshm.ChannelClosedError as error:
        print("other code in this process has closed" in str(error), flush=True)
os._exit(0)  # closes no file by its number
"""


@pytest.mark.parametrize("reused", [False, True], ids=["closed", "reused"])
def test_a_channel_says_that_other_code_has_closed_its_fd(run_script, reused):
    said = run_script(CHANNEL.replace("REUSED", str(reused)))
    assert said == "True\nTrue\n"


# Each makes something, and returns functions that use it or end it after its fds were closed.
OBJECTS = """
import asyncio, os, pathlib, signal, socket, sys, tempfile, time
import numpy as np
import forkshm
from forkshm import aio

def twice(array):
    return array * 2

def pool(context):
    pool = context.Pool(2)
    pool.map(twice, [np.ones(200_000)] * 2)
    answers = [pool.apply_async(time.sleep, (0.2,)) for _ in range(6)]
    yield lambda: [answer.get(10) for answer in answers]
    yield lambda: pool.apply(abs, (1,))
    yield lambda: pool.map(twice, range(3))
    for call in (pool.close, pool.join, pool.terminate, pool.join):
        yield call

def executor(context):
    executor = forkshm.Executor(2, mp_context=context)
    futures = [executor.submit(time.sleep, 0.2) for _ in range(6)]
    yield lambda: [future.result(10) for future in futures]
    yield lambda: executor.submit(abs, 1).result(10)
    yield lambda: executor.shutdown(cancel_futures=True)

def awaited(context):
    pool = aio.Pool(2)
    asyncio.run(call(pool))
    yield lambda: asyncio.run(call(pool))
    yield pool.terminate

async def call(pool):
    await pool.call(abs, 1)

def queue(context):
    queue = context.JoinableQueue()
    queue.put(np.ones(200_000))
    for call in (queue.get, lambda: queue.get(timeout=1), lambda: queue.put(1), queue.task_done, queue.join,
                 queue.qsize, queue.close, queue.join_thread):
        yield call

def full(context):
    queue = context.Queue()
    queue._writer._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    for _ in range(20):
        queue.put(np.ones(20_000))
    yield lambda: queue.put(1)
    yield queue.close
    yield queue.join_thread

def pipe(context):
    here, there = context.Pipe()
    here.send(1)
    for call in (lambda: here.send(1), there.recv, lambda: there.poll(1), here.close, there.close):
        yield call

def received(context):
    here, there = context.Pipe()
    here.send(np.ones(200_000))
    got = there.recv()
    yield lambda: fork(got)
    here, there = context.Pipe()
    here.send(got)
    assert there.recv().sum() == 200_000

def fork(array):
    pid = os.fork()
    if not pid:
        array[:] = 5
        os._exit(not (array == 5).all())
    assert os.waitpid(pid, 0)[1] == 0 and (array == 1).all()

def manager(context):
    manager = forkshm.Manager()
    given = manager.dict(a=1)
    yield lambda: given["a"]
    yield manager.shutdown

def process(context):
    process = context.Process(target=time.sleep, args=(60,))
    process.start()
    yield process.is_alive
    yield process.kill
    yield process.join
    assert not process.is_alive()
    yield process.close

def regions(context):
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name, "file")
        path.write_bytes(bytes(10_000))
        opened = forkshm.FileMapping(str(path), "read_only")
        things = [forkshm.anonymous_shared_memory(10_000), forkshm.zeros(3), forkshm.MappedRegion(opened, "read_only")]
        memory = forkshm.shared_memory.SharedMemory(create=True, size=10_000)
        yield bool
        things[1][0] = 5
        for call in (things[0].close, opened.close, memory.close, memory.unlink):
            yield call

def team(context):
    with forkshm.team(2) as team:
        if team.rank:
            time.sleep(60)
        yield lambda: team.reduce(np.ones(20_000))

def launched(context):
    launched = forkshm.launch(lambda rank: time.sleep(60), workers=2, join=False)
    yield lambda: launched.join()
    yield launched.terminate

def supervised(context):
    def run(me):
        os.kill(os.getppid(), signal.SIGHUP)
        me.wait()
    closed = iter([close_all])
    try:
        forkshm.supervise(run, workers=1, on_reload=lambda: next(closed)())
    except Exception as error:
        tell(error)
    yield bool
"""

MAIN = """
files = []
sockets = []

def close_all():
    os.closerange(3, 1024)
    for _ in range(15 if KIND else 0):
        if KIND == "files":
            fds = [tempfile.mkstemp(dir=folder.name)[0]]
            os.write(fds[0], b"mine")
        elif KIND == "pipes":
            fds = os.pipe()
        else:
            pair = socket.socketpair(socket.AF_UNIX, KIND)
            for end, other in (pair, pair[::-1]):
                other.sendall(b"mine")
                end.setblocking(False)
            sockets.extend(pair)
            fds = [end.fileno() for end in pair]
        files.extend((fd, os.fstat(fd).st_ino) for fd in fds)

def check():
    for fd, inode in files:
        assert os.fstat(fd).st_ino == inode, "a file was closed"
        if KIND == "files":
            assert os.pread(fd, 10, 0) == b"mine" and os.lseek(fd, 0, 1) == 4, "a file was used"
    for end in sockets:
        assert end.recv(1000, socket.MSG_PEEK) == b"mine", "a socket was used"

def tell(error):
    text = str(error)
    known = ("other code in this process", "was closed", "process object is closed", "is broken", "to the other end")
    known += ("other end is gone", "Connection refused", "cannot join", "[Errno 2] shm_unlink", "its process has ended")
    if not any(words in text for words in known) and text:
        print(f"{error!r} says nothing of it", flush=True)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        class folder:
            name = path
        try:
            calls = globals()[sys.argv[1]](forkshm.get_context(sys.argv[2]))
            first = next(calls)
            if not files:
                close_all()
            while first is not None:
                try:
                    first()
                except Exception as error:
                    tell(error)
                check()
                first = next(calls, None)
            del calls, first
        except Exception as error:
            tell(error)
        check()
    print("done")
"""

# What the program opens after it has closed everything; for sockets, their type.
KINDS = {
    "closed": "",
    "files": "files",
    "pipes": "pipes",
    "packets": int(socket.SOCK_SEQPACKET),
    "streams": int(socket.SOCK_STREAM),
}
NAMES = [line[4:].partition("(")[0] for line in OBJECTS.splitlines() if line.endswith("(context):")]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_object_whose_fds_were_closed_goes_on_or_says_so_and_uses_no_other_file(run_script, name, kind):
    assert run_script(OBJECTS + MAIN.replace("KIND", repr(kind)), name, "fork") == "done\n"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("name", ["pool", "executor", "process"])
def test_a_process_that_was_not_forked_and_its_pool_end_without_their_fds(run_script, name, method, kind):
    assert run_script(OBJECTS + MAIN.replace("KIND", repr(kind)), name, method) == "done\n"
