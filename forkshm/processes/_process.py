"""Process classes, and the start of processes that are spawned or forked by the fork server.

multiprocess starts such processes and sends them a pickled process object. Here that pickle holds only an fd, of a
channel that contains the object as a forkshm message. The object is therefore sent as in every other channel:
functions by value if the child lacks them, regions and arrays in regions as kernel handles.
"""

from __future__ import annotations

import contextlib
import multiprocessing.context
import multiprocessing.process
import multiprocessing.reduction
import os
import signal
import sys
import types
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import kernel
from forkshm.channel import Kind, Received, Receiver, pair, read_message, write_message
from forkshm.errors import (
    NO_MAIN_GUARD,
    ChannelBrokenError,
    NotPicklableError,
    UnsupportedError,
    about_main_guard,
    refuse_if_green,
)
from forkshm.pickler import explain, file_of_main, importable_after_import, pack
from forkshm.processes import _breakpoint
from forkshm.processes._before_main import Name
from forkshm.processes._helpers import ensure_helpers, note_helpers, spare_fork_server
from forkshm.processes._identity import introduce
from forkshm.processes._patched_bootstrap import run_with_tools
from forkshm.region import OwnedFd

if sys.platform != "win32":
    from forkshm.processes._popen_fork import ForkPopen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = (
    "ForkProcess",
    "ForkServerProcess",
    "NoFork",
    "Process",
    "SpawnProcess",
    "first_calls",
    "refuse_while_main_is_imported",
)

first_calls: list[Callable[[], object]] = []
"""Functions without arguments, which a new process calls before it receives its process object."""

# Attributes of a process object that are meaningless in the child.
_HERE_ONLY = ("_popen", "_carrier", "_birth", "_names_of_parts", "_environment")


class NoFork:
    """A placeholder for classes of ``multiprocess`` that fork, on systems that cannot."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise UnsupportedError(
            "cannot fork processes on this system: use the start method 'spawn', which is the default here",
            capability="fork",
        )


class _OfContext:
    """Common base of all processes: in the child, the start method is the one that started it."""

    # Whether the process leaves Ctrl-C to its parent, from its first moment.
    ignores_interrupts = False

    def interrupt(self) -> None:
        """Send SIGINT to the process, which raises KeyboardInterrupt there, as in Python 3.14.

        Raises:
            ValueError: The process was not started, or is closed.
            UnsupportedError: The system is Windows, where a signal reaches either all processes of a console or none.
        """
        process: Any = self
        process._check_closed()
        if process._popen is None:
            raise ValueError(f"cannot interrupt {process.name!r}: it was not started. Call start() first.")
        if sys.platform == "win32":
            raise UnsupportedError(
                f"cannot interrupt {process.name!r}: Windows cannot send SIGINT to one process. Use terminate().",
                capability="signals",
            )
        process._popen._send_signal(signal.SIGINT)

    def _bootstrap(self, *args: Any, **options: Any) -> Any:
        if self.ignores_interrupts:
            # This is a worker. Its parent has other workers to start, or a task to send.
            kernel.step_back()
        if self._start_method is not None:  # type: ignore[attr-defined]  # the base class's name
            _multiprocess.default_context.set_start_method(self._start_method, force=True)  # type: ignore[attr-defined]
        try:
            _interrupts.begin(ignores=self.ignores_interrupts)
        except KeyboardInterrupt:  # it came during the start, and the parent has received it, too
            return 1
        _breakpoint.install()
        begin = super()._bootstrap  # type: ignore[misc]
        return run_with_tools(lambda: begin(*args, **options), self)


class _StartedAnew(_OfContext):
    """Common base of processes that are not forked from this one."""

    _carrier: Receiver | None = None
    # During the start: an fd that the child holds while it lives, and that its own children do not inherit.
    _birth = -1
    # Names of the parts of the process object, for the error message when one cannot be pickled.
    _names_of_parts: Mapping[str, Any] | None = None
    # Environment variables to set in the process before it imports code of the program.
    _environment: Mapping[str, str] = types.MappingProxyType({})

    def __reduce__(self) -> Any:
        if _multiprocess.context.get_spawning_popen() is None:
            raise NotPicklableError(
                f"cannot pickle {self!r}: a process object can be sent only to the process that it starts",
            )
        state = {name: value for name, value in vars(self).items() if name not in _HERE_ONLY}
        state["_name"] = str(state["_name"])
        importable = importable_after_import()
        with _both_spawning():
            try:
                payload = pack((type(self), state), importable=importable)
            except Exception as error:
                explain(error, self._names_of_parts or _parts(self, state), importable)
                raise
        settings = (
            _multiprocess.default_context.get_start_method(allow_none=True),
            tuple(first_calls),
            bytes(multiprocessing.process.current_process().authkey),
        )
        if kernel.leases_are_handles:
            # The child exists already, so its handles are duplicated into it, and end with it.
            try:
                data, fds = write_message(Kind.CALL, 0, payload)
                pushed = [_multiprocess.push_to_child(fd) for fd in fds]
            finally:
                payload.close()
            return _rebuild_pushed, (data, pushed, *settings)
        assert sys.platform != "win32"  # there, leases are handles
        sender, receiver = pair()
        try:
            data, fds = write_message(Kind.CALL, 0, payload)
            sender.send(data, fds, wait=False)
        except BaseException:
            receiver.close()
            raise
        finally:
            sender.close()
            payload.close()
        self._carrier = receiver
        birth = _multiprocess.reduction.DupFd(self._birth) if self._birth >= 0 else None
        return _rebuild, (_multiprocess.reduction.DupFd(receiver.fileno()), *settings, birth)

    def _drop_carrier(self) -> None:
        # The child has its own fd by now, or was not started.
        self._birth = -1
        if self._carrier is not None:
            self._carrier.close()
            self._carrier = None


def _parts(process: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a process object, by the caller's names for them."""
    named = {"target": "_target", "args": "_args", "kwargs": "_kwargs"}
    parts = {name: state[attribute] for name, attribute in named.items() if attribute in state}
    # Attributes that a subclass added.
    own = {f"self.{name}": value for name, value in state.items() if name not in named.values()}
    return {**parts, **own, f"class {type(process).__qualname__}": type(process)}


