"""Regions through the standard library's channels."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import multiprocessing
import multiprocessing.reduction
import os
import pickle

import numpy as np
import pytest
from system import open_fds

import forkshm
from forkshm import _multiprocess
from forkshm.pickler import _foreign, forget_received

CONTEXT = multiprocessing.get_context("fork")
PICKLERS = [multiprocessing.reduction.ForkingPickler, _multiprocess.reduction.ForkingPickler]


@contextlib.contextmanager
def made(queue):
    try:
        yield queue
    finally:
        queue.close()
        queue.join_thread()
        queue._writer.close()


def dumps(thing, pickler=PICKLERS[0]):
    file = io.BytesIO()
    pickler(file, pickle.HIGHEST_PROTOCOL).dump(thing)
    return file.getvalue()


@pytest.fixture(params=PICKLERS, ids=["multiprocessing", "multiprocess"])
def pickler(request):
    return request.param


def test_a_region_is_the_same_memory(pickler):
    region = forkshm.anonymous_shared_memory(100)
    got = pickle.loads(dumps(region, pickler))
    got.buf[:3] = b"abc"
    assert bytes(region.buf[:3]) == b"abc"


@pytest.mark.parametrize(
    "part", [np.s_[:], np.s_[3:], np.s_[::-1], np.s_[1:9:2, None]], ids=["all", "tail", "reversed", "strided"]
)
def test_an_array_and_its_views_are_the_same_memory(pickler, part):
    array = forkshm.array(np.arange(10.0))
    view = array[part]
    got = pickle.loads(dumps(view, pickler))
    assert type(got) is forkshm.SharedArray
    assert np.array_equal(got, view)
    got[0] = 77
    assert view.flat[0] == 77


def test_read_only_arrays_stay_read_only():
    array = forkshm.array(np.arange(10.0))
    array.flags.writeable = False
    assert not pickle.loads(dumps(array)).flags.writeable


def test_plain_pickles_are_by_value():
    array = forkshm.array(np.arange(10))
    got = pickle.loads(pickle.dumps(array))
    got[0] = 5
    assert array[0] == 0


def test_through_a_queue_of_the_standard_library(in_child):
    with made(CONTEXT.Queue()) as there, made(CONTEXT.Queue()) as back:

        def work():
            array, region = there.get(timeout=30)
            array[0] = 42
            region.buf[:1] = b"x"
            back.put("done")
            back.close()
            back.join_thread()

        process = CONTEXT.Process(target=work)
        process.start()
        # Created after the fork, and dropped at once.
        array, region = forkshm.zeros(1000), forkshm.anonymous_shared_memory(10)
        there.put((array, region))
        assert back.get(timeout=30) == "done"
        assert (array[0], bytes(region.buf[:1])) == (42, b"x")
        process.join()
        process.close()


def test_the_sender_may_let_go_at_once():
    data = dumps(forkshm.full(1000, 3.0))
    assert pickle.loads(data).sum() == 3000


def double(array):
    array *= 2
    return array


def test_through_an_executor_of_the_standard_library():
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=CONTEXT) as executor:
        arrays = [forkshm.full(1000, float(number)) for number in range(20)]
        for number, (array, got) in enumerate(zip(arrays, executor.map(double, arrays), strict=True)):
            assert array[0] == 2 * number
            got[1] = -1
            assert array[1] == -1


def test_memory_is_released_once_received():
    region = forkshm.anonymous_shared_memory(100)
    several = [dumps(region) for _ in range(10)]
    assert len(_foreign._outstanding._held) == 1
    for data in several:
        forget_received()
        assert len(_foreign._outstanding._held) == 1
        pickle.loads(data)
    forget_received()
    assert _foreign._outstanding._held == {}
    assert _foreign._outstanding._receipts is None


def test_many_that_wait_take_one_fd():
    region = forkshm.anonymous_shared_memory(100)
    before = len(open_fds())
    several = [dumps(region) for _ in range(3000)]
    assert len(open_fds()) <= before + 2
    for data in several:
        pickle.loads(data)


def test_a_second_time_says_so():
    data = dumps(forkshm.zeros(10))
    pickle.loads(data)
    forget_received()
    with pytest.raises(forkshm.errors.RegionGoneError, match="closed the region"):
        pickle.loads(data)


def test_a_sender_that_ended_is_named(in_child):
    read_end, write_end = os.pipe()

    def send():
        os.write(write_end, dumps(forkshm.zeros(10)))

    assert in_child(send) == 0
    with open(read_end, "rb") as pipe:
        os.close(write_end)
        data = pipe.read()
    with pytest.raises(forkshm.errors.RegionGoneError, match="that process ended"):
        pickle.loads(data)


def test_a_child_holds_nothing_of_its_parents(in_child):
    region = forkshm.anonymous_shared_memory(100)
    data = dumps(region)
    (held,) = _foreign._outstanding._held.values()

    def look():
        assert _foreign._outstanding._held == {}
        assert not os.path.exists(f"/proc/self/fd/{held.fd}")
        pickle.loads(data)  # and receives it as any other

    assert in_child(look) == 0
    forget_received()
    assert _foreign._outstanding._held == {}


def test_private_writes_are_not_sent():
    region = forkshm.anonymous_shared_memory(100)
    private = forkshm.MappedRegion(region, forkshm.region.copy_on_write)
    with pytest.raises(forkshm.NotPicklableError, match=r"Send bytes\(region.buf\)"):
        dumps(private)
