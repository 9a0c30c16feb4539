"""Keeping part of a message does not keep much more memory than that part."""

from __future__ import annotations

import gc

import pytest
from consuming import receive

import forkshm
from forkshm.backend import IS_FREE_THREADED, kernel
from forkshm.pickler import pack
from forkshm.pickler._policy import MAY_HOLD, MAY_HOLD_TIMES, MOST_BLOCKS
from forkshm.region.blocks._arena import arena

np = pytest.importorskip("numpy")

MIB = 2**20
# Blocks are rounded up to this.
ROUNDING = 1.25


def held():
    """Return the bytes of the arena that are held."""
    gc.collect()
    return arena.statistics().used_bytes


def arrays(count, nbytes):
    return [np.full(nbytes, number % 250, np.uint8) for number in range(count)]


MESSAGES = {
    "100 of 1 MiB": lambda: arrays(100, MIB),
    "100 of 100 kB": lambda: arrays(100, 100_000),
    "1,000 of 20 kB": lambda: arrays(1000, 20_000),
    "5,000 of 1 kB": lambda: arrays(5000, 1000),
    "5,000 of 1 kB, in objects": lambda: [{"a": a, "b": {1}} for a in arrays(5000, 1000)],
    "of all sizes": lambda: [np.full(2**k + 5, k, np.uint8) for k in range(24)],
    "with a long text": lambda: [*arrays(30, 20_000), "x" * 20 * MIB],
    "with many words": lambda: [arrays(3, 20_000)[0], [str(n) for n in range(500_000)]],
    "a dict": lambda: dict(enumerate(arrays(100, 200_000))),
}


def in_it(message):
    if isinstance(message, np.ndarray):
        yield message
    elif isinstance(message, (list, tuple)):
        for part in message:
            yield from in_it(part)
    elif isinstance(message, dict):
        for part in message.values():
            yield from in_it(part)


