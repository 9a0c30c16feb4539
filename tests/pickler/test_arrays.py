"""Arrays: private elements are copied once, and shared ones never."""

from __future__ import annotations

import gc
import os
import tempfile
import warnings

import pytest
from room import needs_fds

import forkshm
from forkshm.channel import Kind, pair, read_message, write_message
from forkshm.pickler import pack
from forkshm.pickler._policy import OUT_OF_BAND
from forkshm.region.blocks._arena import arena

np = pytest.importorskip("numpy")

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # before NumPy 2
    from numpy import byte_bounds

MIB = 2**20


def numbers(shape=(200, 300), dtype=float):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def of_a_file():
    with tempfile.TemporaryFile() as file:
        file.write(numbers().tobytes())
        file.flush()
        return np.asarray(np.memmap(file, float, "r"))


def in_fortran_order():
    return np.asfortranarray(numbers())


def read_only():
    made = numbers()
    made.flags.writeable = False
    return made


def structured():
    made = np.zeros(3000, [("x", "f8"), ("name", "U5"), ("at", "i4", (2,))])
    made["x"] = np.arange(3000)
    made["name"] = "abc"
    made["at"] = [[1, 2]]
    return made


PRIVATE = {
    "contiguous": numbers,
    "columns": in_fortran_order,
    "transposed": lambda: numbers().T,
    "strided": lambda: numbers((400, 300))[::3, 1::2],
    "reversed": lambda: numbers()[::-1],
    "reversed in both": lambda: numbers()[::-1, ::-1],
    "three axes, permuted": lambda: numbers((20, 30, 40)).transpose(2, 0, 1),
    "broadcast": lambda: np.broadcast_to(numbers((1, 3000)), (50, 3000)),
    "read-only": read_only,
    "no elements": lambda: np.empty((0, 3)),
    "no elements, strided": lambda: numbers()[::-1][:0],
    "one element, no axes": lambda: np.array(3.5),
    "small": lambda: numbers((2, 3)),
    "small and strided": lambda: numbers((20, 30))[::2, ::-1],
    "structured": structured,
    "structured, strided": lambda: structured()[::2],
    "big-endian": lambda: numbers().astype(">f8"),
    "complex": lambda: numbers() * 1j,
    "bool": lambda: numbers() % 2 == 0,
    "text": lambda: numbers().astype("U8"),
    "raw bytes": lambda: numbers().astype("S8"),
    "durations, strided": lambda: numbers().astype("m8[s]")[::2, ::-1],
    "dates in columns": lambda: in_fortran_order().astype("M8[s]"),
    "structures with dates": lambda: np.zeros(3000, [("at", "M8[s]"), ("x", "f4")]),
    "items of no bytes": lambda: np.zeros(30_000, "V0"),
    "dates": lambda: np.arange("2000-01-01", "2100-01-01", dtype="datetime64[D]"),
    "objects": lambda: np.array([1, "two", [3]], dtype=object),
    "at the threshold": lambda: np.ones(OUT_OF_BAND, np.uint8),
    "below the threshold": lambda: np.ones(OUT_OF_BAND - 1, np.uint8),
}


@pytest.fixture(params=PRIVATE)
def private(request):
    return PRIVATE[request.param]()


def test_an_array_comes_back_with_its_elements_shape_and_type(cross, private):
    value = cross(private).value
    assert type(value) is np.ndarray
    assert (value.shape, value.dtype) == (private.shape, private.dtype)
    np.testing.assert_array_equal(value, private)


def test_a_large_array_is_copied_exactly_once_and_its_stream_travels_in_the_message(cross, private):
    crossing = cross(private)
    if private.dtype.hasobject or private.nbytes < OUT_OF_BAND:
        assert (crossing.copied, crossing.fds) == (0, 0)
    else:
        assert (crossing.copied, crossing.fds) == (spanned(private), 1)
    assert crossing.shared == 0


def spanned(array):
    """Sent bytes are those of the elements, including small gaps between them."""
    span = np.ptp(byte_bounds(array))
    return span if span <= 2 * array.nbytes else array.nbytes


