"""BaseManager and SyncManager: a process that holds objects for others, reached through forkshm's connections.

The manager and its proxies are those of ``multiprocess``; only the connections are forkshm's. The module is imported
when the first manager is started, because this takes as long as importing all the rest of forkshm.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess
from forkshm.backend import kernel
from forkshm.channel._connection import Connection
from forkshm.channel._endpoint import PrivateFd
from forkshm.errors import ChannelClosedError, refuse_if_green
from forkshm.pickler import Handle, ReceivedFd, register
from forkshm.region import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from forkshm.backend import MessageSocket

__all__ = ("Accepting", "BaseManager", "Client", "Listener", "SyncManager")


class _Serializer(str):
    """The name of forkshm's connections between a manager and its proxies.

    Proxies contain it. So a process that unpickles one imports this module and knows the name.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _serializer, ()


def _serializer() -> str:
    return SERIALIZER


SERIALIZER = _Serializer("forkshm")
# Imported here: Python 3.10 may raise when a child that was forked while a thread imported something imports.
_challenge = _multiprocess.connection
_AuthenticationError = _multiprocess.context.AuthenticationError

# Seconds until a server that could not accept a client tries again.
_ACCEPT_PAUSE = 0.02
# Seconds to wait for the end of a process whose lifeline was closed.
_END_SECONDS = 1.0


class Listener:
    """Accept connections to a manager. On Linux the address is abstract (unix(7)), so no file is left behind.

    Only processes of the same user that know the key are accepted.
    """

    def __init__(
        self,
        address: str | None = None,
        family: str | None = None,
        backlog: int = 128,
        authkey: bytes | None = None,
    ) -> None:
        self._authkey = authkey
        self._callee = kernel.listen(address, backlog)
        self.address = self._callee.address
        self.last_accepted = None

    def accept(self) -> Connection:
        """Wait for a client and return the connection.

        Raises:
            AuthenticationError: The client does not know the key. The kernel refuses clients of other users.
            OSError: The listener was closed, or the limit on open files is reached.
        """
        if self._callee.closed:
            raise ChannelClosedError(errno.EBADF, "listener is closed")
        return _greeted(self._callee.accept(), self._authkey, listening=True)

    def close(self) -> None:
        """Accept no more clients. Closing twice is allowed."""
        self._callee.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()


def Client(  # noqa: N802 - the standard library's name
    address: str, family: str | None = None, authkey: bytes | None = None
) -> Connection:
    """Connect to the manager at *address*.

    Raises:
        AuthenticationError: The manager belongs to another user, or has another key.
        OSError: No manager listens there.
    """
    try:
        end = kernel.call(address)
    except PermissionError as error:
        raise _AuthenticationError(f"cannot call the manager at {address!r}: {error.strerror}") from error
    try:
        return _greeted(end, authkey, listening=False)
    except EOFError as error:
        raise EOFError(
            f"the manager at {address!r} has closed the connection: its process has ended, or cannot start another "
            "thread (see ulimit -u and ulimit -v)"
        ) from error


def _greeted(end: MessageSocket, authkey: bytes | None, *, listening: bool) -> Connection:
    connection = Connection(end)
    try:
        if authkey is not None:
            # The standard library's handshake: each side proves that it knows the key without sending it.
            steps: list[Callable[[Any, bytes], None]] = [_challenge.deliver_challenge, _challenge.answer_challenge]
            for step in steps if listening else reversed(steps):
                step(connection, authkey)
    except BaseException:
        connection.close()
        raise
    return connection


_multiprocess.managers.listener_client[SERIALIZER] = (Listener, Client)  # type: ignore[attr-defined]


def _call_method(proxy: Any, methodname: str, args: Any = (), kwds: Any = {}) -> Any:  # noqa: B006
    """Call a method of a proxy's object, in place of ``BaseProxy._callmethod``.

    There, a call that a signal handler interrupts leaves its answer in the thread's connection, and the next call takes
    that answer for its own. Here, the connection belongs to one call until the answer has come, and is closed if the
    call is interrupted. A signal handler or a finalizer that uses a proxy during a call gets a connection of its own.
    """
    here = proxy._tls.__dict__
    connection = here.pop("connection", None)
    if connection is None:
        proxy._connect()
        connection = here.pop("connection")
    try:
        connection.send((proxy._id, methodname, args, kwds))
        kind, result = connection.recv()
    except BaseException:
        connection.close()
        raise
    here["connection"] = connection
    if kind == "#RETURN":
        return result
    if kind != "#PROXY":
        try:
            raise _managers.convert_to_error(kind, result)
        finally:
            del result  # the exception, whose traceback would keep this frame, and so the exception itself
    exposed, token = result
    token.address = proxy._token.address
    proxy_type = proxy._manager._registry[token.typeid][-1]
    made = proxy_type(token, proxy._serializer, manager=proxy._manager, authkey=proxy._authkey, exposed=exposed)
    with contextlib.closing(proxy._Client(token.address, authkey=proxy._authkey)) as client:
        _managers.dispatch(client, None, "decref", (token.id,))
    return made


