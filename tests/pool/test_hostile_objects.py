"""Objects whose attributes, comparison or text raise are sent as pickle sends them."""

from __future__ import annotations

import os

import pytest

import forkshm


class Raising:
    """Keeps its attributes in a dict, so that a missing attribute raises KeyError."""

    def __init__(self, values):
        object.__setattr__(self, "values", values)

    def __getattr__(self, name):
        return object.__getattribute__(self, "values")[name]

    def __reduce__(self):
        return Raising, (object.__getattribute__(self, "values"),)

    def __call__(self, number):
        return self.x + number

    def _refuse(self, *_):
        raise RuntimeError("not asked for by pickle")

    __eq__ = __bool__ = __len__ = __iter__ = __repr__ = __str__ = _refuse
    __hash__ = None


class Properties:
    """Raises for the attributes by which arrays are known, as a sparse tensor does for ``nbytes``."""

    x = 5

    def __call__(self, number):
        return self.x + number

    nbytes = shape = dtype = flags = memory_usage = __array_interface__ = property(lambda self: 1 / 0)


class Odd:
    """Has attributes of types that nobody expects."""

    x = 5
    nbytes = shape = dtype = flags = __name__ = 3.5

    def __init__(self):
        self.__qualname__ = 3.5

    def __call__(self, number):
        return self.x + number


KINDS = {"raising": lambda: Raising({"x": 5}), "properties": Properties, "odd": Odd}


def x_of(thing):
    return thing.x


def identity(thing):
    return thing


def fail(thing):
    raise LookupError("as it should")


WAYS = {
    "apply": lambda pool, thing: pool.apply(x_of, (thing,)),
    "apply_async": lambda pool, thing: pool.apply_async(x_of, (thing,)).get(),
    "apply_async, inside": lambda pool, thing: pool.apply_async(identity, ([{"a": thing}],)).get()[0]["a"].x,
    "keyword": lambda pool, thing: pool.apply(x_of, kwds={"thing": thing}),
    "map": lambda pool, thing: pool.map(x_of, [thing] * 4)[3],
    "map, inside": lambda pool, thing: pool.map(identity, [[thing]] * 4)[3][0].x,
    "starmap": lambda pool, thing: pool.starmap(x_of, [(thing,)] * 4)[3],
    "imap": lambda pool, thing: list(pool.imap(x_of, [thing] * 4))[3],
    "result": lambda pool, thing: pool.apply(identity, (thing,)).x,
    "function": lambda pool, thing: pool.apply(thing, (0,)),
    "function of a map": lambda pool, thing: pool.map(thing, [0, 0])[1],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_object_arrives(pool, kind, way):
    assert WAYS[way](pool, KINDS[kind]()) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_exception_of_its_task_arrives(pool, kind):
    thing = KINDS[kind]()
    with pytest.raises(LookupError, match="as it should"):
        pool.apply(fail, (thing,))
    with pytest.raises(LookupError, match="as it should"):
        pool.map(fail, [thing] * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_executor_takes_it(kind):
    thing = KINDS[kind]()
    with forkshm.Executor(1) as executor:
        assert executor.submit(x_of, thing).result() == 5
        assert list(executor.map(thing, [0, 0])) == [5, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_whose_worker_died_is_described(pool, kind):
    thing = KINDS[kind]()
    with pytest.raises(forkshm.WorkerDiedError, match="exited with code 1"):
        pool.apply(lambda _: os._exit(1), (thing,))
