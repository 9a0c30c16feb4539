"""Session fixtures that are created once for all workers of pytest-xdist.

The process that distributes the tests (the controller) listens on a socket. A worker that needs a fixture connects and
asks for it. The first worker is told to create the fixture. It sends back the pickle, the fd of a memory object with
the large buffers, and those of regions and locks; the other workers wait for them. The controller keeps them unopened:
it neither unpickles nor maps the memory. If the creating worker dies or is interrupted, its connection closes, and the
next waiting worker is told to create the fixture.

The code after the ``yield`` of a fixture runs in the worker that created it, once each other worker has ended or
waits to run such code, too. If the session of the worker goes on, the worker keeps the generator until its end, because
pytest ends a session fixture earlier when a parameter changes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import os
import pickle
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import cloudpickle
import pytest

from forkshm.descriptor import describe
from forkshm.errors import NotPicklableError, UnsupportedError, set_cause, without_frames
from forkshm.pickler import explain, is_of_unimported_module
from forkshm.region import MappedRegion, Mode, anonymous_shared_memory, attach, region_of
from forkshm.sync.sharedctypes import is_shared_ctype, reduce_ctype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = (
    "pytest_configure_node",
    "pytest_keyboard_interrupt",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_testnodedown",
    "pytest_unconfigure",
    "shared_fixture",
)

_INPUT = "forkshm_address"
# Kind of a message, and the number of bytes that follow. The fds of the memory of a value come with the head.
_HEAD = struct.Struct("!cQ")
_GET, _MAKE, _VALUE, _ERROR, _END = b"g", b"m", b"v", b"e", b"x"
# Seconds that the other workers wait for the replacement of a worker that died.
_REPLACEMENT_SECONDS = 10.0
_ALIGNMENT = 64
# Smaller buffers of which each worker has a copy stay in the pickle.
_LEAST = 16 * 1024
# The most fds that Linux sends with one message.
_MOST_FDS = 253


@overload
def shared_fixture(function: Callable[..., Any], /) -> Any: ...
@overload
def shared_fixture(*, mode: Mode | str = ..., **options: Any) -> Callable[[Callable[..., Any]], Any]: ...
def shared_fixture(
    function: Callable[..., Any] | None = None, /, *, mode: Mode | str = Mode.copy_on_write, **options: Any
) -> Any:
    """Return a session fixture whose value is created once for all workers of pytest-xdist.

    Load the plugin: ``pytest -p forkshm.pytest -n auto``, or ``pytest_plugins = ["forkshm.pytest"]`` in the
    ``conftest.py`` of the root directory. Without workers (no ``-n``, or ``-n 0``) the fixture is an ordinary session
    fixture.

    The first worker that needs the value creates it. The others get the same value: small objects as copies, and the
    memory of large arrays by descriptor, so all workers together need it once. The memory is kept until the run ends,
    whichever worker dies. If the function raises, skips or fails, all workers report that. If its worker dies
    meanwhile, another worker calls the function again.

    The function may yield the value. The code after ``yield`` runs once, in the worker that created the value, when
    the other workers have ended, or at once if the run is interrupted. It does not run if that worker is killed.

    Args:
        function: Returns or yields the value. It may use other fixtures, which each worker creates for itself. If they
            have params, there is a value for each param.
        mode: ``copy_on_write``: each worker may write to an array, and sees only its own writes. ``read_only``: no
            worker may write. ``read_write``: every worker sees all writes. Locks, values, barriers and regions of
            forkshm are shared in each mode.
        options: *params*, *ids*, *name* and *autouse*, as for ``pytest.fixture``.

    Raises:
        TypeError: *function* is a coroutine function or an asynchronous generator function.
        ValueError: *mode* is unknown, or *scope* is given and not ``"session"``.

    Fork and threads:
        The controller has one thread that listens, and one for each waiting worker.

    Example:
        In ``conftest.py``:

        .. code-block:: python

            import subprocess

            import numpy as np
            from forkshm.pytest import shared_fixture

            @shared_fixture
            def table():
                return np.random.default_rng(1).normal(size=50_000_000)  # 400 MB, once

            @shared_fixture
            def server():
                process = subprocess.Popen(["my-server", "--port", "5000"])  # one for all workers
                yield "localhost:5000"
                process.terminate()
    """
    mode = Mode(mode)
    if function is None:
        return functools.partial(_fixture, mode=mode, options=options)
    return _fixture(function, mode=mode, options=options)


def _fixture(function: Callable[..., Any], *, mode: Mode, options: dict[str, Any]) -> Any:
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        raise TypeError(
            f"cannot share the fixture {function.__qualname__}(): it is asynchronous, and its value is needed in "
            "workers that do not run its event loop. Return or yield the value from a plain function."
        )
    scope = options.pop("scope", "session")
    if scope != "session":
        raise ValueError(
            f"cannot share the fixture {function.__qualname__}() with scope {scope!r}: each worker of xdist begins "
            "and ends it at another time. Leave out scope=, or use pytest.fixture."
        )
    signature = inspect.signature(function)
    takes_request = "request" in signature.parameters

    def value_of(request: Any, owner: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return the value of the fixture in a worker of pytest-xdist."""
        # Fixtures of one name in different files are different, and so is each of their params. A method that
        # several classes inherit is a fixture of each.
        kinds = [(type(instance).__module__, type(instance).__qualname__) for instance in owner]
        names = function.__module__, function.__qualname__, inspect.getfile(function)
        return _get(request, repr((*names, *_params_of(request), *kinds)), make, mode)

    def wrapper(*owner: Any, request: Any, **fixtures: Any) -> Any:
        if takes_request:
            fixtures["request"] = request
        make = functools.partial(function, *owner, **fixtures)
        return value_of(request, owner, make) if hasattr(request.config, "workerinput") else make()

    def yielding_wrapper(*owner: Any, request: Any, **fixtures: Any) -> Any:
        if takes_request:
            fixtures["request"] = request
        if not hasattr(request.config, "workerinput"):
            yield from function(*owner, **fixtures)
            return
        made: list[Any] = []

        def make() -> Any:
            generator = function(*owner, **fixtures)
            value = next(generator, made)
            if value is made:
                raise ValueError(f"the shared fixture {request.fixturename!r} did not yield a value")
            made.append(generator)
            return value

        try:
            yield value_of(request, owner, make)
        finally:
            if made:
                _finish_later(request, made.pop())

    wrapper = functools.wraps(function)(yielding_wrapper if inspect.isgeneratorfunction(function) else wrapper)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "request"]
    first = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # pytest takes the first parameter off a method.
    at = 1 if parameters and parameters[0].name == "self" else 0
    parameters.insert(at, first)
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # Otherwise pytest would use the arguments of the wrapped function.
    del wrapper.__wrapped__
    options.setdefault("name", function.__name__)
    return pytest.fixture(scope="session", **options)(wrapper)


