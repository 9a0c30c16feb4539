"""SharedList and SharedDict: objects stored once for all processes that read them."""

from __future__ import annotations

import collections
import copy
import decimal
import fractions
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import forkshm
from forkshm.backend import kernel
from forkshm.containers import _containers

pytestmark = pytest.mark.usefixtures("_warm_up")

THINGS = [None, 3, -1.5, "text", b"bytes", (1, [2]), {"a": {1, 2}}, "", fractions.Fraction(1, 3), [], "x" * 100_000]


def test_a_list_has_the_answers_of_a_list():
    shared = forkshm.SharedList(THINGS)
    assert shared == THINGS
    assert THINGS == shared
    assert shared == forkshm.SharedList(iter(THINGS))
    assert shared != THINGS[:-1]
    assert shared != tuple(THINGS)
    assert len(shared) == len(THINGS)
    for index in (0, 5, -1, -len(THINGS), True):
        assert shared[index] == THINGS[index]
    for part in (slice(2, 5), slice(None, None, -2), slice(100, None), slice(-3, -1)):
        assert shared[part] == THINGS[part]
        assert type(shared[part]) is list
    assert list(reversed(shared)) == THINGS[::-1]
    assert "text" in shared
    assert "no such" not in shared
    assert (shared.index("text"), shared.count(3)) == (3, 1)
    for index in (len(THINGS), -len(THINGS) - 1):
        with pytest.raises(IndexError, match=f"index {index} is out of range: the list has 11 items"):
            shared[index]
    assert forkshm.SharedList() == []
    assert not forkshm.SharedList()


def test_a_list_cannot_be_changed_or_hashed():
    shared = forkshm.SharedList([[1]])
    shared[0].append(2)
    assert shared == [[1]]
    with pytest.raises(TypeError, match="is read-only"):
        shared[0] = 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(shared)


KEYS = [
    *range(-300, 300),
    *(2**x for x in range(10, 80)),
    0.5,
    float("inf"),
    1 + 2j,
    decimal.Decimal("0.1"),
    fractions.Fraction(1, 3),
    None,
    "",
    "text",
    "\udc80",
    b"text",
    (),
    ("a", 1),
    (1, ("a", None)),
    frozenset(["b", 2, ()]),
]


def test_a_dict_has_the_answers_of_a_dict():
    plain = {key: [str(key)] for key in KEYS}
    shared = forkshm.SharedDict(plain)
    assert len(plain) == len(shared) == len(KEYS)
    assert list(shared) == KEYS
    assert list(shared.values()) == list(plain.values())
    assert shared == plain == dict(shared.items())
    assert shared == forkshm.SharedDict(plain.items())
    for key, value in plain.items():
        assert shared[key] == value
        assert key in shared
    for missing in ("no", 1000, 0.25, ("a",), b"", frozenset(), object(), collections.OrderedDict):
        assert missing not in shared
        assert shared.get(missing, "default") == "default"
        with pytest.raises(KeyError):
            shared[missing]
    with pytest.raises(TypeError, match="unhashable"):
        shared[[]]
    with pytest.raises(TypeError, match="unhashable"):
        hash(shared)
    assert forkshm.SharedDict() == {}
    assert "a" not in forkshm.SharedDict()


def test_equal_keys_of_different_types_are_one():
    shared = forkshm.SharedDict({1: "one", (0, 0.5): "half"})
    for key in (1, 1.0, True, np.int64(1), np.float32(1), fractions.Fraction(1), 1 + 0j):
        assert shared[key] == "one"
    assert shared[False, fractions.Fraction(1, 2)] == "half"


def test_a_process_with_other_hashes_finds_the_keys():
    keys = ["a", b"b", ("c", 1), frozenset(["x", "y", "z"])]
    program = f"from forkshm.containers._containers import _hash; print([_hash(key) for key in {keys}])"
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{[_containers._hash(key) for key in keys]}\n"


def test_an_unpicklable_item_is_named():
    with pytest.raises(forkshm.NotPicklableError, match="item 1, a lock, cannot be pickled"):
        forkshm.SharedList([1, threading.Lock()])
    with pytest.raises(forkshm.NotPicklableError, match="the value of 'b', a lock, cannot be pickled"):
        forkshm.SharedDict({"a": 1, "b": threading.Lock()})
    with pytest.raises(
        TypeError, match=r"keys of a SharedDict must be strings, .* got <object object at .* of type object"
    ):
        forkshm.SharedDict({object(): 1})


def test_arrays_are_the_memory_itself_and_cannot_be_written_to():
    shared = forkshm.SharedList([np.arange(1000.0), {"a": np.ones((3, 4)), "b": np.zeros(2)}])
    first, again = shared[0], shared[0]
    assert first.tolist() == list(range(1000))
    assert first.__array_interface__["data"] == again.__array_interface__["data"]
    assert first.__array_interface__["data"][0] % 64 == 0
    assert shared[1]["a"].sum() == 12
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        first.flags.writeable = True
    del shared
    assert again[-1] == 999


