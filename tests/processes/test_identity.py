"""The identity of a process: names, parents, children, daemons, exit; for the standard library as well."""

import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os

import functions as f
import pytest

import forkshm
from forkshm import _multiprocess
from forkshm._system import CAN_FORK
from forkshm.processes import exit_code

METHODS = {"fork": "Fork", "forkserver": "ForkServer", "spawn": "Spawn"}


@pytest.fixture(scope="module")
def _fork_server():
    # The fork server and the resource tracker live as long as this process. Tests of forkserver are skipped without it.
    if not CAN_FORK:
        return
    with forkshm.get_context("forkserver").Pool(1) as pool:
        pool.apply(int)


pytestmark = pytest.mark.usefixtures("_fork_server")


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_is_called_as_the_standard_librarys_is(method):
    with forkshm.get_context(method).Pool(1) as pool:
        ours, theirs = pool.apply(f.who_am_i)
    assert ours["name"].startswith(f"{METHODS[method]}PoolWorker-")
    assert theirs["name"] == ours["name"]
    assert theirs["daemon"] is True
    for who in (ours, theirs):
        assert who["is_me"]
        assert who["parent"] == ("MainProcess", os.getpid(), True)
        assert who["children"] == []


@pytest.mark.parametrize("method", METHODS)
def test_workers_may_start_processes_with_multiprocessing(method):
    context = forkshm.get_context(method)
    with context.Pool(1) as pool, forkshm.Executor(1, context) as executor:
        assert pool.apply(f.exit_code_of_a_standard_child) == 0
        assert executor.submit(f.exit_code_of_a_standard_child).result() == 0
        assert executor.submit(f.who_am_i).result()[1]["daemon"] is True


@pytest.mark.parametrize("daemon", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_current_process_is_right_in_a_worker(method, daemon):
    context = forkshm.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=f.send_who_am_i, args=(writer,), name="me", daemon=daemon)
    process.start()
    with reader, writer:
        ours, theirs = reader.recv()
    process.join()
    assert process.exitcode == 0
    process.close()
    assert ours == theirs
    assert theirs == {
        "name": "me",
        "daemon": daemon,
        "is_me": True,
        "parent": ("MainProcess", os.getpid(), True),
        "children": [],
    }


@pytest.mark.parametrize("method", METHODS)
def test_finalizers_of_the_standard_library_run_at_the_end_of_a_worker(method, tmp_path):
    with forkshm.get_context(method).Pool(1, f.finalize_later, (tmp_path / "mark",)) as pool:
        pool.apply(f.nothing)
        assert not (tmp_path / "mark").exists()
        pool.close()
        pool.join()
    assert (tmp_path / "mark").read_text() == "1\n"


def test_finalizers_of_the_parent_do_not_run_in_a_worker(tmp_path):
    finalizer = multiprocessing.util.Finalize(None, f.touch_file, (tmp_path / "mark", 1), exitpriority=1)
    with forkshm.Pool(1) as pool:
        pool.apply(f.nothing)
        pool.close()
        pool.join()
    assert not (tmp_path / "mark").exists()
    finalizer.cancel()


def test_workers_are_daemons_among_the_children_while_they_live(pool):
    children = {child.pid: child.daemon for child in _multiprocess.process.active_children()}
    for worker in pool._worker_group.workers:
        assert children[worker.pid] is True


def test_the_secret_of_the_standard_library_is_inherited():
    with forkshm.Pool(1) as pool:
        assert pool.apply(f.secret) == bytes(multiprocessing.current_process().authkey)


def test_a_worker_may_have_a_pool_whose_workers_know_their_parent(pool):
    def nested():
        with forkshm.Pool(1) as inner:
            return os.getpid(), inner.apply(f.who_am_i)

    pid, (ours, theirs) = pool.apply(nested)
    assert ours["parent"][1] == theirs["parent"][1] == pid
    assert ours["parent"][0].startswith(f"{METHODS[forkshm.get_start_method()]}PoolWorker-")


def test_workers_log_under_their_names(pool, run_script):
    done = run_script(
        """
import forkshm, logging
from forkshm import _multiprocess
_multiprocess.util.log_to_stderr(logging.INFO)
with forkshm.Pool(1) as pool:
    pool.apply(_multiprocess.util.info, ("hello",))
    pool.close()
    pool.join()
""",
        check=False,
    )
    name = f"{METHODS[forkshm.get_start_method()]}PoolWorker-1"
    assert f"[INFO/{name}] hello" in done.stderr
    assert f"[INFO/{name}] process exiting with exitcode 0" in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_exit_codes(method):
    context = forkshm.get_context(method)
    process = context.Process(target=f.end, args=("sys.exit",))
    process.start()
    process.join()
    assert process.exitcode == 17
    process.close()
    process = context.Process(target=f.hang, args=("/dev/null",))
    process.start()
    process.kill()
    process.join()
    assert process.exitcode == (-9 if CAN_FORK else -15)  # the only way to end a process on Windows
    process.close()


def test_an_exit_code_is_known_when_a_signal_handler_asks_for_it_meanwhile():
    process = forkshm.Process(target=f.end, args=("sys.exit",))
    process.start()
    process.join()
    popen, codes = process._popen, []
    close = popen.close

    def close_with_handler():
        popen.close = close
        codes.append(exit_code(process))
        close()

    popen.close = close_with_handler
    codes.append(exit_code(process))
    assert codes == [17, 17]