def test_only_the_memory_of_a_view_is_sent_and_once(cross):
    row = np.arange(1000.0)
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(20_000.0), 1000)
    for sent, bytes_seen in (
        (np.broadcast_to(row[None], (5000, 1000)), 0),  # in the message
        (np.broadcast_to(np.arange(3000.0)[:, None], (3000, 500)), 24_000),
        (np.broadcast_to(5, (300, 700)), 0),
        (windows, 160_000),
        (windows[::7, ::-1], 160_000),
        (np.broadcast_to(np.arange(900_000.0)[::100], (50, 9000)), 72_000),
        (np.broadcast_to(windows, (1, *windows.shape)), 160_000),
    ):
        crossing = cross(sent)
        assert crossing.copied <= bytes_seen
        np.testing.assert_array_equal(crossing.value, sent)


def test_a_broadcast_array_that_is_too_large_stays_broadcast_and_read_only(cross):
    value = cross(np.broadcast_to(np.arange(1000.0), (10_000_000, 1000))).value
    assert value.shape == (10_000_000, 1000)
    assert value[5_000_000, 7] == 7
    assert not value.flags.writeable


def test_broadcast_shared_memory_is_still_shared(cross):
    a = forkshm.zeros(3000)
    value = cross(np.broadcast_to(a, (50, 3000))).value
    a[5] = 3
    assert value[49, 5] == 3


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_an_array_by_value_arrives_writable_and_private(cross, name):
    sent = PRIVATE[name]()
    before = sent.copy()
    value = cross(sent).value
    assert value.flags.writeable
    if value.nbytes:
        value[...] = np.zeros((), value.dtype)
    np.testing.assert_array_equal(sent, before)


FOR_READING = {
    "every other": lambda: numbers()[::2],
    "of bytes": lambda: np.frombuffer(bytes(80_000)),
    "of few bytes": lambda: np.frombuffer(bytes(80)),
    "a field": lambda: structured()["x"],
    "structures": structured,
    "structures in columns": lambda: np.asfortranarray(structured()[:2500].reshape(50, 50)),
    "sliding windows": lambda: np.lib.stride_tricks.sliding_window_view(np.arange(5000.0), 30),
    "broadcast": lambda: np.broadcast_to(np.arange(3000.0), (20, 3000)),
    "broadcast, of a view": lambda: np.broadcast_to(np.arange(9000.0)[::3], (20, 3000)),
    "dates": lambda: np.arange("2000-01-01", "2100-01-01", dtype="datetime64[D]"),
    "big-endian": lambda: numbers().astype(">f8"),
    "far apart": lambda: np.arange(500_000.0)[::100],
    "small": lambda: numbers((2, 3)),
    "text": lambda: numbers().astype("U8"),
    "no elements": lambda: np.empty((0, 3)),
    "objects": lambda: np.array([1, "two"], object),
    "of a file": of_a_file,
    "of a pandas series": lambda: pytest.importorskip("pandas").Series(np.arange(100_000.0)).to_numpy(),
    "of an Arrow array": lambda: pytest.importorskip("pyarrow").array(np.arange(100_000.0)).to_numpy(),
    "all": numbers,
}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("name", FOR_READING)
def test_a_copy_is_writable_whether_or_not_the_array_is(cross, name, together):
    sent = FOR_READING[name]()
    sent.flags.writeable = False
    before = sent.copy()
    value = cross([sent, "x", np.arange(3)] if together else sent).value
    value = value[0] if together else value
    assert type(value) is np.ndarray
    assert value.flags.writeable
    np.testing.assert_array_equal(value, before)
    if name != "objects" and value.size:
        value[(0,) * value.ndim] = value[(-1,) * value.ndim]
        rest = value.reshape(-1)[1:]
        np.testing.assert_array_equal(rest, before.reshape(-1)[1:])  # no other element was changed
    np.testing.assert_array_equal(sent, before)


def writable_file(count):
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, "i8", "w+", shape=(count,))


