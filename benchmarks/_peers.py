"""The sides of a comparison: one class each, with the same methods.

Each does the work as users of the library would write it. For work that a library cannot do, the method raises
`CannotDoError` with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import os
import tempfile
from typing import TYPE_CHECKING, Any

import _work
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WORKERS = 2


class CannotDoError(Exception):
    """A library has no way to do this work; the text has the reason."""


class Peer:
    """A library that runs functions in other processes.

    Inside ``with peer.pool():`` there are `WORKERS` workers, or the requested number.
    """

    name: str
    # The module to import, and the distribution whose version is shown; None for the standard library.
    module: str
    distribution: str | None = None
    # Number of fds of this process that a shared array takes.
    fds_of_shared = 1
    # Whether its processes work even when idle. Such a peer is measured after all others.
    restless = False

    def __init__(self) -> None:
        self.package = importlib.import_module(self.module)
        self.workers: Any = None

    @property
    def version(self) -> str:
        if self.distribution is None:
            return "of Python"
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    @contextlib.contextmanager
    def pool(self, workers: int = WORKERS) -> Iterator[None]:
        """Have workers."""
        with self.make(workers) as self.workers:
            yield

    @contextlib.contextmanager
    def born_shared_pool(self) -> Iterator[None]:
        """Provide workers whose large arrays are in shared memory from the start."""
        raise CannotDoError("arrays that any library makes cannot be born in shared memory")
        yield

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Provide running workers: some libraries start them with the first task."""
        with self.pool():
            self.apply(_work.noop)
            yield

    @contextlib.contextmanager
    def ready_to_map(self) -> Iterator[None]:
        """Provide running workers that have mapped a function."""
        with self.pool():
            self.map(_work.noop, range(2 * WORKERS), chunksize=1)
            yield

    def make(self, workers: int) -> Any:
        """Return a context manager of the library itself."""
        raise NotImplementedError

    def start_and_end(self) -> None:
        """Start workers, run one task, and end them."""
        with self.make(WORKERS) as workers:
            self.workers = workers
            self.apply(_work.noop)

    def before_start(self) -> None:
        """Drop whatever is kept between pools, so that a start can be measured."""

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        raise NotImplementedError

    def map_holding(self, array: _work.Array, items: Sequence[int]) -> list[Any]:
        """Map a function that holds an array and returns the item's element, one task for each item."""
        return self.map(functools.partial(_work.item, array), items, chunksize=1)

    @contextlib.contextmanager
    def shared(self, count: int) -> Iterator[tuple[_work.Array, Callable[[], int]]]:
        """Provide *count* integers in shared memory, created after the workers.

        Yields:
            The array, to write to; and a call that sends it to a worker and returns its middle element. Where the call
            freezes the array, only writes before the first call count.
        """
        raise CannotDoError("no shared memory that is passed to workers")
        yield

    @contextlib.contextmanager
    def shared_by_worker(self, count: int) -> Iterator[Callable[[], int]]:
        """Provide a call that gets *count* integers in shared memory created by a worker, and returns their middle."""
        raise CannotDoError("a worker cannot pass shared memory back")
        yield

    @contextlib.contextmanager
    def read_by_all(self, count: int) -> Iterator[Callable[[str, int], list[tuple[float, int]]]]:
        """Provide an array of ones in shared memory, and a call that lets all workers read it (`read_together`)."""
        raise CannotDoError("no shared memory that is passed to workers")
        yield

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Callable[[Sequence[Any]], float]]:
        """Provide a process that reads a queue; a call puts messages and returns the sum that it answers."""
        raise CannotDoError("no queue between processes")
        yield

    def close(self) -> None:
        """End whatever is kept between pools."""


class PoolPeer(Peer):
    """A peer with the interface of ``multiprocessing``."""

    # The context with ``Pool``, ``Queue`` and ``Process``.
    context: Any

    def make(self, workers: int) -> Any:
        return self.context.Pool(workers)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.workers.apply(function, args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self.workers.map(function, items, chunksize=chunksize))

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Callable[[Sequence[Any]], float]]:
        there, back = self.context.Queue(), self.context.Queue()
        child = self.context.Process(target=_work.consume, args=(there.get, back.put), daemon=True)
        child.start()

        def send(messages: Sequence[Any]) -> float:
            there.put(len(messages))
            for message in messages:
                there.put(message)
            return float(back.get())

        try:
            yield send
        finally:
            there.put(None)
            child.join()
            there.close()
            back.close()


