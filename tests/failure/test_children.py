"""Child processes that are hard to watch: dead at once, reaped by other code, with grandchildren, or never started."""

import contextlib
import inspect
import os
import select
import signal
import tempfile
import textwrap
import threading

import functions as f
import pytest
import started

import forkshm
from forkshm import WorkerDiedError, _multiprocess, processes
from forkshm.backend import kernel
from forkshm.errors import WorkerStartError

pytestmark = pytest.mark.needs("children")

METHODS = ["fork", "forkserver", "spawn"]


@contextlib.contextmanager
def handler_of(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_the_death_of_a_first_worker_that_is_not_yet_watched_is_handled(monkeypatch):
    """multiprocess reaps ended children when it starts another process."""
    start = processes.ForkProcess.start
    started_last = []

    def wait_for_the_last(process):
        while started_last:
            os.waitid(os.P_PID, started_last.pop(), os.WEXITED | os.WNOWAIT)
        start(process)
        started_last.append(process.pid)

    monkeypatch.setattr(processes.ForkProcess, "start", wait_for_the_last)
    with forkshm.Executor(2) as executor:
        doomed = executor.submit(os._exit, 1)
        monkeypatch.undo()
        assert isinstance(doomed.exception(timeout=60), WorkerDiedError)
        assert executor.submit(f.square, 3).result(timeout=60) == 9


@pytest.mark.nightly
def test_a_thousand_executors_whose_first_worker_dies_at_once():
    for _ in range(1000):
        with forkshm.Executor(4) as executor:
            assert isinstance(executor.submit(os._exit, 1).exception(timeout=60), WorkerDiedError)


def test_other_code_may_reap_every_child():
    stop = threading.Event()

    def reap():
        while not stop.is_set():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)

    other = threading.Thread(target=reap)
    other.start()
    try:
        for _ in range(20):
            with forkshm.Executor(2) as executor:
                assert isinstance(executor.submit(os._exit, 1).exception(timeout=60), WorkerDiedError)
                assert executor.submit(f.square, 3).result(timeout=60) == 9
    finally:
        stop.set()
        other.join()


@pytest.mark.skipif(not f.keeps_exit_codes(), reason="needs Linux 6.15, which keeps them for pidfds")
@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(("exit_", "expected"), [((os._exit, 3), 3), ((os.abort,), -signal.SIGABRT)])
def test_an_exit_code_that_a_signal_handler_took_is_known(method, exit_, expected):
    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    with handler_of(signal.SIGCHLD, reap):
        process = forkshm.get_context(method).Process(target=exit_[0], args=exit_[1:])
        process.start()
        process.join(60)
        assert process.exitcode == expected
        process.close()


@pytest.mark.skipif(not f.keeps_exit_codes(), reason="needs Linux 6.15, which keeps them for pidfds")
def test_the_exit_code_of_another_process_is_not_taken():
    """A program that closes all fds, and starts another process, which gets the number of the first one's sentinel."""
    with handler_of(signal.SIGCHLD, signal.SIG_IGN):
        first = forkshm.get_context("fork").Process(target=os._exit, args=(3,))
        first.start()
        second = forkshm.get_context("fork").Process(target=os._exit, args=(4,))
        second.start()
        second.join(60)
        popen = first._popen
        ended = select.poll()
        ended.register(first.sentinel, select.POLLIN)
        assert ended.poll(60_000)
        programs = os.dup2(second.sentinel, first.sentinel)
        assert popen.wait() == 255
        assert second.exitcode == 4
        first.close()
        os.close(programs)  # not closed with the process: it is another file
        second.close()


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
def test_a_process_is_known_to_have_ended_where_SIGCHLD_is_ignored(method):
    context = forkshm.get_context(method)
    with handler_of(signal.SIGCHLD, signal.SIG_IGN):
        process = context.Process(target=f.nothing)
        process.start()
        process.join(60)
        assert not process.is_alive()
        assert process.exitcode is not None
        process.close()
        with context.Pool(2) as pool:
            assert pool.map(f.square, range(4)) == [0, 1, 4, 9]
            with pytest.raises(WorkerDiedError):
                pool.apply(os._exit, (1,))
            assert pool.apply(f.square, (5,)) == 25


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
def test_a_child_is_joined_while_a_grandchild_lives(method, tmp_path):
    process = forkshm.get_context(method).Process(target=f.leave_a_grandchild, args=(tmp_path / "over",))
    process.start()
    try:
        process.join(60)
        assert process.exitcode == 7
        assert not process.is_alive()
    finally:
        (tmp_path / "over").touch()
    process.close()


