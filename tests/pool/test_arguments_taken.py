"""When arguments of asynchronous calls are pickled: small ones at the call, however many calls wait."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest

import forkshm
from forkshm.region import Semaphore

np = pytest.importorskip("numpy")


class Own:
    def __init__(self):
        self.value = 0

    def __reduce__(self):
        return _own, (self.value,)


def _own(value):
    made = Own()
    made.value = value
    return made


def put(thing, value):
    if isinstance(thing, Own):
        thing.value = value
    elif isinstance(thing, (dict, list, bytearray, np.ndarray)):
        inner = thing[0]
        if isinstance(inner, (list, Own, np.ndarray)):
            put(inner, value)
        else:
            thing[0] = value
    else:
        thing.clear()


def get(thing):
    if isinstance(thing, Own):
        return thing.value
    if isinstance(thing, set):
        return 0 if thing else 1
    inner = thing[0]
    return get(inner) if isinstance(inner, (list, Own, np.ndarray)) else int(inner)


KINDS = {
    "list": lambda: [0, 1],
    "nested": lambda: [[0]],
    "dict": lambda: {0: 0},
    "dict of list": lambda: {0: [0]},
    "set": lambda: {5},
    "bytearray": lambda: bytearray(1),
    "array": lambda: np.zeros(3),
    "view": lambda: np.zeros(8)[::2],
    "tuple of list": lambda: ([0],),
    "list of array": lambda: [np.zeros(2)],
    "object": Own,
    "list of object": lambda: [Own()],
}
COUNT = 200


@pytest.fixture
def held():
    """Provide a pool whose only worker is busy until a gate is opened, so that submitted calls have to wait."""
    gate = Semaphore(forkshm.anonymous_shared_memory(Semaphore.SIZE), value=0)
    with forkshm.Executor(1) as executor:
        first = executor.submit(gate.acquire)
        yield executor, gate.release
        first.result()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["apply_async", "map_async", "starmap_async", "submit", "map"])
def test_small_arguments_are_taken_at_the_call(held, how, kind):
    executor, release = held
    pool = executor.pool
    things = [KINDS[kind]() for _ in range(COUNT)]
    if how == "apply_async":
        results = [pool.apply_async(get, (thing,)) for thing in things]

        def found():
            return [result.get() for result in results]
    elif how == "map_async":
        found = pool.map_async(get, things, chunksize=2).get
    elif how == "starmap_async":
        found = pool.starmap_async(get, [(thing,) for thing in things], chunksize=1).get
    elif how == "submit":
        futures = [executor.submit(get, thing) for thing in things]

        def found():
            return [future.result() for future in futures]
    else:
        answers = executor.map(get, things)

        def found():
            return list(answers)

    for thing in things:
        put(thing if not isinstance(thing, tuple) else thing[0], 1)
    release()
    assert found() == [0] * COUNT


def same(a, b):
    return a is b, a[0] is b[0]


def test_an_object_that_occurs_twice_arrives_as_one(held):
    executor, release = held
    inner = [1]
    thing = [inner]
    cyclic = [1]
    cyclic.append(cyclic)
    futures = [executor.submit(same, thing, thing) for _ in range(COUNT)]
    futures += [executor.submit(same, [inner], (inner,)) for _ in range(COUNT)]
    others = [executor.submit(len, cyclic) for _ in range(3)]
    release()
    assert [future.result() for future in futures] == [(True, True)] * COUNT + [(False, True)] * COUNT
    assert [future.result() for future in others] == [2] * 3


def test_shared_memory_is_not_copied_and_keeps_no_fds(held):
    executor, release = held
    shared = forkshm.zeros(1000)
    small = [0]
    before = executor.pool.statistics().bytes_copied
    import os

    fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    futures = [executor.submit(add_up, shared, small) for _ in range(1500)]
    if fds:
        assert len(os.listdir("/proc/self/fd")) < fds + 300
    shared[0] = 1
    small[0] = 1
    release()
    assert {future.result() for future in futures} == {(1.0, 0)}
    assert executor.pool.statistics().bytes_copied == before


def add_up(shared, small):
    return float(shared.sum()), small[0]


@pytest.mark.parametrize("kind", ["array", "hidden"])
def test_large_arguments_are_taken_at_the_call_when_asked_for(kind):
    gate = Semaphore(forkshm.anonymous_shared_memory(Semaphore.SIZE), value=0)
    arrays = [np.zeros(20_000) for _ in range(30)]
    with forkshm.Pool(1, copy_at_call=True) as pool:
        first = pool.apply_async(gate.acquire)
        wrap = (lambda a: a) if kind == "array" else (lambda a: {"hidden": (a,)})
        results = [pool.apply_async(first_of, (wrap(array),)) for array in arrays]
        for array in arrays:
            array[:] = 1
        gate.release()
        assert [result.get() for result in results] == [0.0] * 30
        first.get()


def first_of(thing):
    return float((thing["hidden"][0] if isinstance(thing, dict) else thing)[0])


def test_an_unpicklable_argument_raises(held):
    executor, release = held
    futures = [executor.submit(len, threading.Lock()) for _ in range(COUNT)]
    release()
    for future in futures:
        with pytest.raises(Exception, match="cannot pickle"):
            future.result()


def test_a_terminated_pool_releases_pickled_arguments():
    with forkshm.Pool(1) as pool:
        gate = Semaphore(forkshm.anonymous_shared_memory(Semaphore.SIZE), value=0)
        pool.apply_async(gate.acquire)
        for _ in range(300):
            pool.apply_async(get, (Own(),))


class Config:
    def __init__(self):
        self.items = [0]
        self.small = np.zeros(3)


def get_beside(large, config, again, view):
    same = config is again[0] and config.items is again[1].items
    return len(large), config.items, float(config.small.sum() + view.sum()), same


BESIDE = {
    "large": lambda: np.zeros(100_000),
    "bytes": lambda: bytearray(100_000),
    "shared": lambda: forkshm.zeros(10),
    "view of shared": lambda: np.asarray(forkshm.zeros(10)),
    "shared list": lambda: forkshm.Array("i", 10),
}


@pytest.mark.parametrize("large", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("how", ["submit", "starmap_async"])
def test_small_objects_beside_a_large_argument_are_taken_at_the_call(held, how, large):
    executor, release = held
    large = large()
    configs = [Config() for _ in range(COUNT)]
    calls = []
    for config in configs:
        alike = Config()
        alike.items = config.items
        calls.append((large, config, [config, alike], config.small[::2]))
    if how == "submit":
        futures = [executor.submit(get_beside, *call) for call in calls]

        def found():
            return [future.result() for future in futures]
    else:
        found = executor.pool.starmap_async(get_beside, calls, chunksize=1).get
    for config in configs:
        config.items.append(1)
        config.small += 1
    release()
    assert found() == [(len(large), [0], 0.0, True)] * COUNT


def sum_after(large, part):
    large[:] = 1
    return float(part.sum())


def test_a_view_of_a_large_argument_stays_its_view(held):
    executor, release = held
    large = np.zeros(100_000)
    futures = [executor.submit(sum_after, large, large[:5]) for _ in range(10)]
    release()
    assert [future.result() for future in futures] == [5.0] * 10


class Holder:
    def __init__(self, array):
        self.array = array
        self.tail = array[1:]


def shares(whole, tail, holder, *_):
    for array in (whole, holder.array):
        array[1] = 5
    return tail[0] == 5, holder.tail[0] == 5, holder.array is whole


@pytest.mark.parametrize("large", [False, True], ids=["alone", "beside a large one"])
@pytest.mark.parametrize("length", [3, 3000, 4500])
def test_views_of_small_arrays_stay_their_views(held, length, large):
    executor, release = held
    array = np.zeros(length)
    others = (np.zeros(100_000),) if large else ()
    holder = Holder(array)
    futures = [executor.submit(shares, array, array[1:], holder, *others) for _ in range(COUNT)]
    apart = executor.submit(shares, np.zeros(3), np.ones(3), Holder(np.zeros(length)), *others)
    array[:] = holder.tail[:] = 7
    release()
    assert [future.result() for future in futures] == [(True, True, True)] * COUNT
    assert apart.result() == (False, True, False)


def is_recursive(thing, again):
    return thing[0][0] is thing and thing is again


def test_a_recursive_tuple_arrives_as_one(held):
    executor, release = held
    inner = []
    thing = (inner,)
    inner.append(thing)
    future = executor.submit(is_recursive, thing, thing)
    release()
    assert future.result()


def count(large, items, *, named, extra=()):
    return len(items), len(named), len(extra)


def test_very_many_items_beside_a_large_argument_are_taken_at_the_call(held):
    executor, release = held
    large = np.zeros(100_000)
    items = [0] * 3000
    named = {"a": [1], "b": Config()}
    futures = [executor.submit(count, large, items, named=named, extra=items) for _ in range(COUNT)]
    chunks = executor.pool.starmap_async(get_beside, [(large, Config(), [], [large])] * 3)
    items.append(1)
    named["c"] = 1
    release()
    assert [future.result() for future in futures] == [(3000, 2, 3000)] * COUNT
    with pytest.raises(IndexError):
        chunks.get()


def nap(large, config):
    time.sleep(0.01)


def test_reports_name_the_types_of_objects_that_were_taken(held):
    executor, release = held
    future = executor.submit(nap, np.zeros(100_000), Config())
    release()
    future.result()
    assert any("Config" in slow.task for slow in executor.pool.report().slowest)


def _changing(thing, count):
    """Yield one object again and again, with another value each time."""
    for value in range(count):
        put(thing, value)
        yield thing


class _Sized:
    """Input that has a length, and a buffer that it fills again for each item."""

    def __init__(self, thing, count):
        self._thing, self._count = thing, count

    def __len__(self):
        return self._count


class Iterated(_Sized):
    def __iter__(self):
        return _changing(self._thing, self._count)


class Indexed(_Sized):
    def __getitem__(self, index):
        if index >= self._count:
            raise IndexError(index)
        put(self._thing, index)
        return self._thing


KINDS_OF_ITEMS = {
    **{name: make for name, make in KINDS.items() if name not in ("set", "tuple of list")},
    "large array": lambda: np.zeros(20_000),
    "large bytearray": lambda: bytearray(200_000),
    "list of a large array": lambda: [np.zeros(20_000)],
}


@pytest.mark.parametrize("source", [_changing, Iterated, Indexed])
@pytest.mark.parametrize("call", ["imap", "imap_unordered"])
@pytest.mark.parametrize("kind", KINDS_OF_ITEMS)
def test_input_may_change_an_item_when_the_next_one_is_read(kind, call, source):
    count = 120
    with forkshm.Pool(2) as pool:
        # Tiny tasks share messages once they have been measured, so the first items are not the test.
        results = getattr(pool, call)(get, source(KINDS_OF_ITEMS[kind](), count))
        assert sorted(results) == [value % 256 if "bytearray" in kind else value for value in range(count)]


def _frames(array, count, fds):
    for value in range(count):
        fds.append(len(os.listdir("/proc/self/fd")))
        array[:] = value
        yield array


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open fds")
def test_few_large_items_are_taken_ahead():
    fds: list[int] = []
    with forkshm.Pool(1) as pool:
        results = pool.imap(get, itertools.chain([[0]] * 400, _frames(np.zeros(20_000), 200, fds)))
        for _ in range(300):
            next(results)
        assert list(results)[100:] == list(range(200))
    assert max(fds) - fds[0] < 40


class Rows(list):
    """A list whose slices are of its own class, which takes more than the items."""

    def __init__(self, items, name):
        super().__init__(items)
        self.name = name

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Rows(found, self.name) if isinstance(index, slice) else found


@pytest.mark.parametrize("chunksize", [1, 2])
def test_slices_of_a_class_of_the_program_are_taken(pool, chunksize):
    rows = Rows([[1], [2, 3], [4, 5, 6]], "rows")
    assert pool.map_async(len, rows, chunksize=chunksize).get(30) == [1, 2, 3]
    assert list(pool.imap(len, rows, chunksize)) == [1, 2, 3]
