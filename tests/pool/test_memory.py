"""Arrays and regions through a Pool: descriptors, copies, modes and lifetimes."""

import os
import pathlib
import random

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm.backend import IS_FREE_THREADED
from forkshm.pool import _worker
from forkshm.region.blocks import _segment
from forkshm.region.blocks._arena import KEEP_WARM, MIB, arena


def write(array, value):
    array[...] = value


def describe(array):
    return type(array).__name__, array.shape, array.strides, array.flags.writeable


def total(thing):
    return float(np.sum(thing))


def fill(region, value):
    region.buf[:] = bytes([value]) * region.size
    return region.size, region.mode, type(region).__name__


def test_an_array_made_after_the_pool_reaches_running_workers_and_back(pool):
    pool.map(f.pid, range(50), chunksize=1)
    shared = forkshm.zeros(100_000)
    pool.apply(write, (shared, 7))
    assert (shared == 7).all()
    pool.starmap(write, [(shared[i * 10 : i * 10 + 10], i) for i in range(10)], chunksize=1)
    assert shared[:100].tolist() == [float(i // 10) for i in range(100)]
    assert pool.statistics().workers_replaced == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[3:17],
        lambda a: a.T,
        lambda a: a[::-1, ::-1],
        lambda a: a[::2, 1::3],
        lambda a: a[5],
        lambda a: a[:, 2],
        lambda a: a[4:5, 6:7],
        lambda a: a.reshape(-1)[10:],
        lambda a: np.asarray(a)[2:9].T,
        lambda a: a.view("int64"),
        lambda a: a[..., None],
    ],
)
def test_views_cross_as_descriptors_and_writes_are_seen(pool, view):
    shared = forkshm.zeros((20, 30))
    seen = view(shared)
    before = pool.statistics()
    kind, shape, strides, writeable = pool.apply(describe, (seen,))
    assert (kind, shape, strides, writeable) == (type(seen).__name__, seen.shape, seen.strides, True)
    pool.apply(write, (seen, 5))
    after = pool.statistics()
    assert after.bytes_copied == before.bytes_copied
    assert after.bytes_shared > before.bytes_shared
    assert (seen == 5).all()
    assert np.count_nonzero(shared) == seen.size