def _params_of(request: Any) -> list[tuple[str, int | str]]:
    """Return what identifies the params of a fixture and of all fixtures that it uses."""
    item = request._pyfuncitem
    call = getattr(item, "callspec", None)
    if call is None:
        return []
    found: list[tuple[str, int | str]] = []
    names = [request.fixturename]
    for name in names:  # the list grows meanwhile
        definitions = item._fixtureinfo.name2fixturedefs.get(name, ())
        if name in call.params:
            index, value = call.indices[name], call.params[name]
            is_own = any(value is param for made in definitions for param in (made.params or ())[index : index + 1])
            # A test may give a fixture other params, whose indices begin at 0 in each test.
            found.append((name, index if is_own else _digest(value) or index))
        names.extend(used for made in definitions for used in made.argnames if used not in names)
    return found


def _digest(value: Any) -> str:
    try:
        return hashlib.sha256(cloudpickle.dumps(value)).hexdigest()
    except Exception:  # the index has to do
        return ""


# Socket features that only some systems have; see `shared_fixture`.
_socket: Any = socket
_FAMILY: int = getattr(socket, "AF_UNIX", -1)


# -- in a worker ----------------------------------------------------------------------------------


def _address(request: Any) -> str:
    address = request.config.workerinput.get(_INPUT)
    if address is None:
        raise pytest.UsageError(
            f"cannot create the shared fixture {request.fixturename!r}: the process that distributes the tests has "
            "not loaded the plugin. Run pytest with -p forkshm.pytest."
        )
    return str(address)