class Forkshm(PoolPeer):
    """Ours."""

    name = module = distribution = "forkshm"

    def __init__(self) -> None:
        super().__init__()
        self.context = self.package

    @contextlib.contextmanager
    def born_shared_pool(self) -> Iterator[None]:
        if "born_shared" not in inspect.signature(self.package.Pool).parameters:
            raise CannotDoError("this forkshm.Pool has no born_shared")
        with self.package.Pool(WORKERS, born_shared=True) as self.workers:
            yield

    def map_holding(self, array: _work.Array, items: Sequence[int]) -> list[Any]:
        return self.map(lambda index: float(array[index]), items, chunksize=1)

    @contextlib.contextmanager
    def shared(self, count: int) -> Iterator[tuple[_work.Array, Callable[[], int]]]:
        array = self.package.empty(count, np.int64)
        yield array, lambda: self.apply(_work.middle, array)

    @contextlib.contextmanager
    def shared_by_worker(self, count: int) -> Iterator[Callable[[], int]]:
        yield lambda: _work.middle(self.apply(_work.kept_shared_array, count))

    @contextlib.contextmanager
    def read_by_all(self, count: int) -> Iterator[Callable[[str, int], list[tuple[float, int]]]]:
        array = self.package.ones(count, np.int64)
        yield lambda directory, readers: self.map(
            functools.partial(_work.read_together, array, directory, readers, os.getpid()), range(readers), chunksize=1
        )

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Callable[[Sequence[Any]], float]]:
        if not hasattr(self.package, "Queue"):
            raise CannotDoError("this forkshm has no Queue")
        with super().exchange() as send:
            yield send


class MemoryByName:
    """Base of libraries whose workers are forked by ``multiprocessing``: they pass a SharedMemory as an argument."""

    fds_of_shared = 2
    # The module that has ``SharedMemory``.
    memory_module = "multiprocessing.shared_memory"
    apply: Callable[..., Any]
    map: Callable[..., list[Any]]

    def __init__(self) -> None:
        super().__init__()
        # If the first worker that attaches started the tracker, it would unlink the memory when that worker ends.
        package = self.memory_module.partition(".")[0]
        importlib.import_module(f"{package}.resource_tracker").ensure_running()

    @contextlib.contextmanager
    def memory(self, nbytes: int) -> Iterator[Any]:
        memory = importlib.import_module(self.memory_module).SharedMemory(create=True, size=nbytes)
        try:
            yield memory
        finally:
            memory.unlink()
            # The caller may still have the array; then the mapping ends with the array.
            with contextlib.suppress(BufferError):
                memory.close()

    @contextlib.contextmanager
    def shared(self, count: int) -> Iterator[tuple[_work.Array, Callable[[], int]]]:
        with self.memory(count * 8) as memory:
            array: _work.Array = np.ndarray(count, np.int64, memory.buf)
            yield array, lambda: int(self.apply(_work.middle_of_memory, memory, count))

    @contextlib.contextmanager
    def shared_by_worker(self, count: int) -> Iterator[Callable[[], int]]:
        # The receiver has to unlink the memory; each worker created one.
        got = {}

        def look() -> int:
            memory = self.apply(_work.kept_memory, self.memory_module, count)
            found = _work.middle_of_memory(memory, count)
            got[memory.name] = memory
            return found

        try:
            yield look
        finally:
            for memory in got.values():
                memory.unlink()

    @contextlib.contextmanager
    def read_by_all(self, count: int) -> Iterator[Callable[[str, int], list[tuple[float, int]]]]:
        with self.memory(count * 8) as memory:
            np.ndarray(count, np.int64, memory.buf)[:] = 1
            yield lambda directory, readers: self.map(
                functools.partial(_work.read_memory_together, memory, count, directory, readers, os.getpid()),
                range(readers),
                chunksize=1,
            )