if sys.platform != "win32":
    _Forked = _multiprocess.context.ForkProcess
    _ServerForked = _multiprocess.context.ForkServerProcess
else:
    _Forked = _ServerForked = NoFork


class ForkProcess(_OfContext, _Forked):
    """A process forked from this one, with the interface of ``multiprocessing.Process``."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the base class's name
        assert sys.platform != "win32"  # there is no fork
        begun: list[ForkPopen] = []
        try:
            with _interrupts.held_back(), kernel.forking() as birth:
                # Started and recorded in one C call.
                begun.extend(map(ForkPopen, (process_obj,), (birth,)))
            return begun[0]
        except BaseException as error:
            for child in begun:  # the caller does not get it
                child.end_unwatched()
            _note_reason(error)
            raise


class Process(_StartedAnew, _multiprocess.process.BaseProcess):
    """A process with the interface of ``multiprocessing.Process``, started by the current start method."""

    _start_method = None

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the base class's name
        return _multiprocess.default_context.get_context().Process._Popen(process_obj)


class SpawnProcess(_StartedAnew, _multiprocess.context.SpawnProcess):
    """A process with a fresh interpreter, with the interface of ``multiprocessing.Process``."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the base class's name
        with kernel.spawning() as (sentinel, birth):
            process_obj._birth = birth
            try:
                return _start_quietly(_spawn_popen, process_obj, sentinel)
            finally:
                process_obj._drop_carrier()

    @staticmethod
    def _after_fork() -> None:
        introduce()