@pytest.mark.parametrize("make", [np.arange, writable_file, forkshm.zeros])
@pytest.mark.parametrize("count", [4, 3000])
def test_arrays_that_numpy_broadcast_cross_without_a_warning(cross, make, count):
    sent = np.broadcast_arrays(make(count), np.ones((50, 1)), np.ones((50, count)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy warns if flags.writeable is read
        value = cross(sent).value
    for mine, there in zip(sent, value, strict=True):
        np.testing.assert_array_equal(mine, there)
        there[1, 1] = 5


def test_shared_memory_that_is_for_reading_here_is_for_reading_there(cross):
    for make in (forkshm.ones(3000), forkshm.ones((50, 60))[:, 1:30], np.asarray(forkshm.ones(5))):
        make.flags.writeable = False
        assert not cross(make).value.flags.writeable


def test_a_read_only_array_by_value_arrives_writable():
    def centre(values):
        values -= values.mean()
        return values

    with forkshm.Pool(1) as pool:
        queue = forkshm.Queue()
        for sent in (read_only(), np.frombuffer(numbers().tobytes()).reshape(200, 300)):
            (result,) = pool.map(centre, [sent])
            np.testing.assert_allclose(result, numbers() - numbers().mean())
            assert result.flags.writeable
            queue.put(sent)
            assert queue.get().flags.writeable


def test_the_order_of_a_contiguous_array_is_kept(cross):
    assert cross(in_fortran_order()).value.flags.f_contiguous
    assert cross(numbers()).value.flags.c_contiguous


def test_buffers_in_a_block_are_aligned(cross):
    value = cross([np.ones(OUT_OF_BAND + extra, np.uint8) for extra in (0, 1, 63, 64, 65)]).value
    assert [array.ctypes.data % 64 for array in value] == [0] * 5


def test_many_arrays_of_one_object_share_one_block(cross):
    sent = {number: np.full(20_000 + number, number, np.uint8) for number in range(50)}
    crossing = cross(sent)
    assert crossing.fds == 1
    assert crossing.copied == sum(array.nbytes for array in sent.values())
    for number, array in crossing.value.items():
        np.testing.assert_array_equal(array, sent[number])


def test_an_array_that_occurs_twice_is_copied_once_and_is_one_array(cross):
    sent = numbers()
    crossing = cross([sent, sent])
    assert crossing.copied == sent.nbytes
    assert crossing.value[0] is crossing.value[1]


def test_arrays_beside_a_large_stream_come_back(cross):
    sent = [numbers(), list(range(50_000)), numbers()[::-1], "x" * 100_000]
    value = cross(sent).value
    np.testing.assert_array_equal(value[0], sent[0])
    np.testing.assert_array_equal(value[2], sent[2])
    assert (value[1], value[3]) == (sent[1], sent[3])


def test_the_block_is_free_when_its_last_array_is_gone(cross):
    crossing = cross([numbers(), numbers()])
    kept = crossing.value[1][3:5]
    del crossing
    gc.collect()
    assert arena.statistics().blocks == 1
    np.testing.assert_array_equal(kept, numbers()[3:5])
    del kept
    assert arena.statistics().blocks == 0


@pytest.mark.parametrize("make", [numbers, lambda: numbers()[::-1], lambda: [bytearray(MIB), numbers()][1]])
def test_receivers_of_the_same_payload_do_not_see_each_others_writes(received_twice, make):
    sent = make()
    first, second = received_twice(sent)
    assert first.flags.writeable
    first[...] = -1
    np.testing.assert_array_equal(second, make())
    np.testing.assert_array_equal(sent, make())


def test_a_closure_over_a_private_array_takes_one_copy(cross):
    captured = numbers()
    crossing = cross(lambda: captured.sum())
    assert captured.nbytes <= crossing.copied <= captured.nbytes + 100
    assert crossing.value() == captured.sum()


def test_a_subclass_of_ours_keeps_its_type(cross):
    value = cross(np.ma.masked_array(numbers(), mask=numbers() % 2 == 0)).value
    assert isinstance(value, np.ma.MaskedArray)
    assert value.sum() == numbers()[numbers() % 2 == 1].sum()


def test_a_data_frame_comes_back(cross):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "number": np.arange(20_000),
            "half": np.arange(20_000) / 2,
            "name": [f"row {number % 7}" for number in range(20_000)],
            "day": pandas.date_range("2000-01-01", periods=20_000, freq="h"),
            "kind": pandas.Categorical(["a", "b"] * 10_000),
        }
    )
    value = cross(frame).value
    pandas.testing.assert_frame_equal(value, frame)
    value.loc[0, "number"] = -1
    assert frame.loc[0, "number"] == 0