class Multiprocessing(MemoryByName, PoolPeer):
    name = module = "multiprocessing"

    def __init__(self) -> None:
        super().__init__()
        self.context = self.package.get_context("fork")


class Multiprocess(MemoryByName, PoolPeer):
    """multiprocessing with dill."""

    name = module = distribution = "multiprocess"
    memory_module = "multiprocess.shared_memory"

    def __init__(self) -> None:
        super().__init__()
        self.context = self.package.get_context("fork")


class ExecutorPeer(Peer):
    """A peer with the interface of ``concurrent.futures``."""

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.workers.submit(function, *args).result()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        # The default is one item per task, which is far too slow for many items. multiprocessing would use this size.
        return list(self.workers.map(function, items, chunksize=chunksize or -(-len(items) // (4 * WORKERS))))


class ConcurrentFutures(MemoryByName, ExecutorPeer):
    name, module = "concurrent.futures", "concurrent.futures"

    def make(self, workers: int) -> Any:
        fork = importlib.import_module("multiprocessing").get_context("fork")
        return self.package.ProcessPoolExecutor(workers, mp_context=fork)


class Loky(ExecutorPeer):
    """loky's executor is meant to be reused, so it is reused here."""

    name = module = distribution = "loky"

    @contextlib.contextmanager
    def pool(self, workers: int = WORKERS) -> Iterator[None]:
        self.workers = self.package.get_reusable_executor(workers)
        yield

    def make(self, workers: int) -> Any:
        return self.package.ProcessPoolExecutor(workers)

    def close(self) -> None:
        self.package.get_reusable_executor().shutdown(wait=True)


class Joblib(Peer):
    """joblib dumps large arrays to a file below /dev/shm, which workers map for reading."""

    name, module, distribution = "joblib", "joblib", "joblib"
    backend = "loky"
    fds_of_shared = 2

    def make(self, workers: int) -> Any:
        return self.package.Parallel(n_jobs=workers, backend=self.backend)

    def before_start(self) -> None:
        if self.backend == "loky":
            importlib.import_module("joblib.externals.loky").get_reusable_executor().shutdown(wait=True)

    def start_and_end(self) -> None:
        super().start_and_end()
        self.before_start()

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.workers([self.package.delayed(function)(*args)])[0]

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        self.workers.batch_size = chunksize or "auto"
        delayed = self.package.delayed(function)
        return list(self.workers(delayed(item) for item in items))

    def map_holding(self, array: _work.Array, items: Sequence[int]) -> list[Any]:
        self.workers.batch_size = 1
        delayed = self.package.delayed(_work.item)
        return list(self.workers(delayed(array, item) for item in items))

    @contextlib.contextmanager
    def mapped(self, count: int) -> Iterator[_work.Array]:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.truncate(count * 8)
            yield np.memmap(file.name, np.int64, "r+", shape=(count,))

    @contextlib.contextmanager
    def shared(self, count: int) -> Iterator[tuple[_work.Array, Callable[[], int]]]:
        with self.mapped(count) as array:
            yield array, lambda: int(self.apply(_work.middle, array))

    @contextlib.contextmanager
    def read_by_all(self, count: int) -> Iterator[Callable[[str, int], list[tuple[float, int]]]]:
        with self.mapped(count) as array:
            array[:] = 1
            delayed = self.package.delayed(_work.read_together)

            def read(directory: str, readers: int) -> list[tuple[float, int]]:
                self.workers.batch_size = 1
                return list(
                    self.workers(delayed(array, directory, readers, os.getpid(), index) for index in range(readers))
                )

            yield read


class JoblibMultiprocessing(Joblib):
    name, backend = "joblib (multiprocessing)", "multiprocessing"

    def close(self) -> None:
        pass


class Mpire(MemoryByName, Peer):
    name = module = distribution = "mpire"

    def make(self, workers: int) -> Any:
        return self.package.WorkerPool(n_jobs=workers, start_method="fork", keep_alive=True)

    @contextlib.contextmanager
    def pool(self, workers: int = WORKERS) -> Iterator[None]:
        # After an apply, a map calls its function with wrong arguments (2.10), so each has a pool of its own. Workers
        # start with the first call.
        with self.make(workers) as self.workers, self.make(workers) as self.mappers:
            yield

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.workers.apply(function, args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self.mappers.map(function, items, chunk_size=chunksize))


class Ray(Peer):
    """Tasks with arguments in ray's object store; a map of many items uses ray's Pool, which takes chunks."""

    name = module = distribution = "ray"
    restless = True
    fds_of_shared = 0
    store_bytes = 3 * 10**9

    def __init__(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        super().__init__()
        self.remote = functools.cache(self._remote)
        self.cores_each = 1.0
        # ray's Pool, kept once it was needed, because its workers take a second to start.
        self.mappers: Any = None

    def _remote(self, function: Callable[..., Any], cores: float) -> Any:
        return self.package.remote(num_cpus=cores)(function)

    def begin(self) -> None:
        if not self.package.is_initialized():
            self.package.init(
                num_cpus=WORKERS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=self.store_bytes,
            )

    @contextlib.contextmanager
    def pool(self, workers: int = WORKERS) -> Iterator[None]:
        self.begin()
        # At most one task runs in a worker; a fraction of a core makes ray start more workers than cores.
        self.cores_each = WORKERS / workers
        yield

    def start_and_end(self) -> None:
        self.begin()
        self.apply(_work.noop)
        self.close()

    def before_start(self) -> None:
        self.close()

    def close(self) -> None:
        if self.mappers is not None:
            self.mappers.terminate()
            self.mappers = None
        self.package.shutdown()
        self.remote.cache_clear()

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.package.get(self.remote(function, self.cores_each).remote(*args))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        if self.mappers is None:
            self.mappers = importlib.import_module("ray.util.multiprocessing").Pool(WORKERS)
        return list(self.mappers.map(function, items, chunksize=chunksize))

    def map_holding(self, array: _work.Array, items: Sequence[int]) -> list[Any]:
        return self._map_with(_work.item, self.package.put(array), [(item,) for item in items])

    def _map_with(self, function: Callable[..., Any], stored: Any, rest: Sequence[tuple[Any, ...]]) -> list[Any]:
        remote = self.remote(function, self.cores_each)
        return list(self.package.get([remote.remote(stored, *args) for args in rest]))

    @contextlib.contextmanager
    def shared(self, count: int) -> Iterator[tuple[_work.Array, Callable[[], int]]]:
        if count * 8 > self.store_bytes / 2:
            raise CannotDoError(f"its object store was given {self.store_bytes / 1e9:g} GB")
        array = np.zeros(count, np.int64)
        stored: list[Any] = []

        def look() -> int:
            # Data in the store cannot be written to, so it is stored only after it was written.
            if not stored:
                stored.append(self.package.put(array))
            return int(self.apply(_work.middle, stored[0]))

        yield array, look

    @contextlib.contextmanager
    def read_by_all(self, count: int) -> Iterator[Callable[[str, int], list[tuple[float, int]]]]:
        stored = self.package.put(np.ones(count, np.int64))
        yield lambda directory, readers: self._map_with(
            _work.read_together, stored, [(directory, readers, os.getpid(), index) for index in range(readers)]
        )

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Callable[[Sequence[Any]], float]]:
        self.begin()
        queue = importlib.import_module("ray.util.queue").Queue
        there, back = queue(actor_options={"num_cpus": 0}), queue(actor_options={"num_cpus": 0})
        child = self.remote(_consume_of_ray, 1).remote(there, back)

        def send(messages: Sequence[Any]) -> float:
            there.put(len(messages))
            for message in messages:
                there.put(message)
            return float(back.get())

        try:
            yield send
        finally:
            there.put(None)
            self.package.get(child)
            there.shutdown()
            back.shutdown()


def _consume_of_ray(there: Any, back: Any) -> None:
    _work.consume(there.get, back.put)


# The order of their turns.
PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        *(Forkshm, Multiprocessing, Multiprocess, ConcurrentFutures, Joblib, JoblibMultiprocessing),
        *(Loky, Mpire, Ray),
    )
}