class ForkServerProcess(_StartedAnew, _ServerForked):
    """A process forked by a server without threads, with the interface of ``multiprocessing.Process``."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the base class's name
        assert sys.platform != "win32"  # there is no fork
        spare_fork_server()
        try:
            from forkshm.processes._popen_spawn import ForkServerPopen

            return _start_quietly(ForkServerPopen, process_obj)
        finally:
            process_obj._drop_carrier()


def _spawn_popen(process_obj: Any, sentinel: int) -> Any:
    if sys.platform == "win32":
        return _multiprocess.context.SpawnProcess._Popen(process_obj)
    else:  # noqa: RET505 - type checkers leave out one of the two
        from forkshm.processes._popen_spawn import SpawnPopen

        return SpawnPopen(process_obj, sentinel)


def refuse_while_main_is_imported() -> None:
    """End this new process if its main module starts processes while it is imported.

    Print nothing if a pool or launch of the parent explains the mistake, which it recognizes by the exit code.
    """
    process: Any = _multiprocess.current_process()
    if not getattr(process, "_inheriting", False):
        return
    is_known_by_code = "PoolWorker" in process.name or process.name.startswith("worker ")
    if not is_known_by_code:
        print(f"{process.name}: {about_main_guard('the main module')}", file=sys.stderr)
    # In a process of the fork server, multiprocess would turn SystemExit into exit code 1.
    _multiprocess.util._flush_std_streams()  # type: ignore[attr-defined]
    os._exit(NO_MAIN_GUARD)


def _correct_main() -> None:
    """Correct attributes of ``__main__`` that multiprocess cannot handle.

    A program that pdb runs has no ``__spec__``. Where a new process could not read the program's file, it must not look
    for it: it does not with this spec, which the programs of directories and archives have.
    """
    main: Any = sys.modules.get("__main__")
    if main is not None and getattr(main, "__spec__", None) is None:
        is_unreadable = getattr(main, "__file__", None) is not None and file_of_main() is None
        main.__spec__ = ModuleSpec("__main__", None) if is_unreadable else None


def _start_quietly(popen: Callable[..., Any], *arguments: Any) -> Any:
    if not _multiprocess.reduction.HAVE_SEND_HANDLE:  # eventlet was there first
        refuse_if_green("a process that is not forked")
    _correct_main()
    refuse_while_main_is_imported()
    if _system.CAN_FORK:
        # Starting the resource tracker, which Windows lacks, unblocks SIGINT.
        ensure_helpers()
    process_obj = arguments[0]
    name = process_obj._name
    try:
        process_obj._name = Name(name, process_obj._environment)
        with _interrupts.held_back():
            return popen(*arguments)
    except OSError as error:
        _note_reason(error)
        raise
    finally:
        process_obj._name = name
        if _system.CAN_FORK:
            note_helpers()


def _note_reason(error: BaseException) -> None:
    """Add to the kernel's message what is known about it, and what to do."""
    if isinstance(error, OSError) and (reason := _system.reason_of(error)) is not None:
        error.add_note(f"Cannot start a process: {reason}.")


@contextlib.contextmanager
def _both_spawning() -> Iterator[None]:
    """Make the standard library's locks and queues picklable: they check whether a process is being started."""
    popen: Any = _multiprocess.context.get_spawning_popen()
    multiprocessing.context.set_spawning_popen(popen)
    try:
        yield
    finally:
        multiprocessing.context.set_spawning_popen(None)


def _rebuild(
    carrier: Any,
    start_method: str | None,
    calls: tuple[Callable[[], object], ...],
    standard_authkey: bytes,
    birth: Any = None,
) -> Any:
    """Receive the process object from its channel, in the child."""
    if birth is not None:
        kernel.hold_birth(birth.detach())
    _settle(start_method, calls, standard_authkey)
    end = OwnedFd()
    end.fd = carrier.detach()
    sending = kernel.message_socket(end.fd)
    end.fd = -1
    receiver = Receiver(sending)
    try:
        received = receiver.receive_nowait()
    except BlockingIOError:
        received = None
    finally:
        receiver.close()
    return _made(received)


def _rebuild_pushed(
    data: bytes, fds: list[int], start_method: str | None, calls: tuple[Callable[[], object], ...], authkey: bytes
) -> Any:
    """Receive the process object with fds that were duplicated into this process; see `_rebuild`."""
    _interrupts.hold_back()
    _settle(start_method, calls, authkey)
    return _made(Received(data, fds))


def _settle(start_method: str | None, calls: tuple[Callable[[], object], ...], standard_authkey: bytes) -> None:
    # The standard library gives its children this key, and its managers ask for it.
    multiprocessing.process.current_process().authkey = standard_authkey
    _multiprocess.default_context.set_start_method(start_method, force=True)
    for call in calls:
        call()


def _made(received: Received | None) -> Any:
    incoming = read_message(received).payloads[0] if received is not None else None
    if incoming is None:
        raise ChannelBrokenError("cannot run this process: its process object did not arrive. Please report this bug.")
    kind, state = incoming.open()
    made = kind.__new__(kind)
    vars(made).update(state)
    return made