# -- shared ---------------------------------------------------------------------------

VIEWS = {
    "itself": lambda a: a,
    "a plain view": np.asarray,
    "a slice": lambda a: a[3:7],
    "a step": lambda a: a[1::3, ::2],
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[::-1],
    "reversed in both": lambda a: a[::-1, ::-1],
    "reversed, plain": lambda a: np.asarray(a)[:, ::-1],
    "a column": lambda a: a[:, 5],
    "one element": lambda a: a[2:3, 2:3],
    "reshaped": lambda a: a.reshape(-1),
    "as other type": lambda a: a.view(np.uint8),
    "a new axis": lambda a: a[None, :, None],
    "broadcast": lambda a: np.broadcast_to(np.asarray(a)[:, :1], (100, 200)),
}


def make_shared():
    return forkshm.array(numbers((100, 200)))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_shared_memory_crosses_without_a_copy(cross, name):
    shared = make_shared()
    view = VIEWS[name](shared)
    crossing = cross([view])
    value = crossing.value[0]
    assert (crossing.copied, crossing.fds) == (0, 1)
    assert crossing.shared > 0
    assert type(value) is type(view)
    assert (value.shape, value.strides, value.dtype) == (view.shape, view.strides, view.dtype)
    assert value.ctypes.data == view.ctypes.data
    np.testing.assert_array_equal(value, view)


@pytest.mark.parametrize("name", sorted(set(VIEWS) - {"broadcast"}))
def test_writes_to_a_view_of_shared_memory_are_seen_in_both_directions(cross, name):
    shared = make_shared()
    view = VIEWS[name](shared)
    value = cross(view).value
    value[...] = 7
    assert (np.asarray(view) == 7).all()
    view[...] = 9
    assert (np.asarray(value) == 9).all()


def test_a_read_only_view_of_shared_memory_stays_read_only(cross):
    shared = make_shared()
    for view in (np.asarray(shared), shared[::2], shared[::-1, ::-1]):
        view.flags.writeable = False
        crossing = cross(view)
        assert crossing.copied == 0
        assert not crossing.value.flags.writeable
    shared[0, 0] = 5


def test_views_of_the_same_memory_stay_views_of_the_same_memory(cross):
    shared = make_shared()
    crossing = cross([shared, shared[2:], shared.T, np.asarray(shared)[::-1]])
    whole, rows, columns, backwards = crossing.value
    assert (crossing.copied, crossing.fds) == (0, 1)
    whole[2, 3] = -5
    assert rows[0, 3] == columns[3, 2] == backwards[97, 3] == -5


def test_shared_and_private_memory_in_one_object_each_go_their_way(cross):
    shared = make_shared()
    private = numbers()
    crossing = cross({"shared": shared, "private": private, "part": [shared[0]]})
    assert (crossing.copied, crossing.fds) == (private.nbytes, 2)
    crossing.value["shared"][0, 0] = -1
    crossing.value["private"][0, 0] = -1
    assert (shared[0, 0], private[0, 0], crossing.value["part"][0][0]) == (-1, 0, -1)


def test_a_shared_array_for_many_is_shared_by_all_of_them(received_twice):
    shared = make_shared()
    first, second = received_twice(shared)
    first[0, 0] = -1
    assert second[0, 0] == shared[0, 0] == -1


def test_a_closure_over_a_shared_array_takes_no_copy(cross):
    shared = make_shared()
    crossing = cross(lambda: shared.sum())
    assert (crossing.copied, crossing.fds) == (0, 1)
    shared[...] = 1
    assert crossing.value() == shared.size


@pytest.mark.parametrize("kind", ["M8[D]", "m8[ns]", [("at", "M8[s]"), ("x", "f4")], "V7", "U3", ">i2", "f2", "c16"])
@pytest.mark.parametrize("view", [lambda a: a, np.asarray, lambda a: a[::-1], lambda a: a.T], ids=list("sprt"))
def test_shared_memory_of_every_type_crosses_without_a_copy(cross, kind, view):
    made = view(forkshm.zeros((30, 40), kind))
    crossing = cross(made)
    assert crossing.copied == 0
    assert type(crossing.value) is type(made)
    assert crossing.value.dtype == made.dtype
    assert crossing.value.strides == made.strides
    assert crossing.value.ctypes.data == made.ctypes.data


