"""Run a script in several processes, each with a rank.

In the script, forkshm.worker() returns the rank and size, the barrier, and shared arrays by name. The processes are
forked from this one and end with it. When one fails, the others get a grace period and are then ended. The exit code is
that of the first failed process, or 128 plus the number of the signal that killed it. SIGINT, SIGTERM, SIGHUP, SIGUSR1
and SIGUSR2 are forwarded to all processes.

Examples:
  python -m forkshm run -n 4 script.py --size 10    four processes; --size 10 is for the script
  python -m forkshm run --prefix script.py          one process for each core; each line begins with its rank
  python -m forkshm run -n 2 -m package.module      a module, as with python -m
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import select
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess, _system
from forkshm.backend import kernel
from forkshm.errors import UnsupportedError, WorkerDiedError, WorkerStartError
from forkshm.spmd import Launch

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

__all__ = ("add_arguments", "run")

_PASSED_ON = (
    (signal.SIGINT, signal.SIGTERM)
    if sys.platform == "win32"
    else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to *parser*."""
    parser.add_argument(
        "-n",
        "--workers",
        type=_count,
        default=kernel.default_workers(),
        metavar="N",
        help="number of processes (default: the number of usable cores)",
    )
    parser.add_argument("--prefix", action="store_true", help="prefix each line of output with the rank: [2] ...")
    parser.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="after a process failed, seconds before SIGTERM is sent to the others, and then SIGKILL (default: 5)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="path of the script")
    parser.add_argument("args", nargs="...", metavar="ARGS", help="arguments of the script")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the script; return the exit code."""
    if not _system.CAN_FORK:
        raise UnsupportedError(
            "cannot run workers: they are forked, and this system cannot fork. Use forkshm.Pool in the script.",
            capability="fork",
        )
    assert sys.platform != "win32"  # type checkers leave out the rest on Windows
    if not arguments.module and not os.path.exists(arguments.script):
        print(f"python -m forkshm run: script {arguments.script!r} does not exist", file=sys.stderr)
        return 2
    output = _Output(arguments.workers) if arguments.prefix else None
    context = _multiprocess.default_context.get_context("fork")
    script = (arguments.script, arguments.module, arguments.args, output)
    # Signals that arrive while the processes are being started are forwarded afterwards.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    try:
        try:
            launched = Launch(_run_script, script, arguments.workers, context, arguments.script, arguments.grace)
        except WorkerStartError as error:
            print(f"python -m forkshm run: {error}", file=sys.stderr)
            return 1
        with _passing_on(launched):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if output is not None:
                output.start()
            try:
                launched.join()
            except WorkerDiedError as error:
                print(f"python -m forkshm run: {error}", file=sys.stderr, flush=True)
                code = error.exitcode or 1  # a process that bypassed the normal exit may have used code 0
                return code if code > 0 else 128 - code
            finally:
                if output is not None:
                    output.finish()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return 0


@contextlib.contextmanager
def _passing_on(launched: Launch) -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        launched.signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- in the workers -------------------------------------------------------------------------


def _run_script(rank: int, script: str, module: bool, args: list[str], output: _Output | None) -> None:
    assert sys.platform != "win32"  # there is no fork
    # In its own process group: Ctrl-C reaches only the launcher, which forwards it once.
    os.setpgid(0, 0)
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if output is not None:
        output.use(rank)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    sys.argv[:] = [script, *args]
    try:
        if module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        # One traceback is enough for Ctrl-C.
        if not isinstance(error, KeyboardInterrupt) or rank == 0:
            _complain(error)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
    finally:
        # A forked process does not run exit functions by itself; a script expects them.
        atexit._run_exitfuncs()


def _complain(error: BaseException) -> None:
    trace = error.__traceback__
    # Omit frames that do not belong to the script.
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


class _Output:
    """The output of all workers, each line prefixed with the writer's rank."""

    def __init__(self, size: int) -> None:
        # Read and write ends for stdout and stderr of each worker.
        self._pipes = [(os.pipe(), os.pipe()) for _ in range(size)]
        self._over_read, self._over_write = os.pipe()
        self._thread = threading.Thread(target=self._driver, name="output")

    def use(self, rank: int) -> None:
        """Redirect the output of this worker; called in the worker."""
        for fd, (_, write_end) in zip((1, 2), self._pipes[rank], strict=True):
            os.dup2(write_end, fd)
        for pipes in self._pipes:
            for ends in pipes:
                for end in ends:
                    os.close(end)
        os.close(self._over_write)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def start(self) -> None:
        """Start forwarding lines. Call it after all forks, so that none happens in a process with several threads."""
        for pipes in self._pipes:
            for _, write_end in pipes:
                os.close(write_end)
        self._thread.start()

    def finish(self) -> None:
        """Forward the remaining lines, without waiting for processes that a worker left running."""
        os.close(self._over_write)
        self._thread.join()

    def _driver(self) -> None:
        assert sys.platform != "win32"  # there is no fork
        poll = select.poll()
        whose = {}
        for rank, pipes in enumerate(self._pipes):
            for into, (read_end, _) in zip((1, 2), pipes, strict=True):
                poll.register(read_end, select.POLLIN)
                whose[read_end] = (b"[%d] " % rank, into)
        poll.register(self._over_read, select.POLLIN)
        begun = dict.fromkeys(whose, b"")
        over = False
        while whose:
            ready = [fd for fd, _ in poll.poll(0 if over else None)]
            if over and not ready:
                break
            for fd in ready:
                if fd == self._over_read:
                    over = True
                    poll.unregister(fd)
                    continue
                prefix, into = whose[fd]
                data = os.read(fd, 65536)
                *lines, rest = (begun[fd] + data).split(b"\n")
                if not data:
                    lines = [rest] if rest else []
                    rest = b""
                    poll.unregister(fd)
                    os.close(fd)
                    del whose[fd]
                begun[fd] = rest
                _write(into, b"".join(prefix + line + b"\n" for line in lines))
        for fd, (prefix, into) in whose.items():
            if begun[fd]:
                _write(into, prefix + begun[fd] + b"\n")
            os.close(fd)
        os.close(self._over_read)


def _write(fd: int, data: bytes) -> None:
    # The reader of the output may have closed it; the workers must not block.
    with contextlib.suppress(OSError):
        while True:
            if not data:
                break
            data = data[os.write(fd, data) :]