@pytest.mark.needs("pidfds")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_that_closes_all_its_fds_is_alive(method):
    process = forkshm.get_context(method).Process(target=f.close_everything)
    process.start()
    process.join(0.3)
    assert process.is_alive()
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    process.close()


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
def test_several_threads_may_join_one_process(method):
    for _ in range(5):
        process = forkshm.get_context(method).Process(target=os._exit, args=(3,))
        process.start()
        codes = []

        def join(process=process, codes=codes):
            process.join()
            codes.append(process.exitcode)

        threads = [threading.Thread(target=join) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert codes == [3] * 8
        process.close()


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
def test_a_process_that_another_thread_closes_while_it_is_asked_has_its_exit_code(method, monkeypatch):
    """As when a pool ends in one thread, while another thread starts a process, which asks all children."""
    process = forkshm.get_context(method).Process(target=os._exit, args=(3,))
    process.start()
    select.select([process.sentinel], [], [])
    popen = process._popen
    refers_to = type(kernel).refers_to

    def close_meanwhile(self, fd, file):
        monkeypatch.undo()
        process.join()
        process.close()
        return refers_to(self, fd, file)

    monkeypatch.setattr(type(kernel), "refers_to", close_meanwhile)
    assert popen.wait(0) == 3


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("ends", ["before", "after"])
def test_a_process_of_the_fork_server_whose_sentinel_was_closed_is_joined(ends):
    receiver, sender = forkshm.Pipe(duplex=False)
    process = forkshm.get_context("forkserver").Process(target=receiver.recv)
    process.start()
    if ends == "before":
        sender.send(None)
        select.select([process.sentinel], [], [])
    os.close(process.sentinel)
    if ends == "after":
        process.join(0.05)
        assert process.is_alive()
        sender.send(None)
    process.join(60)
    assert process.exitcode == 255  # unknown
    process.close()
    receiver.close()
    sender.close()


def test_an_interrupted_join_loses_no_exit_code(run_script):
    """A signal handler raises at any instruction."""
    code = """
        import os, sys, forkshm
        from forkshm.processes import _popen_fork

        class Stop(Exception):
            pass

        def trial(after):
            left = after
            def trace(frame, event, argument):
                nonlocal left
                if frame.f_code.co_filename != _popen_fork.__file__:
                    return None
                frame.f_trace_opcodes = True
                if event == "opcode":
                    left -= 1
                    if not left:
                        raise Stop
                return trace
            process = forkshm.Process(target=os._exit, args=(5,))
            process.start()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            sys._getframe().f_trace_opcodes = True  # in 3.12, frames are instrumented only if one asked for it before
            sys.settrace(trace)
            try:
                process.join()
            except Stop:
                pass
            finally:
                sys.settrace(None)
            process.join()
            assert process.exitcode == 5, (after, process.exitcode)
            try:
                os.waitpid(process.pid, os.WNOHANG)
                raise SystemExit(f"not reaped: {after}")
            except ChildProcessError:
                pass
            process.close()
            return left > 0

        tried = 1
        while not trial(tried):
            tried += 1
        print(tried)
    """
    assert int(run_script(textwrap.dedent(code))) > 50


def test_refused_forks_leave_no_fds(monkeypatch):
    before = started.count_fds()

    def refuse():
        raise BlockingIOError(11, os.strerror(11))

    monkeypatch.setattr(os, "fork", refuse)
    for _ in range(5):
        with pytest.raises(WorkerStartError, match="limit on processes"):
            forkshm.Pool(2)
        with pytest.raises(BlockingIOError):
            forkshm.Process(target=f.nothing).start()
    assert started.count_fds() == before


@pytest.mark.skipif(
    hasattr(_multiprocess.util, "_get_base_temp_dir")
    and not inspect.signature(tempfile._get_default_tempdir).parameters,
    reason="multiprocess calls a function of CPython 3.14 here, and raises TypeError",
)
def test_a_directory_for_temporary_files_that_is_too_long_is_named_or_avoided(run_script, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    out = run_script(
        """
import forkshm
if __name__ == "__main__":
    try:
        forkshm.get_context("forkserver").Pool(1)
    except forkshm.errors.WorkerStartError as error:
        print(error)
"""
    )
    if hasattr(_multiprocess.util, "_get_base_temp_dir"):  # since CPython 3.14, another directory is used
        assert not out
    else:
        assert "Set TMPDIR" in out
    assert "ulimit" not in out


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_current_directory_that_was_deleted_is_named(run_script, tmp_path, method):
    gone = tmp_path / "gone"
    gone.mkdir()
    out = run_script(
        """
import os, sys, forkshm
if __name__ == "__main__":
    os.rmdir(os.getcwd())
    try:
        forkshm.get_context(sys.argv[1]).Pool(1)
    except forkshm.errors.WorkerStartError as error:
        print(error)
    try:
        forkshm.get_context(sys.argv[1]).Process().start()
    except FileNotFoundError as error:
        print(error.__notes__)
""",
        method,
        cwd=gone,
    )
    assert out.count("the current directory of this process was deleted") == 2
    assert "ulimit" not in out