def test_arrays_inside_containers_and_closures(pool):
    shared = forkshm.zeros(1000)
    pool.apply(lambda nested: write(nested["a"][1][0], 3), ({"a": [None, (shared,)]},))
    assert (shared == 3).all()
    pool.map(lambda i: write(shared[i * 100 : i * 100 + 100], i), range(10))
    assert shared.tolist() == [float(i // 100) for i in range(1000)]


def test_a_read_only_view_stays_read_only(pool):
    shared = forkshm.ones(1000)
    view = shared[:]
    view.flags.writeable = False
    assert pool.apply(describe, (view,))[3] is False
    with pytest.raises(ValueError, match="read-only"):
        pool.apply(write, (view, 2))


def test_aliases_stay_aliases(pool):
    shared = forkshm.zeros(1000)

    def through_one(a, b):
        a[500] = 9
        return float(b[0]), np.shares_memory(a, b)

    assert pool.apply(through_one, (shared, shared[500:])) == (9.0, True)


def test_a_shared_array_as_a_result(pool):
    shared = forkshm.zeros(100_000)
    back = pool.apply(lambda a: a[10:20], (shared,))
    assert isinstance(back, forkshm.SharedArray)
    assert np.shares_memory(back, shared)
    made = pool.apply(forkshm.full, (1000, 4.0))
    assert made.tolist() == [4.0] * 1000
    pool.apply(write, (made, 5))
    assert made[0] == 5


def test_a_shared_array_outlives_its_worker_and_pool():
    with forkshm.Pool(1) as pool:
        made = pool.apply(forkshm.ones, (500_000,))
        plain = pool.apply(np.ones, (500_000,))
    assert made.sum() == 500_000
    made[:] = 2
    assert made.sum() == 1_000_000
    plain += 1
    assert plain.sum() == 1_000_000


def test_regions_cross_as_descriptors(pool):
    region = forkshm.anonymous_shared_memory(5000)
    assert pool.apply(fill, (region, 65)) == (5000, "read_write", "MappedRegion")
    assert bytes(region.buf) == b"A" * 5000
    assert pool.apply(lambda r: r, (region,)) is region
    made = pool.apply(forkshm.anonymous_shared_memory, (77,))
    pool.apply(fill, (made, 66))
    assert bytes(made.buf) == b"B" * 77


def test_a_file_region_crosses(pool, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"." * 10_000)
    with open(path, "r+b") as file:
        region = forkshm.MappedRegion(file, "read_write", offset=5001, size=3)
    assert pool.apply(fill, (region, 67))[0] == 3
    assert path.read_bytes()[5000:5005] == b".CCC."
    region.close()


def test_by_value_arguments_are_writable_and_private(pool):
    plain = np.zeros(100_000)

    def change(a):
        a[:] = 1
        return describe(a), a.sum()

    assert pool.apply(change, (plain,)) == (("ndarray", (100_000,), (8,), True), 100_000)
    assert not plain.any()


def test_by_value_results_are_writable_and_stay(pool):
    results = [pool.apply(np.full, (100_000, i)) for i in range(20)]
    for i, result in enumerate(results):
        assert result.flags.writeable
        assert (result == i).all()
        result += 1
    for i, result in enumerate(results):
        assert (result == i + 1).all()


@pytest.mark.parametrize("size", [0, 1, 1000, 16 * 1024 - 1, 16 * 1024, 20 * 1024, 65_536, 1_000_000])
def test_bytes_of_every_size_both_ways(pool, size):
    for made in (bytes(size), bytearray(size), "x" * size, "\u00e9" * size, np.zeros(size, "u1")):
        back = pool.apply(lambda x: x, (made,))
        assert type(back) is type(made)
        assert len(back) == len(made)
        assert (back == made).all() if isinstance(made, np.ndarray) else back == made


def test_a_large_pickle_stream_and_containers_of_arrays(pool):
    numbers = list(range(100_000))
    assert pool.apply(lambda x: x, (numbers,)) == numbers
    arrays = {str(i): np.full(5000, i) for i in range(100)}
    back = pool.apply(lambda x: x, (arrays,))
    assert back.keys() == arrays.keys()
    assert all((back[key] == arrays[key]).all() for key in arrays)


def test_data_frames_both_ways(pool):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": np.arange(50_000), "b": np.random.default_rng(1).random(50_000)})
    before = pool.statistics()
    back = pool.apply(lambda df: df.assign(c=df.a * 2), (frame,))
    pd.testing.assert_frame_equal(back, frame.assign(c=frame.a * 2))
    after = pool.statistics()
    nbytes = frame.memory_usage(index=False).sum()
    assert after.bytes_copied - before.bytes_copied >= nbytes
    assert (after.bytes_copied + after.bytes_shared) - (before.bytes_copied + before.bytes_shared) >= 2 * nbytes


def test_strided_arrays_by_value(pool):
    plain = np.arange(200_000).reshape(400, 500)
    for view in (plain.T, plain[::-1], plain[::2, ::3], np.asfortranarray(plain)):
        back = pool.apply(lambda x: x, (view,))
        assert (back == view).all()
        assert pool.apply(total, (view,)) == view.sum()


def test_a_closure_over_a_large_array_is_copied_once_for_all_tasks(pool):
    table = np.ones(1_000_000)
    before = pool.statistics().bytes_copied
    assert pool.map(lambda i: float(table[i]) + i, range(200), chunksize=1) == [1.0 + i for i in range(200)]
    assert pool.statistics().bytes_copied - before == table.nbytes


def test_tasks_do_not_see_each_others_writes_to_the_closure(pool):
    table = np.zeros(100_000)

    def add_pid(_):
        mine = float(np.sum(table))
        table[f.pid() % 1000] += 1
        return f.pid(), mine

    seen = {}
    for pid, before in pool.map(add_pid, range(40), chunksize=1):
        seen.setdefault(pid, []).append(before)
    assert not table.any()
    # Each worker sees only its own writes: 0, 1, 2, ... or 0 again.
    assert all(max(values) < len(values) for values in seen.values())


@pytest.mark.needs("punch_holes")
def test_memory_is_used_again_and_given_back(pool):
    big = np.ones(4_000_000)
    before = arena.statistics().reserved_bytes
    for _ in range(20):
        assert pool.apply(total, (big,)) == 4_000_000
    assert arena.statistics().reserved_bytes - before <= 4 * 64 * 2**20
    pool.terminate()
    assert arena.statistics().blocks == 0
    assert arena.statistics().warm_bytes == 0


def half(array):
    return array[: len(array) // 2] if len(array) % 3 else float(array.sum())


def held_by(pids):
    return [
        int(line.split()[1]) * 1024
        for pid in pids
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ]


@pytest.mark.needs("memory_maps")
@pytest.mark.parametrize("messages", [4_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_memory_stays_the_same_over_many_messages(pool, messages):
    """Send arrays of all sizes in both directions: memory, fds and mappings do not grow after the first tenth."""
    sizes = random.Random(1).choices([10, 1000, 5000, 20_000, 100_000, 1_000_000], [40, 20, 10, 10, 4, 1], k=messages)
    pids = [os.getpid(), *(process.pid for process in forkshm.get_context().active_children())]

    def run(part):
        for _ in pool.imap_unordered(half, (np.ones(size) for size in part)):
            pass
        # Resources of the processes: memory, fds, mappings.
        return (
            held_by(pids),
            [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids],
            [pathlib.Path(f"/proc/{pid}/maps").read_text().count("memfd:") for pid in pids],
        )

    warm = run(sizes[: messages // 10])
    memory, fds, maps = run(sizes[messages // 10 :])
    assert all(now <= before + 128 * 2**20 for now, before in zip(memory, warm[0], strict=True)), (memory, warm)
    assert all(now <= before + 8 for now, before in zip(fds, warm[1], strict=True)), (fds, warm)
    assert all(now <= before + 16 for now, before in zip(maps, warm[2], strict=True)), (maps, warm)


def test_a_thousand_shared_arrays_in_one_argument(pool):
    arrays = [forkshm.full(10, i) for i in range(1000)]
    assert pool.apply(lambda things: [float(a[0]) for a in things], (arrays,)) == [float(i) for i in range(1000)]


def test_an_empty_or_object_array_crosses(pool):
    for made in (forkshm.zeros(0), forkshm.zeros((3, 0)), np.array([1, "a", None], object), np.array(5.0)):
        back = pool.apply(lambda x: x, (made,))
        assert back.shape == made.shape
        assert back.dtype == made.dtype
        assert (back == made).all()


@pytest.mark.slow
@pytest.mark.needs("punch_holes")
def test_an_idle_worker_keeps_some_memory_warm_and_later_none(monkeypatch, wait_until):
    monkeypatch.setattr(_worker, "_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(_worker, "_LOOK_SECONDS", 0.3)
    monkeypatch.setattr(_worker, "EMPTY_SECONDS", 1.5)

    def held():
        return sum(os.fstat(each.fd).st_blocks * 512 for each in _segment.segments_held.values() if not each.ours)

    with forkshm.Pool(1) as pool:
        for _ in range(2):
            results = [pool.apply(np.ones, (2 * MIB,)) for _ in range(10)]  # 16 MiB each
            assert held() >= 160 * MIB
            del results
            wait_until(lambda: held() <= KEEP_WARM)
            assert held() > KEEP_WARM // 2
            wait_until(lambda: held() == 0)


FRAGMENTED_HEAP = """
import re, time
import numpy as np
import forkshm
from forkshm.pool import _worker

_worker._IDLE_SECONDS, _worker._LOOK_SECONDS = 0.1, 0.5
kept = []


def held(pid="self"):
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", status.read())[1]) // 1024


def fill_the_heap(_):
    # Leaves 64 MiB of free memory below an object that stays. free(3) returns only memory at the end of the heap.
    # A worker that waits for the processor afterwards may be idle long enough, so it is the worker that measures.
    before = held()
    parts = [bytes(100_000) for _ in range(671)]
    kept.append(bytes(50_000))
    del parts
    return np.ones(2**20), before, held()


with forkshm.Pool(1) as pool:
    (worker,) = pool._pool
    _, before, after = pool.apply(fill_the_heap, (0,))
    print(after - before > 32)
    while held(worker.pid) - before > 16:
        time.sleep(0.01)
    print(pool.apply(len, ("abc",)))
"""


@pytest.mark.needs("punch_holes")
@pytest.mark.needs("proc")
@pytest.mark.skipif(IS_FREE_THREADED, reason="Python takes the memory of objects from an allocator of its own there")
def test_an_idle_worker_returns_free_memory_of_its_heap(run_script):
    assert run_script(FRAGMENTED_HEAP) == "True\n3\n"
