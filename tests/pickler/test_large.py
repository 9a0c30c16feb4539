"""Large bytes, bytearrays and strings arrive with their type and content, in any position."""

from __future__ import annotations

import pickle
import threading

import pytest

import forkshm
from forkshm.pickler import _large
from forkshm.pickler._large import LARGE, has_large_bytes, load

BYTES = bytes(range(256)) * (LARGE // 256) + b"end"
ARRAY = bytearray(BYTES)
TEXT = "0123456789abcdef" * (LARGE // 16) + "end"
WIDE = TEXT + "ü"


@pytest.mark.parametrize(
    "thing",
    [
        BYTES,
        ARRAY,
        TEXT,
        WIDE,
        [BYTES, ARRAY, TEXT, WIDE],
        (TEXT, 1, "short", None),
        {"a": [BYTES, {"b": (ARRAY,)}], "c": TEXT},
        [[TEXT], TEXT],
        [TEXT, {"inside": [1, 2]}],
        ((TEXT, BYTES), {}),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_they_arrive_as_they_were_sent(cross, thing):
    got = cross(thing).value
    assert type(got) is type(thing)
    assert got == thing


def test_a_bytearray_is_the_receivers_own(cross):
    got = cross(ARRAY).value
    got[0] = 99
    got.extend(b"more")
    assert ARRAY[0] == 0


def test_a_text_that_arrived_is_an_ordinary_one(cross):
    got = cross(TEXT).value
    assert got.isascii()
    assert hash(got) == hash(TEXT)
    assert (got + "!")[-4:] == "end!"
    assert got.encode() == TEXT.encode()
    assert {got: 1}[TEXT] == 1


def test_an_object_sent_twice_arrives_once(cross):
    first, second = cross([TEXT, TEXT]).value
    assert first is second
    first, second = cross([BYTES, BYTES]).value
    assert first is second


def test_a_list_that_holds_itself_still_does(cross):
    thing = [TEXT]
    thing.append(thing)
    got = cross(thing).value
    assert got[1] is got
    assert got[0] == TEXT


def test_the_head_says_whether_there_are_large_bytes():
    def pieces(thing):
        written = []

        class File:
            def write(self, piece):
                written.append(piece)

        pickle.Pickler(File(), 5).dump(thing)
        return written

    assert has_large_bytes(pieces(BYTES))
    assert has_large_bytes(pieces([1, {2: ARRAY}]))
    assert not has_large_bytes(pieces(WIDE))
    assert not has_large_bytes(pieces(BYTES[: LARGE - 1]))
    assert not has_large_bytes(pieces(list(range(2 * LARGE // 4))))
    assert not has_large_bytes([])


def test_every_kind_of_opcode_can_be_read_from_the_file():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for thing in ([1, "a", b"b", 2**70, 1.5, None, True, (), {1: {2}}], BYTES, {"x": [WIDE, bytearray(3)]}):
            assert load(memoryview(pickle.dumps(thing, protocol)), []) == thing


@pytest.mark.parametrize("length", [0, 1, 20, LARGE // 2, LARGE + 12])
def test_a_stream_that_was_cut_is_refused(length):
    stream = pickle.dumps([BYTES, TEXT], 5)
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        load(memoryview(stream)[:length], [])


def test_a_kernel_without_huge_pages_is_no_obstacle(cross, monkeypatch):
    def refuse(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(_large.kernel, "advise", refuse)
    assert cross([BYTES, TEXT]).value == [BYTES, TEXT]


def test_arguments_and_results_of_pools():
    with forkshm.Pool(1) as pool:
        assert pool.apply(len, (TEXT,)) == len(TEXT)
        assert pool.apply(bytes.__add__, (BYTES, b"!")) == BYTES + b"!"
        assert pool.apply(str.upper, (TEXT,)) == TEXT.upper()
        assert pool.map(str.upper, [TEXT, "a", TEXT]) == [TEXT.upper(), "A", TEXT.upper()]
        assert pool.apply(bytearray, (ARRAY,)) == ARRAY


def test_threads_send_large_texts_at_once():
    with forkshm.Pool(2) as pool:
        got = []
        threads = [threading.Thread(target=lambda: got.append(pool.apply(len, (TEXT,)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == [len(TEXT)] * 4
