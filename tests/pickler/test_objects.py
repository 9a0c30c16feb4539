"""Objects without arrays: small ones are sent in the message, large ones in a block."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import gc
import os
import pickle
import threading
import types
import typing

import pytest
from consuming import receive, skip
from system import in_pages

from forkshm import MappedRegion, anonymous_shared_memory
from forkshm.backend import kernel
from forkshm.errors import ChannelBrokenError, RegionGoneError
from forkshm.pickler import _reducers, open_plain, pack, register
from forkshm.pickler._policy import INLINE_LIMIT, OUT_OF_BAND
from forkshm.region.blocks._arena import arena

PAGE = kernel.page_size


class Point(typing.NamedTuple):
    x: int
    y: object


@dataclasses.dataclass
class Record:
    name: str
    values: list[int]


class RefusesToBePickled:
    def __reduce__(self):
        raise ZeroDivisionError("not today")


def divide_by_zero():
    return 1 / 0


class FailsToBeMade:
    def __reduce__(self):
        return divide_by_zero, ()


OBJECTS = [
    None,
    True,
    0,
    -1,
    2**64,
    -(2**1000),
    1.5,
    float("inf"),
    2j,
    "",
    "text, \u00e4, \U0001f600, \0",
    b"",
    bytearray(b"abc"),
    (),
    [],
    {},
    set(),
    frozenset({1, (2, 3)}),
    [1, [2, [3, [4, {"five": (6, {7: [8]})}]]]],
    {"a": None, 1: "b", (1, 2): {3}},
    range(3, 1000, 7),
    slice(1, None, 2),
    decimal.Decimal("1.23"),
    Point(1, Record("r", [1, 2, 3])),
    int,
    len,
    os.path.join,
    Ellipsis,
    [1, 2.0, None, True, 3j],
    (1,) * 2000,
]


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: type(thing).__name__)
def test_a_small_object_comes_back_equal_and_of_its_type_without_a_block(cross, thing):
    crossing = cross(thing)
    assert crossing.value == thing
    assert type(crossing.value) is type(thing)
    assert (crossing.copied, crossing.shared, crossing.fds) == (0, 0, 0)


SIZES = [0, 1, OUT_OF_BAND - 1, OUT_OF_BAND, OUT_OF_BAND + 1, INLINE_LIMIT - 100, INLINE_LIMIT, INLINE_LIMIT + 1, 2**20]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [bytes, bytearray, str])
def test_bytes_and_text_of_any_size_come_back(cross, kind, size):
    pattern = bytes(range(1, 128)) * (size // 127 + 1)
    thing = kind(pattern[:size], "ascii") if kind is str else kind(pattern[:size])
    crossing = cross(thing)
    assert crossing.value == thing
    assert type(crossing.value) is kind
    # Data that does not fit the message is copied once, into the block.
    if size >= INLINE_LIMIT:
        assert size <= crossing.copied <= size + 100
        assert crossing.message < 200
    elif size <= OUT_OF_BAND:
        assert crossing.copied == 0


def test_a_large_stream_of_small_things_goes_through_the_block(cross):
    numbers = list(range(200_000))
    crossing = cross(numbers)
    assert crossing.value == numbers
    assert crossing.copied > 400_000
    assert crossing.message < 200


def test_a_large_dict_of_strings_goes_through_the_block(cross):
    words = {f"key {number}": f"value {number}" * 3 for number in range(20_000)}
    crossing = cross(words)
    assert crossing.value == words
    assert crossing.message < 200


def test_an_integer_of_many_digits_goes_through_the_block(cross):
    number = 7**100_000
    crossing = cross(number)
    assert crossing.value == number
    assert crossing.copied > 30_000


def test_an_object_that_occurs_twice_is_one_object_at_the_other_end(cross):
    one = ["x" * 30_000]
    loop = [one, one]
    loop.append(loop)
    value = cross(loop).value
    assert value[0] is value[1]
    assert value[2] is value
    assert value[0] == one


def test_functions_made_on_the_spot_and_closures_come_back(cross):
    offset = 3
    assert cross(lambda x: x + offset).value(4) == 7


def test_classes_made_on_the_spot_come_back(cross):
    class Local:
        def answer(self):
            return 42

    assert cross(Local()).value.answer() == 42


def test_a_pickle_buffer_crosses_out_of_band(cross):
    crossing = cross([pickle.PickleBuffer(bytearray(b"ab" * OUT_OF_BAND))])
    assert bytes(crossing.value[0]) == b"ab" * OUT_OF_BAND
    assert crossing.copied == 2 * OUT_OF_BAND


# -- regions --------------------------------------------------------------------------


def test_a_region_crosses_as_a_descriptor_and_is_the_same_region(cross):
    with anonymous_shared_memory(2**20) as region:
        crossing = cross({"region": region, "twice": [region]})
        assert crossing.value["region"] is region
        assert crossing.value["twice"][0] is region
        assert (crossing.copied, crossing.shared, crossing.fds) == (0, 2**20, 1)
        del crossing


def test_a_part_of_an_object_crosses_with_its_offset_and_mode(cross):
    with anonymous_shared_memory(3 * 4096) as whole, MappedRegion(whole, "read_only", offset=5000, size=99) as part:
        whole.buf[5000:5003] = b"abc"
        crossing = cross(part)
        assert (crossing.value.offset, crossing.value.size, crossing.value.mode) == (5000, 99, "read_only")
        assert bytes(crossing.value.buf[:3]) == b"abc"
        assert crossing.value.buf.readonly
        del crossing


@pytest.mark.needs("written_pages")
@pytest.mark.needs("pagemap")
def test_a_copy_on_write_region_in_which_nothing_was_written_crosses_as_a_descriptor(cross):
    with anonymous_shared_memory(2**20) as whole, MappedRegion(whole, "copy_on_write", 5000, 2**19) as private:
        whole.buf[5000:5003] = b"abc"
        assert private.buf[0] == ord("a")
        crossing = cross([private, private])
        arrived, again = crossing.value
        assert (crossing.copied, crossing.fds) == (0, 1)
        assert again is arrived is not private
        assert (arrived.offset, arrived.size, arrived.mode) == (5000, 2**19, "copy_on_write")
        whole.buf[5000] = ord("d")  # the receiver sees others' writes, as the sender does
        assert bytes(arrived.buf[:3]) == b"dbc"
        arrived.buf[1] = 255
        assert bytes(whole.buf[5000:5003]) == bytes(private.buf[:3]) == b"dbc"
        del crossing, arrived, again


@pytest.mark.needs("written_pages")
@pytest.mark.needs("pagemap")
@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE], ids=in_pages)
def test_the_written_pages_of_a_copy_on_write_region_are_copied(cross, offset):
    size = 100 * PAGE
    with anonymous_shared_memory(size + PAGE) as whole, MappedRegion(whole, "copy_on_write", offset, size) as private:
        whole.buf[:] = b"w" * (size + PAGE)
        for position in (0, 5 * PAGE, 6 * PAGE, size - 1):
            private.buf[position] = ord("p")
        mine = bytes(private.buf)
        crossing = cross(private)
        assert bytes(crossing.value.buf) == mine
        assert crossing.copied <= 5 * PAGE
        assert bytes(whole.buf) == b"w" * (size + PAGE)
        whole.buf[offset + 50 * PAGE] = whole.buf[offset] = ord(
            "n"
        )  # of a page that was not written, and of one that was
        assert (crossing.value.buf[50 * PAGE], crossing.value.buf[0]) == (ord("n"), ord("p"))
        assert (private.buf[50 * PAGE], private.buf[0]) == (ord("n"), ord("p"))
        crossing.value.buf[5 * PAGE] = 0
        assert private.buf[5 * PAGE] == ord("p")
        del crossing


def test_a_copy_on_write_region_that_was_written_all_over_crosses(cross):
    with anonymous_shared_memory(2**20) as whole, MappedRegion(whole, "copy_on_write") as private:
        private.buf[:] = bytes(range(256)) * 4096
        crossing = cross({"private": private})
        assert bytes(crossing.value["private"].buf) == bytes(private.buf)
        assert crossing.copied == 2**20
        del crossing


def test_without_knowledge_of_written_pages_everything_is_copied(cross, monkeypatch):
    def no_proc(address, size):
        raise FileNotFoundError

    with anonymous_shared_memory(3 * PAGE) as whole, MappedRegion(whole, "copy_on_write", 7) as private:
        whole.buf[:] = b"w" * (3 * PAGE)
        private.buf[-1] = 1
        monkeypatch.setattr(kernel, "own_pages", no_proc)
        crossing = cross(private)
        assert bytes(crossing.value.buf) == bytes(private.buf)
        del crossing


def test_each_of_many_receivers_has_its_own_copy_on_write_region(received_twice):
    with anonymous_shared_memory(64 * PAGE) as whole, MappedRegion(whole, "copy_on_write") as private:
        private.buf[: 32 * PAGE] = b"p" * (32 * PAGE)
        first, second = received_twice(private)
        first.buf[0] = first.buf[-1] = 1
        assert bytes(second.buf) == bytes(private.buf)
        del first, second


def test_a_closed_region_cannot_be_sent():
    region = anonymous_shared_memory(4096)
    region.close()
    with pytest.raises(ValueError, match="closed in this process"):
        pack(region)


def test_a_region_stays_open_while_a_payload_refers_to_the_region():
    region = anonymous_shared_memory(4096)
    region.buf[:3] = b"abc"
    payload = pack(region)
    del region
    gc.collect()
    fds = [kernel.duplicate(fd) for fd in payload.fds]
    payload.close()
    incoming, _ = receive(payload.data, 0, fds)
    region = incoming.open()
    assert bytes(region.buf[:3]) == b"abc"
    del incoming
    region.close()


# -- payloads in a row -----------------------------------------------------------------


def test_payloads_in_one_message_take_their_fds_in_order():
    with anonymous_shared_memory(4096) as region:
        things = [1, region, b"x" * 100_000, [region, bytearray(200_000)], "end"]
        payloads = [pack(thing) for thing in things]
        data = b"".join(payload.data for payload in payloads)
        fds = [kernel.duplicate(fd) for payload in payloads for fd in payload.fds]
        for payload in payloads:
            payload.close()
        position = 0
        for thing in things:
            incoming, position = receive(data, position, fds)
            assert incoming.open() == thing
            del incoming
        assert (position, fds) == (len(data), [])


def test_a_payload_that_is_skipped_has_its_fds_closed():
    payload, after = pack(b"x" * 100_000), pack("after")
    fds = [kernel.duplicate(fd) for fd in payload.fds]
    payload.close()
    assert arena.statistics().blocks
    data = payload.data + after.data
    position = skip(data, 0, fds)
    assert fds == []
    assert receive(data, position, fds)[0].open() == "after"


def test_a_plain_payload_is_opened_in_the_short_way_and_no_other():
    assert open_plain(b"??" + pack([1, 2]).data, 2) == [1, 2]
    payload = pack(b"x" * 100_000)
    with pytest.raises(LookupError):
        open_plain(payload.data, 0)
    payload.close()


def test_a_payload_can_be_received_any_number_of_times():
    payload = pack(bytearray(100_000), for_many=True)
    for _ in range(3):
        incoming, _ = receive(payload.data, 0, [kernel.duplicate(fd) for fd in payload.fds])
        assert incoming.open() == bytearray(100_000)
    payload.close()
    payload.close()


# -- errors -----------------------------------------------------------------------------


def test_an_exception_while_pickling_leaves_no_block():
    before = arena.statistics().blocks
    with pytest.raises(ZeroDivisionError, match="not today"):
        pack([b"x" * 2**20, pickle.PickleBuffer(bytearray(2**20)), RefusesToBePickled()])
    assert arena.statistics().blocks == before


def test_an_unpicklable_object_leaves_no_block():
    with pytest.raises((TypeError, pickle.PicklingError), match="pickle"):
        pack([pickle.PickleBuffer(bytearray(2**20)), threading.Lock()])
    assert arena.statistics().blocks == 0


def test_an_exception_while_unpickling_leaves_no_block(cross):
    with pytest.raises(ZeroDivisionError):
        cross([pickle.PickleBuffer(bytearray(2**20)), FailsToBeMade()])
    assert arena.statistics().blocks == 0


def test_a_payload_that_is_never_opened_gives_its_block_back():
    payload = pack(b"x" * 2**20)
    incoming, _ = receive(payload.data, 0, [kernel.duplicate(fd) for fd in payload.fds])
    payload.close()
    assert arena.statistics().blocks == 1
    del incoming
    assert arena.statistics().blocks == 0


@pytest.mark.needs("fd_limit")
def test_fds_that_did_not_arrive_are_said_with_the_remedy():
    payload = pack(b"x" * 2**20)
    with pytest.raises(RegionGoneError, match=r"named 1 memory objects and only 0 arrived.*ulimit -n"):
        receive(payload.data, 0, [])
    payload.close()


def test_memory_that_is_smaller_than_the_payload_says_is_refused_and_nothing_stays_open():
    with anonymous_shared_memory(3 * 4096) as region, anonymous_shared_memory(4096) as small:
        payload = pack(region)
        with pytest.raises(RegionGoneError, match="the object has only 4,096 bytes"):
            receive(payload.data, 0, [kernel.duplicate(small.fileno())])
        payload.close()


def test_a_lease_in_the_place_of_a_region_and_the_reverse_leave_nothing_open():
    from forkshm.region.blocks._segment import forget_abandoned

    with anonymous_shared_memory(4096) as region:
        block, descriptor = pack(b"x" * 2**20), pack(region)
        with pytest.raises(RegionGoneError):
            receive(block.data, 0, [kernel.duplicate(region.fileno())])
        incoming, _ = receive(descriptor.data, 0, [kernel.duplicate(fd) for fd in block.fds])
        del incoming
        block.close()
        descriptor.close()
        forget_abandoned()


@pytest.mark.parametrize("thing", [1, b"x" * 100_000, "r"])
def test_a_payload_cut_anywhere_is_refused_and_its_fds_are_closed(thing):
    with anonymous_shared_memory(4096) as region:
        payload = pack([region, b"x" * 100] if thing == "r" else thing)
        for length in range(len(payload.data)):
            fds = [kernel.duplicate(fd) for fd in payload.fds]
            with pytest.raises(ChannelBrokenError):
                receive(payload.data[:length], 0, fds)
            for fd in fds:  # fds that the payload did not take remain the caller's
                kernel.close(fd)
        payload.close()


# -- the registry ---------------------------------------------------------------------


class Celsius:
    def __init__(self, degrees):
        self.degrees = degrees


class Warmer(Celsius):
    pass


def test_a_type_can_be_given_a_way_of_its_own(cross, monkeypatch):
    monkeypatch.setattr(_reducers, "_reducers", dict(_reducers._reducers))
    register(Celsius, lambda thing: (Celsius, (thing.degrees + 1,)))
    assert cross([Celsius(20)]).value[0].degrees == 21
    assert cross(Warmer(20)).value.degrees == 20  # of exactly this type


def test_a_reducer_may_leave_an_object_to_pickle(cross, monkeypatch):
    monkeypatch.setattr(_reducers, "_reducers", dict(_reducers._reducers))
    register(Celsius, lambda thing: NotImplemented)
    assert cross(Celsius(20)).value.degrees == 20


# -- methods --------------------------------------------------------------------------


def decorated(function):
    def decorator(*args):
        return "decorated", function(*args)

    return decorator


class Base:
    def run(self):
        return "run of Base", self.degrees

    def private(self):
        return self.__private

    def __private(self):
        return "private", self.degrees

    @classmethod
    def made(cls):
        return cls.__name__


class Derived(Base):
    def __init__(self, degrees):
        self.degrees = degrees

    def run(self):
        return "run of Derived", self.degrees

    def inherited(self):
        return super().run

    @decorated
    def warm(self):
        return self.degrees

    @classmethod
    def made(cls):
        return "wrong"

    @classmethod
    def inherited_made(cls):
        return super().made


def free(self):
    return "free", self.degrees


class Answering:
    """Has every attribute."""

    degrees = 5

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ZeroDivisionError


METHODS = {
    "ordinary": lambda: Derived(5).run,
    "of super": lambda: Derived(5).inherited(),
    "private": lambda: Derived(5).private(),
    "decorated": lambda: Derived(5).warm,
    "bound by hand": lambda: types.MethodType(free, Derived(5)),
    "bound to an object that raises": lambda: types.MethodType(free, Answering()),
    "class method": lambda: Derived.made,
    "class method of super": Derived.inherited_made,
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_bound_method_arrives_as_that_method(cross, kind):
    method = METHODS[kind]()
    assert cross([method]).value[0]() == method()


def test_an_ordinary_method_is_sent_by_name(cross):
    assert cross(Derived(5).run).message < cross(Derived(5).inherited()).message


def test_a_method_that_its_object_refers_to_arrives_once(cross):
    derived = Derived(5)
    derived.first, derived.second = derived.run, derived.inherited()
    arrived = cross(derived).value
    assert arrived.first.__self__ is arrived.second.__self__ is arrived
    assert arrived.second() == ("run of Base", 5)


def test_a_partial_function_arrives_with_its_attributes(cross):
    partial = functools.partial(free, Celsius(5))
    partial.name = "five"
    arrived = cross(partial).value
    assert (arrived(), arrived.name) == (("free", 5), "five")
