"""Memory mapped from a file is sent as a mapping of that file, whichever code mapped it."""

from __future__ import annotations

import ctypes  # noqa: TID251 - makes arrays over mappings
import mmap
import os

import pytest
from system import open_fds

import forkshm
from forkshm import assert_zero_copy
from forkshm.backend import kernel
from forkshm.pickler import files_kept, forget_files, pack, sendable

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.needs("mapped_files")

NUMBERS = np.arange(100_000.0)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(NUMBERS.tobytes())
    return path


@pytest.fixture(params=["asked", "looked up", "not root", "not root, looked up"])
def way(request, monkeypatch):
    """Find the file by a call of newer kernels or from a /proc file; and open it as root can, or by its name."""
    from forkshm.backend import _linux

    if "looked up" in request.param:
        monkeypatch.setattr(_linux, "_can_query", [])
    if "not root" in request.param:
        open_ = os.open

        def refused(path, *args, **kwargs):
            if "map_files" in str(path):
                raise PermissionError(1, "not allowed")
            return open_(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", refused)


def attributes(array):
    return type(array).__name__, getattr(array, "mode", None), str(getattr(array, "filename", None)), array.shape


PARTS = {
    "all": lambda m: m,
    "a slice": lambda m: m[1000:50_000],
    "every third": lambda m: m[::3],
    "from behind": lambda m: m[::-1],
    "columns": lambda m: m.reshape(100, 1000)[:, 3:7],
    "turned": lambda m: m.reshape(100, 1000).T,
    "few": lambda m: m[5:7],
    "other type": lambda m: m.view("i4"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_memmap_arrives_as_one_with_mode_and_name(cross, path, mode, part):
    sent = PARTS[part](np.memmap(path, float, mode))
    crossing = cross(sent)
    value = crossing.value
    assert crossing.copied == 0
    assert attributes(value) == attributes(sent)
    assert value.flags.writeable == (mode != "r")
    np.testing.assert_array_equal(np.asarray(value), np.asarray(sent))
    if mode == "r":
        return
    value[...] = 5
    assert (np.asarray(sent) == 5).all() == (mode == "r+")
    assert (np.fromfile(path) == NUMBERS).all() == (mode == "c")
    if mode == "r+":
        value.flush()


def test_files_are_found_by_every_method_of_the_backend(cross, path, way):
    sent = np.memmap(path, float, "r+")
    crossing = cross(sent)
    assert crossing.copied == 0
    crossing.value[7] = -1
    assert sent[7] == -1
    os.unlink(path)
    again = cross(sent)
    again.value[8] = -2
    assert (again.copied, sent[8]) == (0, -2)


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_a_file_that_may_no_longer_be_opened_is_shared(cross, path, in_child, mode):
    sent = np.memmap(path, float, mode)
    path.chmod(0)
    sent[3] = -3

    def check():
        if os.geteuid() == 0:
            os.setuid(65534)  # as a service that drops its privileges
        crossing = cross(sent)
        assert type(crossing.value) is np.memmap
        assert crossing.value[3] == -3
        crossing.value[7] = -1
        assert (sent[7] == -1) == (mode == "r+")
        assert crossing.copied == 0 or mode == "c"

    assert in_child(check) == 0


def test_a_replaced_file_arrives_as_the_mapped_file(cross, path, way):
    sent = np.memmap(path, float, "r+")
    other = path.with_name("other")
    other.write_bytes(np.zeros(100_000).tobytes())
    other.rename(path)
    value = cross(sent).value
    np.testing.assert_array_equal(value, NUMBERS)
    value[3] = -1
    assert sent[3] == -1
    assert not np.fromfile(path).any()


def test_a_file_that_was_cut_is_told(path, way):
    sent = np.memmap(path, float, "r+")
    os.truncate(path, 4096)
    with pytest.raises(forkshm.errors.RegionGoneError, match=r"mapped from .*numbers.* truncated to 4,096 bytes"):
        pack(sent)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        os.truncate(path, 0)
        with pytest.raises((forkshm.errors.RegionGoneError, TypeError)):
            pack(mapping)


def test_the_written_pages_of_a_private_mapping_are_copied(cross, path):
    sent = np.memmap(path, float, "c")
    sent[70_000] = -7
    value = cross(sent).value
    assert value[70_000] == -7
    expected = NUMBERS.copy()
    expected[70_000] = -7
    np.testing.assert_array_equal(value, expected)
    value[5] = -5
    assert sent[5] == 5
    assert (np.fromfile(path) == NUMBERS).all()
    other = np.memmap(path, float, "r+")
    other[90_000] = 3  # on a page that was not written before
    assert value[90_000] == sent[90_000] == 3


class Measured(np.ndarray):
    def __array_finalize__(self, parent):
        self.unit = getattr(parent, "unit", None)


class OwnMemmap(np.memmap):
    pass


OVER_FILES = {
    "own class": lambda m: m.view(Measured),
    "slice of one": lambda m: m.view(Measured)[5:],
    "own memmap": lambda m: m.view(OwnMemmap),
    "records": lambda m: m.view([("a", "f8"), ("b", "f8")]).view(np.recarray),
    "matrix": lambda m: m.reshape(100, -1).view(np.matrix),
    "masked": lambda m: np.ma.MaskedArray(m.view(np.ndarray), mask=False, copy=False),
}


@pytest.mark.parametrize("name", OVER_FILES)
def test_an_array_of_another_class_over_a_file_is_shared(cross, path, name):
    sent = OVER_FILES[name](np.memmap(path, float, "r+"))
    if isinstance(sent, Measured):
        sent.unit = "m"
    crossed = cross(sent)
    got = crossed.value
    assert type(got) is type(sent)
    assert getattr(got, "unit", None) == getattr(sent, "unit", None)
    got.view(np.ndarray).view(float).reshape(-1)[0] = 77
    assert sent.view(np.ndarray).view(float).reshape(-1)[0] == 77
    assert crossed.copied <= 100_000  # the mask


def test_views_of_one_memmap_are_views_of_one(cross, path):
    sent = np.memmap(path, float, "c")
    whole, part, plain = cross([sent, sent[10:20], np.asarray(sent)[10:20]]).value
    whole[12] = -1
    assert part[2] == plain[2] == -1
    assert whole._mmap is part._mmap


def test_a_writable_plain_array_over_a_file_is_shared(cross, path):
    sent = np.asarray(np.memmap(path, float, "r+"))[100:200]
    crossing = cross(sent)
    assert (type(crossing.value), crossing.copied) == (np.ndarray, 0)
    crossing.value[0] = -1
    assert sent[0] == -1


@pytest.mark.parametrize("rest", [0, 50])
@pytest.mark.parametrize("mode", list(forkshm.region.Mode))
def test_a_region_of_a_truncated_file_and_its_arrays_raise(path, mode, rest):
    region = forkshm.MappedRegion(forkshm.FileMapping(path), mode, size=5000)
    array = np.frombuffer(region.buf, np.uint8)
    os.truncate(path, rest)
    for sent in (region, array, array[::-7], [array[-100:], 1]):
        queue = forkshm.SimpleQueue()
        with pytest.raises(forkshm.errors.RegionGoneError, match=r"truncated .*after it was mapped\. Map it again"):
            (queue.put(sent), queue.get())


STRIDED_BY_HAND = {
    "windows": lambda m: np.lib.stride_tricks.sliding_window_view(m, 10, writeable=True),
    "every second": lambda m: np.lib.stride_tricks.as_strided(m, (len(m) // 2,), (16,)),
    "a part of it": lambda m: np.lib.stride_tricks.as_strided(m, (len(m) // 2,), (16,))[:9],
    "a memmap": lambda m: np.lib.stride_tricks.as_strided(m, (len(m) // 2,), (16,), subok=True),
}


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("name", STRIDED_BY_HAND)
def test_a_view_that_as_strided_made_of_a_memmap_is_shared(cross, path, name, size):
    sent = STRIDED_BY_HAND[name](np.memmap(path, float, "r+", shape=(size,)))
    crossing = cross(sent)
    assert crossing.copied == 0
    np.testing.assert_array_equal(crossing.value, sent)
    crossing.value.flat[0] = -1
    assert sent.flat[0] == -1


def test_a_read_only_view_that_as_strided_made_of_a_truncated_file_raises(path):
    sent = np.lib.stride_tricks.sliding_window_view(np.memmap(path, float, "r", shape=(100,)), 10)
    os.truncate(path, 0)
    with pytest.raises(forkshm.errors.RegionGoneError, match="was truncated to 0 bytes after"):
        pack(sent)


def over_ctypes(mapping, count):
    return np.ctypeslib.as_array((ctypes.c_double * count).from_buffer(mapping))


class Frame:
    """An object of another library."""

    def __init__(self, mapping, count):
        self.mapping = mapping
        pointer = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.__array_interface__ = {"shape": (count,), "typestr": "<f8", "data": (pointer, False), "version": 3}


def over_an_object_of_another_library(mapping, count):
    return np.asarray(Frame(mapping, count))


@pytest.mark.parametrize("make", [over_ctypes, over_an_object_of_another_library])
@pytest.mark.parametrize("count", [1, 100, 5000, 50_000])
def test_an_array_of_any_size_over_a_mapping_of_another_library_is_shared(pool, path, make, count):
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    array = make(mapping, count)
    with assert_zero_copy():
        pool.apply(lambda given: given.fill(7), (array,))
    assert array.tolist() == [7] * count
    alone = pool.apply(lambda a, b: (b.fill(3), float(b.sum()))[1], (array, make(bytearray(8 * count), count)))
    assert alone == 3 * count


def strided_by_hand(mapping, count):
    return np.lib.stride_tricks.as_strided(np.frombuffer(mapping), (count,), (8,))


@pytest.mark.parametrize("make", [over_ctypes, over_an_object_of_another_library, strided_by_hand])
@pytest.mark.parametrize(
    "wrap", [list, lambda arrays: dict(enumerate(arrays)), lambda arrays: {0: arrays, "a": "text"}]
)
def test_many_small_arrays_over_a_mapping_of_another_library_are_shared(cross, path, make, wrap):
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    arrays = [make(memoryview(mapping)[start:], 5) for start in range(0, 8000, 80)]
    value = cross(wrap(arrays)).value
    received = value if isinstance(value, list) else value[0] if isinstance(value[0], list) else list(value.values())
    for array in received:
        array[:] = 7
    assert all((array == 7).all() for array in arrays)


def test_many_small_objects_on_the_heap_are_asked_about_once(monkeypatch):
    asked = []
    ask = type(kernel).mapped_file
    monkeypatch.setattr(type(kernel), "mapped_file", lambda self, *arguments: asked.append(0) or ask(self, *arguments))
    pack([(ctypes.c_double * 5)(number) for number in range(20)])
    pack([np.ctypeslib.as_array((ctypes.c_double * 5)(number)) for number in range(20)])
    assert len(asked) <= 12  # of 40 objects, in a few ranges of the heap


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_double), ("second", ctypes.c_double))


def test_a_structure_over_a_file_is_shared(pool, path):
    with path.open("r+b") as file:
        pair = Pair.from_buffer(mmap.mmap(file.fileno(), 0), 64)
    pool.apply(lambda pair: setattr(pair, "second", -1.0), (pair,))
    assert (pair.first, pair.second) == (8, -1)


def test_a_plain_array_for_reading_over_a_file_may_be_written_to_there(cross, path):
    for sent in (np.asarray(np.memmap(path, float, "r")), np.frombuffer(mapped_for_reading(path))):
        crossing = cross(sent)
        assert (type(crossing.value), crossing.copied) == (np.ndarray, 0)
        crossing.value[0] = -1
        assert sent[0] == 0
        assert crossing.value[1] == 1


def test_a_read_only_view_of_a_private_mapping_has_its_written_pages(cross, path):
    written = np.memmap(path, float, "c")
    written[70_000] = -7
    sent = np.asarray(written)[:]
    sent.flags.writeable = False
    value = cross(sent).value
    np.testing.assert_array_equal(value, sent)
    value[5] = -5
    assert sent[5] == 5
    assert cross(np.broadcast_to(np.asarray(written), (2, len(written)))).value[1, 70_000] == -7


REPEATED = {
    "broadcast": lambda a: np.broadcast_to(a[:500], (3, 500)),
    "broadcast, strided": lambda a: np.broadcast_to(a[:5000:10], (3, 500)),
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a[:500], 3),
    "windows, from behind": lambda a: np.lib.stride_tricks.sliding_window_view(a[499::-1], 3),
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_each_element_of_a_view_that_repeats_a_file_is_written_alone(cross, path, mode, name):
    sent = REPEATED[name](np.asarray(np.memmap(path, float, mode)))
    crossing = cross(sent)
    assert crossing.copied == 0
    expected = sent + np.arange(sent.size).reshape(sent.shape)
    value = crossing.value
    value += np.arange(sent.size).reshape(sent.shape)
    np.testing.assert_array_equal(value, expected)
    assert (np.fromfile(path) == NUMBERS).all()


def mapped_for_reading(path):
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def test_rows_of_a_file_are_not_bundled_as_copies(cross, path):
    rows = list(np.asarray(np.memmap(path, float, "r+")).reshape(1000, 100))
    value = cross(rows[:100]).value
    value[3][0] = -1
    assert rows[3][0] == -1


def test_arrays_that_numpy_loads_as_mappings_are_shared(cross, tmp_path):
    np.save(tmp_path / "a.npy", NUMBERS.reshape(100, 1000))
    sent = np.load(tmp_path / "a.npy", mmap_mode="r")
    crossing = cross(sent)
    assert crossing.copied == 0
    assert attributes(crossing.value) == attributes(sent)
    assert crossing.value.offset == sent.offset
    np.testing.assert_array_equal(crossing.value, sent)


def test_the_result_of_computing_with_a_memmap_is_a_copy(cross, path):
    for sent in (np.memmap(path, float, "r") * 2, np.memmap(path, float, "r")[:0]):
        np.testing.assert_array_equal(cross(sent).value, sent)


@pytest.mark.parametrize("access", ["ACCESS_READ", "ACCESS_WRITE", "ACCESS_COPY"])
@pytest.mark.parametrize("offset", [0, mmap.ALLOCATIONGRANULARITY])
def test_an_mmap_arrives_as_one(cross, path, access, offset):
    with path.open("r+b") as file:
        sent = mmap.mmap(file.fileno(), 10_000, access=getattr(mmap, access), offset=offset)
    sent.seek(7)
    if access == "ACCESS_COPY":
        sent[100:105] = b"mine!"
    value = cross([sent, sent]).value
    assert value[0] is value[1]
    value = value[0]
    assert type(value) is mmap.mmap
    assert (len(value), value.tell(), value[:]) == (10_000, 7, sent[:])
    if access == "ACCESS_READ":
        with pytest.raises(TypeError, match="readonly"):
            value[0] = 1
        return
    value[3] = 77
    assert (sent[3] == 77) == (access == "ACCESS_WRITE")


class Table(mmap.mmap):
    def __new__(cls, path):
        with path.open("r+b") as file:
            return super().__new__(cls, file.fileno(), 0)

    def __init__(self, path):
        self.rows = 5


class Refusing(Table):
    def __reduce__(self):
        raise LookupError("its own way")


def test_an_object_of_a_class_derived_from_mmap_arrives_as_one(cross, path):
    table = Table(path)
    table.seek(3)
    arrived = cross(table).value
    assert type(arrived) is Table
    assert (arrived.rows, arrived.tell()) == (5, 3)
    arrived[0] = 77
    assert table[0] == 77
    with pytest.raises(LookupError, match="its own way"):
        cross(Refusing(path))


def test_an_mmap_without_a_file_is_refused_and_its_arrays_are_copied(cross):
    mapping = mmap.mmap(-1, 10_000)
    with pytest.raises(TypeError, match=r"cannot pickle an mmap.mmap of 10,000 bytes.*anonymous_shared_memory"):
        pack(mapping)
    sent = np.frombuffer(mapping)
    value = cross(sent).value
    value[:] = 1
    assert not sent.any()
    del sent


def test_an_arrow_table_over_a_file(cross, tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": NUMBERS, "b": [f"word {n}" for n in range(100_000)]})
    with pa.OSFile(str(tmp_path / "t"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    mapped = pa.ipc.open_file(pa.memory_map(str(tmp_path / "t"))).read_all()
    crossing = cross(mapped)
    assert crossing.copied < 1000
    assert crossing.value == table
    part = cross(mapped.slice(50_000, 10_000))
    assert part.copied < 1000
    assert part.value == table.slice(50_000, 10_000)
    array = mapped["a"].chunk(0).to_numpy()
    crossing = cross(array)
    assert crossing.copied == 0
    crossing.value[0] = -1
    assert array[0] == 0


def test_a_sparse_file_larger_than_memory_costs_a_mapping(tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    try:
        os.truncate(path, 40 * 2**30)
    except OSError as error:
        pytest.skip(f"no such file here: {error}")
    sent = np.memmap(path, float, "r+")
    with forkshm.Pool(1) as pool, assert_zero_copy():
        for number in range(100):
            assert pool.apply(put, (sent, number)) == len(sent)
        assert pool.apply(put, (np.asarray(np.memmap(path, float, "r")), -1)) == len(sent)
    assert (sent[:100] == np.arange(100)).all()


def put(array, number):
    array[number] = number
    return len(array)


def test_nothing_stays_open(cross, path):
    sent = np.memmap(path, float, "r+")
    cross(sent)
    before = len(open_fds())
    for _ in range(10):
        cross([sent, sent[5:], np.asarray(sent)])
        with pytest.raises(ZeroDivisionError):
            pack([sent, Raising()])
    assert len(open_fds()) == before


class Raising:
    def __reduce__(self):
        return 1 / 0


@pytest.fixture
def lookups(monkeypatch):
    """The addresses that the kernel was asked about."""
    asked = []
    look_up = kernel.mapped_file

    def noted(address, *args):
        asked.append(address)
        return look_up(address, *args)

    monkeypatch.setattr(kernel, "mapped_file", noted)
    return asked


def test_views_of_a_mapping_need_one_lookup_and_arrive_over_one_mapping(path, lookups):
    memmap = np.memmap(path, dtype=float, mode="r+")
    sent = [memmap._mmap, memmap, memmap[1000:], np.asarray(memmap)[::2], {"again": memmap.reshape(100, -1)}]
    before = open_fds()
    receiving, sending = forkshm.Pipe(duplex=False)
    with receiving, sending:
        sending.send(sent)
        mapping, *arrays, by_name = receiving.recv()
    assert len(lookups) == 1
    by_name["again"][50, 0] = -1.0
    assert arrays[0][50_000] == arrays[1][49_000] == arrays[2][25_000] == -1.0
    assert np.frombuffer(mapping)[50_000] == -1.0
    del mapping, arrays, by_name
    forget_files()
    assert open_fds() == before


def test_a_mapping_is_looked_up_once_while_its_file_keeps_its_size(path, lookups):
    memmap = np.memmap(path, dtype=float, mode="r")
    before = open_fds()
    for _ in range(3):
        pack(memmap).close()
    assert len(lookups) == 1
    assert len(open_fds()) == len(before) + 1
    os.truncate(path, 2 * NUMBERS.nbytes)
    pack(memmap).close()
    assert len(lookups) == 2
    os.truncate(path, 4096)
    with pytest.raises(forkshm.RegionGoneError, match="truncated to 4,096 bytes"):
        pack(memmap)
    assert len(lookups) == 3
    forget_files()
    assert open_fds() == before


def test_files_of_the_latest_mappings_stay_open(path):
    before = open_fds()
    memmaps = [np.memmap(path, dtype=float, mode="r") for _ in range(6)]
    mapped = open_fds()
    for memmap in memmaps:
        pack(memmap).close()
    assert len(open_fds()) - len(mapped) == files_kept() == 4
    assert forkshm.statistics().descriptors >= 4
    del memmap, memmaps
    assert open_fds() == before
    assert files_kept() == 0


def test_a_kept_file_whose_fd_other_code_has_closed_is_opened_again(cross, path, tmp_path):
    memmap = np.memmap(path, dtype=float, mode="r")
    before = open_fds()
    pack(memmap).close()
    (kept,) = set(open_fds()) - set(before)
    other = tmp_path / "other"
    other.write_bytes(np.zeros_like(NUMBERS).tobytes())
    with open(other, "rb") as opened:
        os.dup2(opened.fileno(), kept)
    assert (cross(memmap).value == NUMBERS).all()
    assert os.path.samestat(os.fstat(kept), os.stat(other))  # not closed: it belongs to the program now
    os.close(kept)


def test_a_child_looks_up_a_mapping_that_was_being_sent_at_the_fork(path):
    memmap = np.memmap(path, dtype=float, mode="r")
    receiving, sending = forkshm.Pipe(duplex=False)
    # As a pickle that another thread is making holds it.
    held = sendable(memmap._mmap)

    def send():
        assert held.fd == -1
        assert sendable(memmap._mmap) is not held
        sending.send(memmap)

    process = forkshm.get_context("fork").Process(target=send)
    with receiving, sending:
        process.start()
        assert receiving.poll(60)
        assert (receiving.recv() == NUMBERS).all()
    process.join()
    assert process.exitcode == 0
