"""assert_zero_copy(): lists what was copied, and where."""

from __future__ import annotations

import os
import re
import threading

import functions as f
import numpy as np
import pandas as pd
import pytest

import forkshm

PLAIN = np.ones((100, 1000))  # 800,000 bytes
HERE = re.escape(os.path.relpath(__file__))


def copied(action, *args, **kwargs):
    with pytest.raises(forkshm.CopiedError) as caught, forkshm.assert_zero_copy(**kwargs):
        action(*args)
    return caught.value


def test_shared_memory_passes(pool):
    shared = forkshm.ones(100_000)
    with forkshm.assert_zero_copy():
        assert pool.apply(np.sum, (shared[::2],)) == 50_000
        assert pool.apply(lambda a: a[1:], (shared,)).size == 99_999
        assert pool.map(f.square, range(100)) == [x * x for x in range(100)]
        pool.apply(f.nothing, ({"small": np.ones(100), "text": "x" * 1000},))


def test_the_error_names_object_place_and_receiver(pool):
    def send():
        pool.apply(f.nothing, (PLAIN,))

    error = copied(send)
    assert (error.nbytes, error.max_bytes) == (800_000, 0)
    here = f"{os.path.relpath(__file__)}:{send.__code__.co_firstlineno + 1} in send"
    assert str(error).splitlines()[:2] == [
        "800,000 bytes were copied, and 0 are allowed:",
        f"  800,000 bytes: numpy.ndarray float64 (100, 1000), sent to nothing() at {here}",
    ]
    assert isinstance(error, AssertionError)


def test_the_error_names_the_task_of_a_copied_result(pool):
    error = copied(pool.apply, np.ones, (100_000,))
    assert error.nbytes == 800_000
    assert re.search(rf"800,000 bytes: 1 copied buffers, result of ones\(\) at {HERE}:\d+ in copied", str(error))


@pytest.mark.parametrize(
    ("thing", "what"),
    [
        (b"x" * 100_000, "bytes or str"),
        ("x" * 100_000, "bytes or str"),
        (list(range(100_000)), "pickle stream"),
        (PLAIN.T, r"numpy.ndarray float64 \((100, 1000|1000, 100)\)"),
        (PLAIN[::2, ::2], "numpy.ndarray"),
        ({"frame": pd.DataFrame({"a": np.ones(50_000)})}, "numpy.ndarray float64"),
        (bytearray(100_000), "bytearray|bytes or str"),
    ],
    ids=["bytes", "str", "list", "transpose", "strided", "frame", "bytearray"],
)
def test_large_things_of_every_kind_are_named(pool, thing, what):
    error = copied(pool.apply, f.nothing, (thing,))
    assert re.search(what, error.copies[0][1] if len(error.copies) == 1 else str(error))
    assert error.nbytes >= 100_000


def test_a_number_of_bytes_may_be_allowed(pool):
    with forkshm.assert_zero_copy(max_bytes=PLAIN.nbytes):
        pool.apply(f.nothing, (PLAIN,))
    error = copied(pool.map, f.nothing, [PLAIN, PLAIN.copy()], 1, max_bytes=PLAIN.nbytes)
    assert error.nbytes == 2 * PLAIN.nbytes
    assert "1,600,000 bytes in 2 copies: numpy.ndarray float64" in str(error)
    with pytest.raises(ValueError, match="at least 0"), forkshm.assert_zero_copy(-1):
        pass


def test_a_closure_is_a_copy_like_any_other(pool):
    table = PLAIN.copy()
    error = copied(pool.map, lambda i: float(table[i, i]), range(20), 1)
    assert error.nbytes == PLAIN.nbytes
    assert "<lambda>()" in str(error)


def test_messages_count_when_asked_for(pool):
    error = copied(pool.apply, f.echo, (b"x" * 1000,), messages=True)
    assert 2000 < error.nbytes < 4000
    assert "a message, sent at" in str(error)
    assert "a message, received at" in str(error)


def test_many_places_are_listed_in_short(pool):
    def send():
        for size in range(20):
            pool.apply(f.nothing, (np.ones(10_000 + size),))

    error = copied(send)
    assert len(error.copies) == 20
    assert len(str(error).splitlines()) == 13
    assert "of 10 others" in str(error)


def test_an_exception_of_the_block_propagates(pool):
    with pytest.raises(LookupError, match="mine"), forkshm.assert_zero_copy():
        pool.apply(f.nothing, (PLAIN,))
        raise LookupError("mine")
    with forkshm.assert_zero_copy():
        pass  # there are no watches any more


def test_each_of_several_blocks_counts(pool):
    with pytest.raises(forkshm.CopiedError) as outer, forkshm.assert_zero_copy():
        with forkshm.assert_zero_copy(PLAIN.nbytes):
            pool.apply(f.nothing, (PLAIN,))
        with forkshm.assert_zero_copy():
            pass
    assert outer.value.nbytes == PLAIN.nbytes


def test_copies_of_other_threads_count_with_their_own_place(pool):
    def from_elsewhere():
        pool.apply(f.nothing, (PLAIN,))

    def start():
        thread = threading.Thread(target=from_elsewhere)
        thread.start()
        thread.join()

    assert re.search(rf"{HERE}:\d+ in from_elsewhere", str(copied(start)))


def test_asynchronous_calls_are_named_where_they_were_made(pool):
    def call():
        made = [pool.apply_async(np.ones, (100_000,))]
        for _ in range(40):
            made.append(pool.apply_async(f.nothing, (PLAIN,)))
        for result in made:
            result.get()

    error = copied(call)
    assert error.nbytes == 41 * PLAIN.nbytes
    assert {re.sub(r".*:\d+ in ", "", what) for _, what in error.copies} == {"call"}


def test_the_result_of_an_earlier_call_counts_when_it_arrives(pool):
    result = pool.apply_async(np.ones, (100_000,))
    error = copied(result.get)
    assert "result of ones() at a call made before the block" in str(error)


def test_a_result_that_comes_after_the_block_does_not_count(pool, tmp_path):
    with forkshm.assert_zero_copy():
        result = pool.apply_async(make_when_told, (str(tmp_path / "go"),))
    (tmp_path / "go").touch()
    assert result.get().size == 100_000


def make_when_told(path):
    f.hold(path + ".begun", path)
    return np.ones(100_000)


def test_a_forked_child_is_not_watched(pool):
    pid = -1
    try:
        with forkshm.assert_zero_copy():
            pool.apply(f.nothing, (PLAIN,))
            pid = os.fork()
        caught = False
    except forkshm.CopiedError:
        caught = True
    if pid == 0:
        os._exit(caught)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert caught


def test_assert_zero_copy_works_as_a_decorator(pool):
    @forkshm.assert_zero_copy()
    def test(thing):
        pool.apply(f.nothing, (thing,))

    test(forkshm.ones(100_000))
    with pytest.raises(forkshm.CopiedError):
        test(PLAIN)


def test_assert_zero_copy_works_in_a_worker(pool):
    assert pool.apply(watch_here, (forkshm.ones(100_000),)) == 100_000


def watch_here(array):
    with forkshm.assert_zero_copy():
        return array.size
