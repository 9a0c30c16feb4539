"""An unpicklable part is named by its path."""

import collections
import copyreg
import functools
import pickle
import sys
import threading
import types
from typing import Any, NamedTuple

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm.pickler import explain, pack

LOCK = threading.Lock()


class Pair(NamedTuple):
    one: Any
    other: Any


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def method(self):
        return self


class Slotted:
    __slots__ = ("one", "other")

    def __init__(self, other):
        self.one, self.other = 1, other


class Reduced:
    def __init__(self, inside):
        self.inside = inside
        self.calls = 0

    def __reduce__(self):
        self.calls += 1
        return f.echo, (1, self.inside)


class Listed(list):
    pass


def message_of(thing):
    with pytest.raises((TypeError, pickle.PicklingError, AttributeError)) as caught:
        pack(thing)
    error = caught.value
    explain(error, {"args": thing})
    assert type(error) is type(caught.value)
    return str(error)


def closure(captured):
    return lambda: captured


def cyclic():
    first, second = Holder(), Holder()
    first.second, second.first, second.lock = second, first, LOCK
    return first


def with_attribute(error, lock):
    error.lock = lock
    return error


WAYS = {
    "": LOCK,
    "[1]": (1, LOCK),
    "[0].model._lock": (Holder(model=Holder(_lock=LOCK)),),
    "['x'][2]": {"w": 1, "x": [0, 1, LOCK]},
    ".other": Slotted(LOCK),
    "[0].other": [Pair(1, LOCK)],
    "[0].__closure__['captured']": [closure(LOCK)],
    ".__closure__['captured'].deep": closure(Holder(deep=LOCK)),
    ".__self__.lock": Holder(lock=LOCK).method,
    ".args[0].lock": functools.partial(f.nothing, Holder(lock=LOCK)),
    ".keywords['x']": functools.partial(f.nothing, x=LOCK),
    "[2]": collections.deque([0, 1, LOCK]),
    "[0].args[1]": [ValueError("message", LOCK)],
    ".lock": with_attribute(ValueError("message"), LOCK),
    ".args[1][0].args[0]": ExceptionGroup("message", [ValueError(LOCK)]),
    ".__reduce__()[1][1]": Reduced(LOCK),
    "[0]": Listed([LOCK]),
    ".second.lock": cyclic(),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_way_is_written_as_python_would(way):
    assert message_of(WAYS[way]) == f"cannot pickle '_thread.lock' object (args{way}: _thread.lock)"


def test_globals_and_defaults_of_functions_by_value():
    here = {"LOCK": LOCK, "__name__": "__main__"}
    exec("def uses(): return LOCK\ndef takes(x, y=LOCK): return x\ndef nests():\n  return lambda: LOCK", here)
    assert "(args.__globals__['LOCK']: _thread.lock)" in message_of(here["uses"])
    assert "(args.__defaults__[0]: _thread.lock)" in message_of(here["takes"])
    assert "(args.__globals__['LOCK']: _thread.lock)" in message_of(here["nests"])


def test_members_of_sets_and_keys_have_no_better_name():
    assert "(args member <lock>: _thread.lock)" in message_of({LOCK})
    assert "(args key <lock>: _thread.lock)" in message_of({LOCK: 1})


def test_arrays_of_objects_are_looked_into():
    assert "[1]: _thread.lock)" in message_of(np.array([1, LOCK], dtype=object))


def test_the_first_unpicklable_part_is_named():
    shared = Holder(fine=1)
    things = [shared, {"a": shared}, (i for i in "x"), LOCK]
    assert message_of(things) == "cannot pickle 'generator' object (args[2]: generator)"


def test_reducers_registered_with_copyreg_are_called_as_by_pickle():
    class Registered:
        pass

    copyreg.pickle(Registered, lambda thing: (f.echo, (LOCK,)))
    try:
        assert "(args[0].__reduce__()[1][0]: _thread.lock)" in message_of([Registered()])
    finally:
        del copyreg.dispatch_table[Registered]


def test_objects_are_asked_once_more_and_no_oftener():
    reduced = Reduced(LOCK)
    message_of([reduced])
    assert reduced.calls == 2


def test_errors_of_others_are_left_alone():
    for error in (OSError(28, "no space"), MemoryError(), RecursionError("deep"), KeyError("x")):
        before = error.args
        explain(error, {"args": LOCK})
        assert error.args == before


def test_an_error_that_does_not_come_again_is_left_alone():
    error = TypeError("cannot pickle today")
    explain(error, {"args": [1, 2]})
    assert str(error) == "cannot pickle today"


def test_an_unpicklable_part_that_cannot_be_found_is_named_by_its_type():
    class Fresh:
        def __reduce__(self):
            return f.echo, (), None, iter([threading.Lock()])

    assert "(in args: _thread.lock)" in message_of(Fresh())


IN_C = [type(iter(())), type({}.keys()), type(iter([])), type(sys.flags), type(sys.float_info)]


@pytest.mark.parametrize("kind", IN_C, ids=lambda kind: kind.__name__)
def test_classes_in_c_without_a_name_are_refused_by_the_sender(kind):
    with forkshm.Pool(1) as pool, pytest.raises(pickle.PicklingError, match=r"args\[0\]"):
        pool.apply(id, (kind,))


def test_types_that_are_found_by_another_name_cross():
    kinds = [type(None), types.FunctionType, types.GeneratorType, types.MappingProxyType, types.CodeType]
    with forkshm.Pool(1) as pool:
        assert pool.apply(_same, (kinds,)) == kinds


def _same(thing):
    return thing