_managers: Any = _multiprocess.managers
_managers.BaseProxy._callmethod = _call_method


class _Lifeline(OwnedFd):
    """The reading end of a pipe whose writing end only the manager's parent has."""


def _reduce_lifeline(lifeline: _Lifeline) -> Any:
    return _rebuild_lifeline, (pickle.PickleBuffer(Handle(lifeline.fd)),)


def _rebuild_lifeline(received: ReceivedFd) -> _Lifeline:
    lifeline = _Lifeline()
    lifeline.fd = received.take()
    return lifeline


register(_Lifeline, _reduce_lifeline)


def _begin(lifeline: _Lifeline, initializer: Callable[..., object] | None, initargs: Iterable[Any]) -> None:
    """Run first in the manager's process, which from here on dies with its parent."""
    kernel.die_with(lifeline.fd)
    lifeline.close()
    if initializer is not None:
        initializer(*initargs)


class Accepting:
    """A base class of servers, which refuse a client that they have no thread for, so that it does not wait forever."""

    listener: Listener
    handle_request: Callable[[Connection], None]

    def accepter(self) -> None:
        """Accept clients, each in a thread of its own."""
        while True:
            try:
                connection = self.listener.accept()
            except (OSError, MemoryError):
                time.sleep(_ACCEPT_PAUSE)  # no fd is free, for example, and the client waits
                continue
            try:
                threading.Thread(target=self.handle_request, args=(connection,), daemon=True).start()
            except (RuntimeError, MemoryError):
                connection.close()


class _Server(Accepting, _managers.Server):  # type: ignore[misc]
    """A server of the standard library, which survives the limits on threads and memory."""


class BaseManager(_multiprocess.managers.BaseManager):
    """A manager whose objects you `register`; the interface of ``multiprocessing.managers.BaseManager``.

    At a TCP address it sends the standard library's pickles, so that its other end may be there. At other addresses it
    uses forkshm's connections, which send memory as descriptors.
    """

    _Server = _Server

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = SERIALIZER,
        ctx: Any = None,
        **options: Any,
    ) -> None:
        if isinstance(address, tuple) and serializer == SERIALIZER:
            serializer = "pickle"
        # Named, because the constructor of the standard library's SharedMemoryManager would start the resource tracker.
        _multiprocess.managers.BaseManager.__init__(
            self, address, authkey, serializer, ctx or _multiprocess.default_context.get_context(), **options
        )

    def start(self, initializer: Callable[..., object] | None = None, initargs: Iterable[Any] = ()) -> None:
        """Start the process.

        Args:
            initializer: Called first in the process.
            initargs: Arguments of *initializer*.

        Raises:
            TypeError: *initializer* cannot be called.
            OSError: The kernel refused the process.
            UnsupportedError: gevent or eventlet has replaced the blocking functions of this process.
            EOFError: The process ended before it could be called, for example because *initializer* raised.
        """
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, got {initializer!r}")
        refuse_if_green("a manager")
        lifeline, read_end = PrivateFd(), _Lifeline()
        # No call between the creation of the fds and these stores.
        read_end.fd, lifeline.fd = kernel.create_lifeline()
        lifeline.own()
        try:
            super().start(_begin, (read_end, initializer, tuple(initargs)))
        except EOFError as error:
            lifeline.close()
            raise EOFError(self._why_ended()) from error
        except BaseException:
            lifeline.close()
            raise
        finally:
            read_end.close()
        # Closed when the manager ends, in any of the standard library's ways.
        _lifelines[self._process] = lifeline  # type: ignore[attr-defined]

    def _why_ended(self) -> str:
        process = self._process  # type: ignore[attr-defined]
        process.join()
        code = process.exitcode
        process.close()
        return f"the manager's process ended with exit code {code} before it could be called: see what it printed"

    @staticmethod
    def _finalize_manager(process: Any, *rest: Any) -> None:
        def release() -> None:
            if isinstance(rest[0], str):
                kernel.forget_address(rest[0])
            if process in _lifelines:
                _lifelines[process].close()
                del _lifelines[process]

        def end() -> None:
            release()
            process.join(_END_SECONDS)

        try:
            _multiprocess.managers.BaseManager._finalize_manager(process, *rest)  # type: ignore[attr-defined]
        except BaseException:
            # A signal handler has raised, and this is not called again. The process ends with its lifeline.
            _interrupts.repeat(end)
            raise
        release()


class SyncManager(BaseManager, _multiprocess.managers.SyncManager):
    """The manager that `forkshm.Manager` starts; see `forkshm.Manager`."""


# By process of a manager: the writing end of its lifeline.
_lifelines: dict[Any, PrivateFd] = {}
