"""Results and exceptions of calls are freed by reference counting, without the garbage collector."""

import gc
import inspect
import traceback
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


def imap(pool):
    return next(pool.imap(refuse, [1]))


def submit(pool):
    with forkshm.Executor(1) as executor:
        executor.submit(refuse, 1).result()


CALLS = {
    "apply": lambda pool: pool.apply(refuse, (1,)),
    "map": lambda pool: pool.map(refuse, [1]),
    "imap": imap,
    "submit": submit,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_each_frame_of_a_traceback_has_its_arguments(call):
    """IPython shows them."""
    with forkshm.Pool(1) as pool, pytest.raises(Refused) as caught:
        call(pool)
    frames = [frame for frame, _ in traceback.walk_tb(caught.tb)]
    missing = {
        (frame.f_code.co_name, name)
        for frame in frames
        for name in inspect.getargs(frame.f_code).args
        if name not in frame.f_locals
    }
    assert not missing
