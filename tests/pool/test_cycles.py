"""Results and exceptions of calls are freed by reference counting, without the garbage collector."""

import gc
import weakref

import pytest

import forkshm


class Refused(ValueError):
    """An object that supports weak references."""


def refuse(number):
    raise Refused(number)


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("call", ["apply", "map", "apply_async", "success"])
def test_no_cycle(call, no_collector):
    with forkshm.Pool(1) as pool:
        if call == "success":
            result = pool.apply_async(abs, (-1,))
            assert result.get() == 1
            there = weakref.ref(result)
            del result
        else:
            try:
                if call == "apply":
                    pool.apply(refuse, (1,))
                elif call == "map":
                    pool.map(refuse, [1])
                else:
                    pool.apply_async(refuse, (1,)).get()
            except Refused as error:
                there = weakref.ref(error)
        assert there() is None