@pytest.mark.parametrize("count", [2, 253, 300])
def test_many_shared_arrays_cross_in_one_object(cross, count):
    needs_fds(2 * count)
    sent = [forkshm.full(3, number) for number in range(count)]
    crossing = cross(sent)
    assert (crossing.fds, crossing.copied) == (count, 0 if count < 300 else crossing.copied)
    for number, array in enumerate(crossing.value):
        assert array.ctypes.data == sent[number].ctypes.data
        assert array.tolist() == [number] * 3


def test_a_shared_array_without_elements_keeps_shape_and_type(cross):
    value = cross(forkshm.empty((0, 5), "i4")).value
    assert (value.shape, value.dtype) == ((0, 5), np.dtype("i4"))


def test_a_shared_array_of_structures_crosses_without_a_copy(cross):
    sent = forkshm.array(structured())
    crossing = cross(sent[::-1])
    assert crossing.copied == 0
    np.testing.assert_array_equal(np.asarray(crossing.value), structured()[::-1])


def test_an_array_over_a_region_is_recognised_by_its_address(cross):
    with forkshm.anonymous_shared_memory(8 * 1000) as region:
        array = np.ndarray((1000,), float, buffer=region.buf)
        crossing = cross(array)
        assert crossing.copied == 0
        crossing.value[3] = 4
        assert array[3] == 4
        del crossing, array


def test_an_array_over_a_copy_on_write_region_crosses_by_value(cross):
    with forkshm.anonymous_shared_memory(8 * 10_000) as region:
        with forkshm.MappedRegion(region, "copy_on_write") as private:
            array = np.ndarray((10_000,), float, buffer=private.buf)
            array[:] = 5
            for sent in (array, array[::-1]):
                crossing = cross(sent)
                assert crossing.copied == array.nbytes
                assert (crossing.value == 5).all()
            del array, sent, crossing


def test_an_array_over_a_read_only_region_arrives_read_only(cross):
    with forkshm.anonymous_shared_memory(8 * 1000) as region, forkshm.MappedRegion(region, "read_only") as reader:
        array = np.ndarray((1000,), float, buffer=reader.buf)
        for sent in (array, array[::-2]):
            crossing = cross(sent)
            assert crossing.copied == 0
            assert not crossing.value.flags.writeable
        del array, sent, crossing


def test_memory_that_a_child_made_is_shared_with_its_parent():
    """The receiver maps new memory: both see each other's writes."""
    there, here = pair()
    back, answer = pair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            made = forkshm.array(numbers((100, 200)))
            payload = pack([made, made.T[::-1]])
            there.send(*write_message(Kind.RESULT, 0, payload))
            payload.close()
            while True:
                try:
                    answer.receive_nowait()
                    break
                except BlockingIOError:
                    continue
            code = 0 if made[5, 6] == -1 and made[0, 199] == -2 else 2
        finally:
            os._exit(code)
    while True:
        try:
            received = here.receive_nowait()
            break
        except BlockingIOError:
            continue
    (incoming,) = read_message(received).payloads
    made, turned = incoming.open()
    del incoming
    assert isinstance(made, forkshm.SharedArray)
    assert made.region is turned.region
    np.testing.assert_array_equal(np.asarray(made), numbers((100, 200)))
    made[5, 6] = -1
    turned[0, 0] = -2
    back.send(b"look")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert made[5, 6] == -1  # the memory outlives its creator
    for end in (there, here, back, answer):
        end.close()


@pytest.mark.parametrize("kind", ["i2", "f8", "c16", "M8[s]", "U3"])
@pytest.mark.parametrize("rows", [5, 200, 5000])
def test_a_view_with_gaps_keeps_its_byte_order(rows, kind):
    column = np.arange(rows * 10).astype(kind).astype(np.dtype(kind).newbyteorder()).reshape(rows, 10)[:, 1]
    with forkshm.Pool(1) as pool:
        for arrived in (pool.apply(lambda x: x, (column,)), pool.apply(lambda x: x[0], ([column, 1],))):
            assert arrived.dtype == column.dtype
            assert np.array_equal(arrived, column)
            assert arrived.flags.writeable