# Generators of fixtures that this worker created. Their code after ``yield`` runs at the end of its session.
_unfinished: list[Any] = []
# Whether the test that is being torn down is the last one of this worker.
_is_last = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(nextitem: Any) -> None:
    """Record whether the worker's session ends with this test."""
    global _is_last
    _is_last = nextitem is None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: Any) -> None:
    """Run the code after ``yield`` that could not run at the end of the last test."""
    if _unfinished:
        try:
            _wait_for_workers(session.config)
        finally:  # the controller may interrupt a worker that waits
            while _unfinished:
                _finish(_unfinished.pop())


def _finish_later(request: Any, generator: Any) -> None:
    if _is_last:
        # pytest reports an exception of this code as an error of the last test.
        try:
            _wait_for_workers(request.config)
        finally:
            _finish(generator)
    else:
        _unfinished.append(generator)


def _finish(generator: Any) -> None:
    if next(generator, _unfinished) is not _unfinished:
        generator.close()
        raise ValueError(f"the shared fixture {generator.__qualname__}() has more than one 'yield'")


def _wait_for_workers(config: Any) -> None:
    """Wait until each other worker has ended or waits here, too."""
    address = config.workerinput[_INPUT]
    with socket.socket(_FAMILY, socket.SOCK_STREAM) as connection, contextlib.suppress(OSError, EOFError):
        connection.connect(address)  # fails if the controller has ended
        _send(connection, _END, config.workerinput["workerid"].encode())
        _receive(connection)


