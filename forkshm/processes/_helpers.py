"""The processes that ``multiprocess`` starts for itself: the resource tracker and the fork server."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from typing import Any

from forkshm import _multiprocess, _system

__all__ = ("ensure_helpers", "note_helpers", "spare_fork_server")


def spare_fork_server() -> None:
    """Keep the fork server from importing ``__main__`` unless it knows the program's arguments.

    In some versions the server imports it without them, and ends if that fails. Its processes import it themselves.
    """
    server = _multiprocess.fork_server()
    if "sys_argv" not in server.main.__code__.co_varnames and server._forkserver._preload_modules == ["__main__"]:
        server._forkserver._preload_modules = []


# The pids of these two processes and the identities of the pipes to them, by fd. An fd that the program has closed and
# reused has another identity. A restarted process may have a pipe with the same fd.
_pipes: dict[int, tuple[int | None, tuple[int, int]]] = {}


def ensure_helpers() -> None:
    """Start the resource tracker unless it runs, and forget a tracker or fork server whose pipe the program closed.

    ``multiprocess`` writes to the tracker's fd to find out whether it runs, and closes the fd if it does not. By then
    the fd may belong to a file that the program opened after it had closed all fds, as daemons do.
    """
    tracker: Any = _multiprocess.resource_tracker._resource_tracker
    if tracker._fd is not None and not _is_helpers(tracker._fd, tracker._pid):
        lost, tracker._fd, tracker._pid = tracker._pid, None, None
        _reap(lost)
    _multiprocess.resource_tracker.ensure_running()
    server: Any = sys.modules.get("multiprocess.forkserver")
    if server is not None:
        server = server._forkserver
        alive_fd, lost = server._forkserver_alive_fd, server._forkserver_pid
        if alive_fd is not None and not _is_helpers(alive_fd, lost):
            server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
            _reap(lost)
        elif lost is not None and not (_is_child(lost) and _has_address(server)):
            _forget_server(server)
            _reap(lost)
    _leave_deleted_directory()
    note_helpers()


def _forget_server(server: Any) -> None:
    """Close the pipe to a fork server of which ``multiprocess`` could not find out whether it runs."""
    alive_fd, pid = server._forkserver_alive_fd, server._forkserver_pid
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    if alive_fd is not None and _is_helpers(alive_fd, pid):
        os.close(alive_fd)


def _has_address(server: Any) -> bool:
    """Return whether processes can reach a fork server: a program that cleans /tmp may have deleted its socket."""
    address = server._forkserver_address
    return address is None or _multiprocess.util.is_abstract_socket_namespace(address) or os.path.exists(address)


def _leave_deleted_directory() -> None:
    """Make ``multiprocess`` create another directory for sockets if the one it has used was deleted."""
    config: Any = _multiprocess.process.current_process()._config  # type: ignore[attr-defined]  # has no public name
    made = config.get("tempdir")
    if made is not None and not os.path.isdir(made):
        config["tempdir"] = None
        util: Any = _multiprocess.util
        for finalizer in list(util._finalizer_registry.values()):
            # Some versions print a traceback at exit if the directory is gone.
            if finalizer._callback is util._remove_temp_dir and made in finalizer._args:
                finalizer.cancel()


def _leave_helpers() -> None:
    """Leave the fork server to the parent, whose child it is, and release the locks that other threads held."""
    locks = []
    tracker = sys.modules.get("multiprocess.resource_tracker")
    if tracker is not None:
        locks.append(tracker._resource_tracker._lock)
    module = sys.modules.get("multiprocess.forkserver")
    if module is not None:
        server = module._forkserver
        locks.append(server._lock)
        if server._forkserver_pid is not None:
            _forget_server(server)
    for lock in locks:
        lock._at_fork_reinit()


_system.register_at_fork(after_in_child=_leave_helpers)


def note_helpers() -> None:
    """Record the pipes to both processes, right after the processes may have been started."""
    tracker: Any = _multiprocess.resource_tracker._resource_tracker
    helpers = [(tracker._fd, tracker._pid)]
    server: Any = sys.modules.get("multiprocess.forkserver")
    if server is not None:
        helpers.append((server._forkserver._forkserver_alive_fd, server._forkserver._forkserver_pid))
    for fd, pid in helpers:
        if fd is not None and (fd not in _pipes or _pipes[fd][0] != pid):
            status = os.fstat(fd)
            _pipes[fd] = pid, (status.st_dev, status.st_ino)


def _is_helpers(fd: int, pid: int | None) -> bool:
    """Return whether an fd is the recorded pipe to the process, or any pipe if none was recorded."""
    try:
        status = os.fstat(fd)
    except OSError:
        _pipes.pop(fd, None)
        return False
    found = status.st_dev, status.st_ino
    recorded, identity = _pipes.get(fd, (None, found))
    if stat.S_ISFIFO(status.st_mode) and (recorded != pid or identity == found):
        return True
    _pipes.pop(fd, None)
    return False


def _is_child(pid: int) -> bool:
    """Return whether a process is a child of this one that was not reaped."""
    waitid: Any = getattr(os, "waitid", None)  # macOS lacks it before Python 3.13
    if sys.platform != "win32" and waitid is not None:
        try:
            waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
    return True


def _reap(pid: int | None) -> None:
    """Reap a process that ends because its pipe was closed, if it has ended."""
    if sys.platform != "win32" and pid is not None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