def read_all(shared):
    return type(shared), len(shared), list(shared), shared.nbytes


@pytest.mark.parametrize("kind", [forkshm.SharedList, forkshm.SharedDict])
def test_to_a_worker_crosses_a_descriptor(kind, pool):
    plain = [("text" * 1000, x) for x in range(500)]
    shared = kind(plain) if kind is forkshm.SharedList else kind(enumerate(plain))
    before = pool.statistics()
    there, count, items, nbytes = pool.apply(read_all, (shared,))
    assert (there, count, items, nbytes) == (kind, 500, list(shared), shared.nbytes)
    assert pool.apply(type(shared).__len__, (shared,)) == 500
    after = pool.statistics()
    assert after.bytes_shared - before.bytes_shared == 2 * shared.nbytes
    back = pool.apply(copy.copy, ([shared],))[0]
    assert back == shared
    assert kernel.identify(back._region.fileno()) == kernel.identify(shared._region.fileno())


@pytest.mark.needs("foreign_channels")
def test_a_container_stays_the_same_memory_through_the_standard_library():
    shared = forkshm.SharedList(["a", np.arange(3)])
    queue = multiprocessing.SimpleQueue()
    queue.put(shared)
    arrived = queue.get()
    queue.close()
    assert arrived[1].tolist() == [0, 1, 2]
    assert kernel.identify(arrived._region.fileno()) == kernel.identify(shared._region.fileno())


def test_a_plain_pickle_is_by_value():
    shared = forkshm.SharedDict({"a": [1]})
    arrived = pickle.loads(pickle.dumps(shared))
    assert arrived == shared
    assert kernel.identify(arrived._region.fileno()) != kernel.identify(shared._region.fileno())


def memory_of(pid, field, only=""):
    """Return the sum of a field of /proc/<pid>/smaps over mappings whose name contains *only*, in bytes."""
    total, counts = 0, False
    with open(f"/proc/{pid}/smaps") as lines:
        for line in lines:
            words = line.split()
            if "-" in words[0]:
                counts = only in line
            elif counts and words[0] == field + ":":
                total += int(words[1]) * 1024
    return total


def grown_by_reading(things, readers):
    """Fork *count* readers; return the private memory that each needed, and the shared memory of all."""
    children = []
    for _ in range(readers):
        up_read, up_write = os.pipe()
        down_read, down_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            before = memory_of("self", "Private_Dirty")
            seen = 0
            for thing in things:
                seen += len(thing)
            grown = memory_of("self", "Private_Dirty") - before
            os.write(up_write, f"{grown} {seen}".encode())
            os.read(down_read, 1)
            os._exit(0)
        children.append((pid, up_read, up_write, down_read, down_write))
    said = [[int(word) for word in os.read(child[1], 100).split()] for child in children]
    shared = sum(memory_of(pid, "Pss", "forkshm-region") for pid in [os.getpid(), *(child[0] for child in children)])
    for pid, *fds in children:
        os.write(fds[3], b".")
        os.waitpid(pid, 0)
        for fd in fds:
            os.close(fd)
    assert {seen for _, seen in said} == {sum(map(len, things))}
    return [grown for grown, _ in said], shared


def test_eight_readers_have_one_copy_between_them():
    others = memory_of("self", "Pss", "forkshm-region")
    plain = [f"{x:0100}" for x in range(50_000)]
    shared = forkshm.SharedList(plain)
    size = shared.nbytes
    assert shared == plain  # read here, too, so that its pages do not count as private to a child
    by_reading_plain, _ = grown_by_reading(plain, 2)
    by_reading_shared, all_of_it = grown_by_reading(shared, 8)
    # The cost of reference counts in the plain list, for each reader: all of its pages.
    assert min(by_reading_plain) > 50_000 * 100
    assert max(by_reading_shared) < 1_500_000
    # All eight readers and this process share the same pages.
    assert 0.9 * size < all_of_it - others < 1.05 * size


class Once:
    """An object whose pickling is interrupted once, by a signal handler, and whose unpickling raises IndexError."""

    def __init__(self):
        self.is_pickled = False

    def __getstate__(self):
        if not self.is_pickled:
            self.is_pickled = True
            signal.raise_signal(signal.SIGUSR1)
        return {"value": 1}

    def __setstate__(self, state):
        raise IndexError("of the object")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there are no such signals")
@pytest.mark.parametrize("make", [lambda: forkshm.SharedList([Once()]), lambda: forkshm.SharedDict({"a": Once()})])
def test_a_signal_handler_that_raises_is_not_reported_as_an_unpicklable_item(make):
    def handle(*_):
        raise TimeoutError("of the handler")

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(TimeoutError, match="of the handler"):
            make()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_index_error_of_an_item_is_raised_as_it_is():
    item = Once()
    item.is_pickled = True
    with pytest.raises(IndexError, match="of the object"):
        forkshm.SharedList([item])[0]