def _get(request: Any, key: str, make: Callable[[], Any], mode: Mode) -> Any:
    address = _address(request)
    with socket.socket(_FAMILY, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(address)
        except OSError as error:
            raise UnsupportedError(
                f"cannot reach the process that distributes the tests ({error}): workers on other machines share no "
                "memory with it. Run all workers on its machine.",
                capability="sockets",
            ) from error
        _send(connection, _GET, key.encode())
        kind, data, fds = _receive(connection)
        if kind == _MAKE:
            try:
                value = make()
                packed = _pack(value, mode, request.fixturename)
            except (Exception, SystemExit, pytest.skip.Exception, pytest.fail.Exception) as error:
                _send(connection, _ERROR, _pack_error(error))
                raise
            # The creator uses the shared value too: writes to its original would not reach the memory.
            with contextlib.closing(packed.buffers) if packed.buffers is not None else contextlib.nullcontext():
                fds = [region.fileno() for region in packed.regions]
                _send(connection, _VALUE, packed.data, fds)
                return _unpack(packed.data, fds, mode)
        if kind == _ERROR:
            raise _unpack_error(data)
        try:
            return _unpack(data, fds, mode)
        finally:
            _close_all(fds)


class _Packed(NamedTuple):
    data: bytes
    buffers: MappedRegion | None
    # The memory of the buffers, if there are any, and that of locks and regions.
    regions: list[MappedRegion]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles a value. Regions are named by their numbers."""

    def __init__(
        self, file: io.BytesIO, take: Callable[[pickle.PickleBuffer], bool], *, writes_are_shared: bool
    ) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=take)
        self.regions: dict[int, MappedRegion] = {}
        self._writes_are_shared = writes_are_shared
        numpy = sys.modules.get("numpy")
        self._array_type: Any = None if numpy is None else numpy.ndarray

    def persistent_id(self, obj: Any) -> int | None:
        """Return the number of a region; None for other objects."""
        if not isinstance(obj, MappedRegion):
            return None
        if obj.mode is Mode.copy_on_write:
            raise NotPicklableError(
                f"cannot share {obj!r}: only this process sees what is written to it. Return bytes(region.buf) instead."
            )
        self.regions.setdefault(id(obj), obj)
        return list(self.regions).index(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        """Reduce ctypes objects to their memory, and for writing each array to a buffer."""
        if is_shared_ctype(obj):
            return reduce_ctype(obj)
        if isinstance(obj, type):
            return NotImplemented if is_of_unimported_module(obj) else super().reducer_override(obj)
        if not self._writes_are_shared or self._array_type is None or not isinstance(obj, self._array_type):
            return super().reducer_override(obj)
        kind = type(obj)
        if obj.dtype.hasobject or kind.__reduce__ is not self._array_type.__reduce__:
            raise UnsupportedError(
                f"cannot share a {kind.__qualname__} for writing: it is not stored as one block of numbers, so each "
                "worker would have a copy. Return plain arrays, or use mode='copy_on_write'.",
                capability="shared_fixture",
            )
        plain = obj.view(self._array_type)
        if not (plain.flags.c_contiguous or plain.flags.f_contiguous):
            plain = plain.copy("C")
        if kind is self._array_type:
            return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return self._array_type.view, (plain, kind)


class _Unpickler(pickle.Unpickler):
    """Unpickles a value, given its regions."""

    def __init__(self, stream: bytes, buffers: list[Any], regions: list[MappedRegion]) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._regions = regions

    def persistent_load(self, pid: int) -> MappedRegion:
        return self._regions[pid]


def _pack(value: Any, mode: Mode, name: str) -> _Packed:
    views: list[memoryview] = []
    least = _LEAST if mode is Mode.copy_on_write else 1

    def take(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < least:
            return True
        views.append(view)
        return False

    file = io.BytesIO()
    try:
        pickler = _Pickler(file, take, writes_are_shared=mode is Mode.read_write)
        pickler.dump(value)
    except Exception as error:
        explain(error, {f"the value of the shared fixture {name}": value})
        raise
    spans, end = [], 0
    for view in views:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + view.nbytes
        spans.append((start, end))
    regions = list(pickler.regions.values())
    extents = [(sent.offset, sent.size, sent.mode) for sent in map(describe, regions)]
    buffers = None
    if views:
        buffers = anonymous_shared_memory(end)
        for (start, stop), view in zip(spans, views, strict=True):
            buffers.buf[start:stop] = view
        regions.insert(0, buffers)
    if len(regions) > _MOST_FDS:
        raise ValueError(f"the value of the shared fixture {name} has more than {_MOST_FDS} regions")
    return _Packed(pickle.dumps((file.getvalue(), spans, extents)), buffers, regions)


def _unpack(data: bytes, fds: list[int], mode: Mode) -> Any:
    stream, spans, extents = pickle.loads(data)
    buffers: list[memoryview] = []
    if spans:
        fd, *fds = fds
        # The arrays keep the region alive.
        view = MappedRegion(fd, mode).buf
        buffers = [view[start:end] for start, end in spans]
    # A worker that has a region already, as its creator has, gets the same one.
    regions = [region_of(*attach(os.dup(fd), *extent)) for fd, extent in zip(fds, extents, strict=True)]
    return _Unpickler(stream, buffers, regions).load()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


# pytest gives these classes the module name of builtins, so they cannot be pickled. An xfail is also a fail.
_OUTCOMES: dict[Any, Any] = {
    "skip": pytest.skip.Exception,
    "xfail": pytest.xfail.Exception,
    "fail": pytest.fail.Exception,
}


def _pack_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    for outcome, kind in _OUTCOMES.items():
        if isinstance(error, kind):
            return pickle.dumps((outcome, cast("Any", error).msg))
    try:
        stream = cloudpickle.dumps(without_frames(error))
        pickle.loads(stream)
    except Exception:
        stream = b""
    return pickle.dumps((stream, text))


def _unpack_error(data: bytes) -> BaseException:
    stream, text = pickle.loads(data)
    if stream in _OUTCOMES:
        outcome: BaseException = _OUTCOMES[stream](text)
        return outcome
    cause = RuntimeError(f"in the worker that created the fixture:\n{text}")
    try:
        error = pickle.loads(stream)
    except Exception:
        return cause
    if not isinstance(error, BaseException):
        return cause
    set_cause(error, cause)
    return error


# -- messages -------------------------------------------------------------------------------------


def _send(connection: socket.socket, kind: bytes, data: bytes = b"", fds: Sequence[int] = ()) -> None:
    head = _HEAD.pack(kind, len(data))
    if fds:
        sent = _socket.send_fds(connection, [head], fds)
        head = head[sent:]
    connection.sendall(head + data)


def _receive(connection: socket.socket) -> tuple[bytes, bytes, list[int]]:
    head, fds, _, _ = _socket.recv_fds(connection, _HEAD.size, _MOST_FDS)
    try:
        head += _receive_all(connection, _HEAD.size - len(head)) if head else b""
        if not head:
            raise EOFError
        kind, size = _HEAD.unpack(head)
        return kind, _receive_all(connection, size), fds
    except BaseException:
        _close_all(fds)
        raise


def _receive_all(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 2**20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


# -- in the controller ----------------------------------------------------------------------------


class _Keeper:
    """The controller's listener, which keeps the created fixtures."""

    def __init__(self) -> None:
        self._folder = ""
        self._listener = socket.socket(_FAMILY, socket.SOCK_STREAM)
        if sys.platform == "linux":
            # An abstract name, in no file system, so that no file is left behind.
            self.address = f"\0forkshm-pytest-{secrets.token_hex(16)}"
        else:
            self._folder = tempfile.mkdtemp(prefix="forkshm-pytest-")
            self.address = os.path.join(self._folder, "socket")
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._changed = threading.Condition()
        self._made: dict[bytes, tuple[bytes, bytes, list[int]]] = {}
        self._in_the_making: set[bytes] = set()
        # Workers that run tests, and the time until which a replacement of each dead worker may start.
        self._running: set[str] = set()
        self._dead: list[float] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, name="forkshm-pytest", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._is_closed:
                connection.close()
                return
            threading.Thread(target=self._serve, args=(connection,), name="forkshm-pytest", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Errors of a worker that dies, or of an unrelated process that connects, must not affect the other workers.
        with connection, contextlib.suppress(OSError, EOFError, struct.error):
            if not _is_ours(connection):
                return
            kind, key, fds = _receive(connection)
            _close_all(fds)
            if kind == _GET:
                self._answer(connection, key)
            elif kind == _END:
                self._await_workers(connection, key.decode())

    def worker_starts(self, worker: str) -> None:
        """Record a worker, which may replace one that died."""
        with self._changed:
            self._running.add(worker)
            del self._dead[:1]

    def worker_ended(self, worker: str, *, has_died: bool) -> None:
        """Record that a worker has ended."""
        with self._changed:
            self._running.discard(worker)
            if has_died:
                self._dead.append(time.monotonic() + _REPLACEMENT_SECONDS)
            self._changed.notify_all()

    def _are_gone(self) -> bool:
        now = time.monotonic()
        return self._is_closed or not (self._running or any(until > now for until in self._dead))

    def _await_workers(self, connection: socket.socket, worker: str) -> None:
        """Answer a worker when no other worker runs tests."""
        with self._changed:
            self._running.discard(worker)
            self._changed.notify_all()
            while True:
                if self._are_gone():
                    break
                self._changed.wait(0.5 if self._dead else None)
        _send(connection, _END)

    def _answer(self, connection: socket.socket, key: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._made or key not in self._in_the_making or self._is_closed)
            made = self._made.get(key)
            if made is None:
                self._in_the_making.add(key)
        if made is None:
            try:
                _send(connection, _MAKE)
                made = _receive(connection)
                with self._changed:
                    self._made[key] = made
            finally:
                # Notify also when the creator is gone: the next worker is then told to create the fixture.
                with self._changed:
                    self._in_the_making.discard(key)
                    self._changed.notify_all()
            return
        _send(connection, *made)

    def wait_no_more(self) -> None:
        """Answer the workers that wait for others."""
        self._is_closed = True
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        self.wait_no_more()
        with contextlib.suppress(OSError), socket.socket(_FAMILY, socket.SOCK_STREAM) as waker:
            waker.connect(self.address)
        self._thread.join(1)
        self._listener.close()
        for _, _, fds in self._made.values():
            _close_all(fds)
        self._made.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _is_ours(connection: socket.socket) -> bool:
    peer_credentials: int | None = getattr(socket, "SO_PEERCRED", None)
    if peer_credentials is None:
        return True  # only this user can enter the folder
    credentials = connection.getsockopt(socket.SOL_SOCKET, peer_credentials, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == getattr(os, "getuid", int)())


_keepers: dict[int, _Keeper] = {}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the controller's address to a worker of pytest-xdist before it starts."""
    if hasattr(socket, "AF_UNIX") and hasattr(socket, "send_fds"):
        keeper = _keepers.get(id(node.config))
        if keeper is None:
            keeper = _keepers[id(node.config)] = _Keeper()
        node.workerinput[_INPUT] = keeper.address
        keeper.worker_starts(node.workerinput["workerid"])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Record that a worker of pytest-xdist has ended."""
    keeper = _keepers.get(id(node.config))
    if keeper is not None:
        keeper.worker_ended(node.workerinput["workerid"], has_died=bool(error))


def pytest_keyboard_interrupt() -> None:
    """Answer workers that wait to end their fixtures: the controller will not learn when the others end."""
    for keeper in _keepers.values():
        keeper.wait_no_more()


def pytest_unconfigure(config: Any) -> None:
    """Release the kept fixtures."""
    keeper = _keepers.pop(id(config), None)
    if keeper is not None:
        keeper.close()