@pytest.mark.parametrize("for_many", [False, True], ids=["for one", "for many"])
@pytest.mark.parametrize("name", MESSAGES)
def test_each_of_many_arrays_holds_little_more_than_itself(cross, name, for_many):
    sent = MESSAGES[name]()
    before = held()
    mine = list(in_it(sent))
    everything = sum(array.nbytes for array in mine)
    for index in {0, len(mine) // 10, len(mine) // 2, len(mine) - 1}:
        arrived = list(in_it(cross(sent, for_many=for_many).value))
        if not index:
            assert all((one == other).all() and other.flags.writeable for one, other in zip(mine, arrived, strict=True))
        kept = arrived[index]
        del arrived
        assert (kept == mine[index]).all()
        # A thousand buffers share larger blocks than usual.
        bound = max(MAY_HOLD_TIMES * kept.nbytes, MAY_HOLD, everything / MOST_BLOCKS + kept.nbytes)
        assert held() - before <= bound * ROUNDING
    del kept
    assert held() == before


def test_half_of_a_read_only_array_may_be_kept(cross):
    sent = [forkshm.view(arrays(40, 100_000), "read_only"), arrays(40, 100_000)]
    before = held()
    value = cross(sent).value
    assert [array.flags.writeable for array in in_it(value)] == [False] * 40 + [True] * 40
    with pytest.raises(ValueError, match="WRITEABLE"):
        value[0][0].flags.writeable = True
    first = value[0][0]
    del value
    assert held() - before <= MAY_HOLD * ROUNDING
    assert (first == 0).all()


def test_views_of_one_array_stay_views_when_some_are_read_only(cross):
    a = np.zeros(100_000, np.uint8)
    b = np.ones(100_000, np.uint8)
    reading, writing, other = cross([forkshm.view(a[:60_000], "read_only"), a, b]).value
    assert not reading.flags.writeable
    writing[:] = 7
    assert reading[5] == 7
    assert other[0] == 1


def test_where_no_more_fds_are_to_be_had_all_goes_into_one_block(cross, monkeypatch):
    lend = type(arena).lend
    lent = []

    def scarce(self, block, beside=()):
        lent.append(block)
        if len(lent) == 3:
            self.free(block)
            raise OSError(24, "too many open files")
        return lend(self, block, beside)

    sent = arrays(100, 100_000)
    monkeypatch.setattr(type(arena), "lend", scarce)
    crossing = cross(sent)
    assert crossing.fds == 1
    assert len(lent) == 4
    for mine, theirs in zip(sent, crossing.value, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    del crossing, theirs
    assert held() == 0


@pytest.mark.needs("carving")
@pytest.mark.needs("locks_as_leases")
def test_the_blocks_of_a_message_share_an_fd(cross):
    crossing = cross(arrays(100, 100_000))
    assert crossing.fds == 1
    handed_on = cross(crossing.value)
    assert (handed_on.copied, handed_on.fds) == (0, 1)
    del crossing, handed_on
    assert held() == 0


@pytest.mark.needs("carving")
@pytest.mark.needs("locks_as_leases")
def test_a_parked_message_gets_back_the_fd_of_its_blocks(cross):
    payload = pack(arrays(40, 100_000))
    before = held()
    payload.park()
    assert forkshm.region.blocks._lease.leases_open() == 0
    assert held() == before
    payload.unpark()
    assert forkshm.region.blocks._lease.leases_open() == 1
    value = receive(payload.data, 0, [kernel.duplicate(fd) for fd in payload.fds])[0].open()
    payload.close()
    assert held() == before
    assert [array[0] for array in value] == list(range(40))
    del value
    assert held() == 0


def test_an_error_amid_the_blocks_leaves_none(monkeypatch):
    allocate = type(arena).allocate
    made = []

    def scarce(self, nbytes):
        made.append(nbytes)
        if len(made) == 5:
            raise OSError(12, "no memory")
        return allocate(self, nbytes)

    monkeypatch.setattr(type(arena), "allocate", scarce)
    with pytest.raises(OSError, match="no memory"):
        pack(arrays(100, 100_000))
    monkeypatch.undo()
    assert held() == 0
    assert forkshm.region.blocks._lease.leases_open() == 0


# -- sending on -----------------------------------------------------------------------


def received(thing):
    payload = pack(thing)
    fds = [kernel.duplicate(fd) for fd in payload.fds]
    payload.close()
    return receive(payload.data, 0, fds)[0].open()


HANDED_ON = {
    "all": (lambda x: x, True),
    "a half": (lambda x: x[: x.size // 2], True),
    "two ends": (lambda x: (x[: x.size // 5], x[-x.size // 5 :]), True),
    "a little": (lambda x: x[:5000], False),
    "a little, and all": (lambda x: (x[:5000], x), True),
    "every other": (lambda x: x[::2], True),
    "some little": (lambda x: [x[k * 10_000 : k * 10_000 + 5000] for k in range(5)], False),
    "a column": (lambda x: x.reshape(-1, 100)[:, 3], False),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_a_small_part_of_a_received_copy_is_copied_and_most_of_it_is_not(cross, name):
    view, is_handed_on = HANDED_ON[name]
    sent = received(np.arange(2_500_000.0))
    crossing = cross(view(sent))
    assert (crossing.shared > 0) is is_handed_on
    assert (crossing.copied == 0) is is_handed_on
    for mine, theirs in zip(in_it(view(sent)), in_it(crossing.value), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    del sent, mine, theirs
    kept = next(in_it(crossing.value)).nbytes
    del crossing
    assert held() == 0
    assert kept


@pytest.mark.parametrize("what", ["array", "table"])
def test_a_slice_of_an_arrow_object_over_a_received_copy_is_copied(cross, what):
    pa = pytest.importorskip("pyarrow")
    sent = received(np.arange(2_500_000.0))
    column = pa.array(sent)[5:105]
    crossing = cross(column if what == "array" else pa.table({"column": column}))
    value = crossing.value if what == "array" else crossing.value["column"]
    assert value.to_pylist() == list(range(5, 105))
    del sent, column
    assert crossing.shared == 0
    assert held() == 0
    assert value.to_pylist()[0] == 5


@pytest.mark.skipif(IS_FREE_THREADED, reason="needs the hook into the allocations of NumPy, which needs the GIL")
def test_a_little_of_an_array_of_shared_allocations_is_still_shared(cross):
    with forkshm.shared_allocations():
        born = np.zeros(2_500_000)
    crossing = cross(born[:5000])
    assert crossing.copied == 0
    born[7] = 3
    assert crossing.value[7] == 3
    del crossing, born


def head(x):
    return x[:5000]


def make_and_cut():
    return np.ones(2_500_000)[:5000]


def one_of_many(xs):
    return xs


@pytest.mark.parametrize("born_shared", [False, True])
def test_kept_results_hold_little(born_shared):
    if born_shared:
        try:
            forkshm.shared_allocations()
        except forkshm.UnsupportedError as error:
            pytest.skip(str(error))
    big = np.ones(2_500_000)
    with forkshm.Pool(1, born_shared=born_shared) as pool:
        kept = [pool.apply(head, (big,)) for _ in range(20)] + [pool.apply(make_and_cut) for _ in range(20)]
        kept += [pool.apply(one_of_many, (arrays(100, 100_000),))[0] for _ in range(5)]
        kept += [pool.apply(dict, ({"a": big, "b": big[:3000]},))["b"] for _ in range(1)]
        gc.collect()
        assert sum(claim.size for claim in forkshm.region.blocks._claim.claims.values()) < 40 * MIB
    queue = forkshm.Queue()
    queue.put({"a": arrays(100, 100_000)})
    first = queue.get()["a"][0]
    gc.collect()
    assert first[0] == 0
    assert held() <= 45 * MIB
