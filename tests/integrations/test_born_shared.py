"""Arrays born in shared memory, by any code that creates them, until their end."""

from __future__ import annotations

import _thread
import asyncio
import functools
import gc
import itertools
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

import forkshm
from forkshm.region._lifetime import guard
from forkshm.region.blocks import _segment
from forkshm.region.blocks._arena import FIRST_SEGMENT, arena
from forkshm.region.blocks._claim import Share, claim_at

np = pytest.importorskip("numpy")

from forkshm.backend import IS_FREE_THREADED, numpy_hook  # noqa: E402
from forkshm.integrations import numpy_memory  # noqa: E402

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or IS_FREE_THREADED, reason="NumPy's hook is used on x86-64 with the GIL only"
)

MIB = 2**20
LARGE = 2 * MIB // 8


def numbers(count=LARGE):
    return np.arange(count, dtype=float)


def share_of(array):
    claim = claim_at(array.__array_interface__["data"][0])
    return claim and claim.share


def is_born(array):
    return array.__array_interface__["data"][0] in numpy_memory._born


def add_one(array):
    array += 1


def add_day(array):
    array += np.timedelta64(1, "D")


def returned(array):
    return array


kept = []


def keep(array):
    kept.append(array)
    return array


def make_and_keep(count):
    return keep(numbers(count))


def change_kept(value):
    kept[0][:] = value


def first_kept():
    return kept[0]


def take_kept():
    return kept.pop()


def kept_values(forget=True):
    values = [float(array.ravel()[5]) for array in kept]
    if forget:
        kept.clear()
    return values


# -- results of workers ---------------------------------------------------------------


def test_a_result_is_not_copied_and_is_the_parents_own():
    with forkshm.Pool(2, born_shared=True) as pool:
        answer = pool.apply(np.arange, (LARGE,), {"dtype": float})
        assert np.array_equal(answer, numbers())
        assert pool.statistics().bytes_copied == 0
        assert pool.statistics().bytes_shared == answer.nbytes
        assert share_of(answer) is Share.exclusive
        answer[:] = 7
        assert (pool.apply(returned, (answer,)) == 7).all()


def test_results_of_a_map_and_in_containers_are_not_copied():
    with forkshm.Pool(2, born_shared=True) as pool:
        answers = pool.map(lambda value: {"it": np.full(LARGE, value), "half": np.full(LARGE, value / 2)}, range(6))
        assert [(float(a["it"][-1]), float(a["half"][0])) for a in answers] == [(v, v / 2) for v in range(6)]
        assert pool.statistics().bytes_copied == 0


def test_a_result_kept_by_the_worker_is_separate_from_the_parents():
    with forkshm.Pool(1, born_shared=True) as pool:
        answer = pool.apply(make_and_keep, (LARGE,))
        assert pool.statistics().bytes_copied == 0
        answer[5] = -1
        assert pool.apply(kept_values, (False,)) == [5.0]
        pool.apply(change_kept, (9,))
        assert pool.apply(kept_values) == [9.0]
        assert (answer[4], answer[5], answer[6]) == (4, -1, 6)


def views():
    array = numbers()
    return array, array[1000:], array[::-1]


def test_slices_and_views_of_results_keep_their_type():
    with forkshm.Pool(1, born_shared=True) as pool:
        whole, tail, back = pool.apply(views)
        whole[1000] = -5
        assert tail[0] == -5 == back[LARGE - 1001]
        assert np.array_equal(pool.apply(lambda: numbers()[:10]), numbers(10))


def make_in_initializer(count):
    make_and_keep(count)


def share_of_kept(_=None):
    return str(share_of(kept[0]))


def test_every_worker_allocates_shared_arrays_even_before_its_initializer():
    with forkshm.Pool(1, make_in_initializer, (LARGE,), 2, born_shared=True) as pool:
        assert pool.map(share_of_kept, range(5), chunksize=1) == ["Share.exclusive"] * 5
        with pytest.raises(forkshm.WorkerDiedError):
            pool.apply(os._exit, (3,))
        assert pool.apply(share_of_kept) == "Share.exclusive"


def test_a_context_passes_born_shared_on():
    with forkshm.get_context("fork").Pool(1, born_shared=True) as pool:
        assert share_of(pool.apply(np.ones, (LARGE,))) is Share.exclusive
        assert pool.statistics().bytes_copied == 0


def test_workers_of_a_pool_made_in_a_block_are_outside_of_the_block():
    with forkshm.shared_allocations(), forkshm.Pool(1) as pool:
        assert pool.apply(lambda: is_born(np.ones(LARGE))) is False
        answer = pool.apply(make_and_keep, (LARGE,))
        answer[5] = -1
        assert pool.apply(kept_values) == [5.0]


def test_born_shared_is_keyword_only():
    with pytest.raises(TypeError):
        forkshm.Pool(1, None, (), None, None, True)


def test_nested_pools_send_on_arrays_born_shared():
    def outer(count):
        with forkshm.Pool(1, born_shared=True) as pool:
            return pool.apply(np.arange, (count,), {"dtype": float})

    with forkshm.Pool(1) as pool:
        assert np.array_equal(pool.apply(outer, (LARGE,)), numbers())
        assert pool.statistics().bytes_copied == 0


def arena_statistics():  # sent by name, because a lambda would take the parent's arena along
    return arena.statistics()


def test_the_memory_of_results_is_used_again():
    with forkshm.Pool(1, born_shared=True) as pool:
        for _ in range(20):
            pool.apply(np.ones, (LARGE,))
        statistics = pool.apply(arena_statistics)
        assert statistics.blocks <= 1
        assert statistics.reserved_bytes == FIRST_SEGMENT


# -- arrays of a block ----------------------------------------------------------------


def born():
    with forkshm.shared_allocations():
        return numbers()


def test_large_arrays_are_ordinary_and_in_the_arena():
    before = arena.statistics().blocks
    with forkshm.shared_allocations():
        made = numbers()
        doubled = made * 2
        small = numbers(100)
    after = numbers()
    assert type(made) is np.ndarray
    assert made.base is None
    assert made.flags.owndata
    assert (is_born(made), is_born(doubled), is_born(small), is_born(after)) == (True, True, False, False)
    assert arena.statistics().blocks == before + 2
    assert np.array_equal(doubled, after * 2)
    del made, doubled
    assert arena.statistics().blocks == before


def test_writes_of_other_processes_are_seen_and_nothing_is_copied(pool):
    array = born()
    before = pool.statistics()
    pool.apply(add_one, (array,))
    assert np.array_equal(array, numbers() + 1)
    assert pool.statistics().bytes_copied == before.bytes_copied


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda a: a[3:5], id="tiny"),
        pytest.param(lambda a: a[7:8].reshape(()), id="no dimensions"),
        pytest.param(lambda a: a[::-1], id="reversed"),
        pytest.param(lambda a: a.reshape(512, -1)[:, 3], id="column"),
        pytest.param(lambda a: a.reshape(512, -1).T, id="transposed"),
        pytest.param(lambda a: a[::1000], id="mostly gaps"),
        pytest.param(lambda a: a.view("m8[s]").view("i8"), id="other type"),
        pytest.param(lambda a: a.view([("x", "f4"), ("y", "f4")])["y"], id="field"),
        pytest.param(lambda a: a[:1000][::-2], id="few bytes, backwards"),
    ],
)
def test_views_of_an_array_born_shared_are_shared(pool, cut):
    array = born()
    part = cut(array)
    expected = part + 1
    pool.apply(add_one, (part,))
    assert np.array_equal(part, expected)


def test_dates_are_shared(pool):
    with forkshm.shared_allocations():
        days = np.zeros(LARGE, "M8[D]")
    pool.apply(add_day, (days,))
    assert (days == np.datetime64("1970-01-02")).all()


def test_a_returned_array_is_the_same_memory(pool):
    array = born()
    answer = pool.apply(returned, (array[100:],))
    assert np.shares_memory(answer, array)
    answer[0] = -1
    assert array[100] == -1
    tiny = pool.apply(returned, (array[5:6],))
    tiny[0] = -2
    assert array[5] == -2


def test_an_array_is_shared_through_three_processes(pool):
    array = born()

    def through(array, levels):
        if not levels:
            array[0] = 42
            return array[1:]
        with forkshm.Pool(1) as inner:
            return inner.apply(through, (array, levels - 1))

    answer = pool.apply(through, (array, 2))
    assert array[0] == 42
    answer[0] = 43
    assert array[1] == 43


def test_the_closure_of_a_map_shares_the_array_with_all_workers(pool):
    array = born()

    def write(index):
        array[index] = -index

    pool.map(write, range(100), chunksize=1)
    assert np.array_equal(array[:100], -numbers(100))


def test_a_receiver_keeps_the_array_after_its_creator_dropped_it():
    with forkshm.Pool(1) as pool:
        with forkshm.shared_allocations():
            array = numbers()
        pool.apply(keep, (array,))
        array[5] = 50
        del array
        assert arena.statistics().blocks == 1
        with forkshm.shared_allocations():
            other = np.zeros(LARGE)  # in a different block
        answer = pool.apply(first_kept)
        answer[5] += 1
        assert pool.apply(kept_values) == [51.0]
        assert not other.any()


def test_a_killed_receiver_holds_nothing(wait_until):
    with forkshm.Pool(1) as pool:
        with forkshm.shared_allocations():
            array = numbers()
        pool.apply(keep, (array,))
        del array
        with pytest.raises(forkshm.WorkerDiedError):
            pool.apply(os.kill, (pool.apply(os.getpid), signal.SIGKILL))
        wait_until(lambda: arena.statistics().blocks == 0)


@pytest.mark.needs("pagemap")
def test_for_reading_means_no_writes_there_and_ours_are_seen():
    with forkshm.Pool(1) as pool:
        with forkshm.shared_allocations():
            array = numbers()
        for mode in ("read_only", "read_private"):
            with pytest.raises(ValueError, match="read-only"):
                pool.apply(add_one, (forkshm.view(array, mode),))
        pool.apply(keep, (forkshm.view(array, "read_only"),))
        array[5] = 55
        assert pool.apply(kept_values, (False,)) == [55.0]
        answer = pool.apply(take_kept)
        assert not answer.flags.writeable
        array[5] = 56
        assert answer[5] == 56
        assert np.array_equal(array[6:], numbers()[6:])


def test_the_other_modes(pool):
    array = born()
    pool.apply(add_one, (forkshm.view(array, "copy_on_write"),))
    assert np.array_equal(array, numbers())
    pool.apply(add_one, (forkshm.view(array, "read_write"),))
    assert np.array_equal(array, numbers() + 1)


def test_asarray_of_an_array_born_shared_is_a_copy():
    array = born()
    copy = forkshm.asarray(array)
    assert not np.shares_memory(copy, array)


# -- fork -----------------------------------------------------------------------------


def test_a_forked_child_writes_to_the_array_and_drops_it(in_child):
    with forkshm.shared_allocations():
        held = [numbers()]

    def child():
        held[0][3] = -3
        held.clear()
        gc.collect()
        with forkshm.shared_allocations():
            mine = np.zeros(LARGE)
        assert is_born(mine)
        assert not mine.any()

    assert in_child(child) == 0
    assert held[0][3] == -3
    assert arena.statistics().blocks == 1
    assert np.array_equal(held[0][4:], numbers()[4:])


def test_a_forked_child_is_in_the_block(in_child):
    def child():
        made = numbers()
        assert is_born(made)
        with forkshm.Pool(1) as pool:
            pool.apply(add_one, (made,))
        assert np.array_equal(made, numbers() + 1)

    with forkshm.shared_allocations():
        assert in_child(child) == 0


@pytest.mark.parametrize("kind", ["O", [("number", "i8"), ("name", "O")]], ids=["objects", "structure"])
def test_arrays_of_objects_are_copied_by_a_fork(kind):
    with forkshm.shared_allocations():
        things = np.empty(LARGE, kind)
        plain = np.zeros(LARGE)
    names = things if kind == "O" else things["name"]
    names[:] = [f"thing {index}" for index in range(LARGE)]
    assert is_born(things)
    start, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.read(start, 1)
            expected = [f"thing {index}" for index in range(LARGE)]
            code = 0 if names.tolist() == expected and plain[0] == 1 else 2
            names[:] = None
            names, things = None, None
            gc.collect()
        finally:
            os._exit(code)
    plain[0] = 1
    names[:] = [object() for _ in range(LARGE)]
    os.write(go, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert all(type(thing) is object for thing in names)
    os.close(start)
    os.close(go)


def test_arrays_of_objects_cross_by_value(pool):
    with forkshm.shared_allocations():
        things = np.full(LARGE, "thing", object)
    assert pool.apply(lambda them: (len(them), them[-1]), (things,)) == (LARGE, "thing")
    assert pool.apply(returned, (things[:3],)).tolist() == ["thing"] * 3


# -- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("above", [-1, 0, 1])
def test_the_threshold_is_exact(above):
    with forkshm.shared_allocations(min_bytes=100_000):
        made = [maker(100_000 + above, "u1") for maker in (np.empty, np.zeros, np.ones)]
    assert [is_born(array) for array in made] == [above >= 0] * 3


def test_a_byte_can_be_shared(pool):
    with forkshm.shared_allocations(min_bytes=1):
        one = np.zeros(1, "u1")
        none = np.zeros(0)
    pool.apply(add_one, (one,))
    assert one[0] == 1
    assert none.nbytes == 0


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_threshold_below_one_is_refused(wrong):
    with pytest.raises(ValueError, match="min_bytes must be at least 1"):
        forkshm.shared_allocations(min_bytes=wrong)


def test_zeros_are_zeros_in_memory_that_was_used():
    with forkshm.shared_allocations():
        for count in (LARGE, LARGE // 2, LARGE * 3):
            for _ in range(3):
                zeros = np.zeros(count)
                assert is_born(zeros)
                assert not zeros.any()
                zeros[:] = -1
                del zeros


@pytest.mark.parametrize("counts", [(10, LARGE, 20), (LARGE, 3 * LARGE, LARGE + 1, 5, 2 * LARGE), (LARGE, LARGE + 10)])
def test_resizing_keeps_the_contents(counts):
    with forkshm.shared_allocations():
        array = numbers(counts[0])
        for old, new in itertools.pairwise(counts):
            array.resize(new, refcheck=False)
            both = min(old, new)
            assert np.array_equal(array[:both], numbers(both))
            assert not array[both:].any()
            array[:] = numbers(new)
            assert is_born(array) == (array.nbytes >= MIB)
    array.resize(LARGE // 2, refcheck=False)
    array.resize(LARGE * 2, refcheck=False)
    assert np.array_equal(array[: min(LARGE // 2, counts[-1])], numbers(min(LARGE // 2, counts[-1])))


def test_arrays_of_unknown_length_grow_into_the_arena():
    with forkshm.shared_allocations():
        array = np.fromiter(iter(range(LARGE)), float)
        text = np.fromstring(" ".join(map(str, range(MIB // 4))), sep=" ")
    assert np.array_equal(array, numbers())
    assert np.array_equal(text, numbers(MIB // 4))
    assert is_born(array)
    assert is_born(text)


# -- contexts -------------------------------------------------------------------------


def test_blocks_nest_and_end_with_an_exception():
    with forkshm.shared_allocations(min_bytes=1000):
        with pytest.raises(KeyError), forkshm.shared_allocations(min_bytes=10_000):
            assert not is_born(np.ones(1000, "u1"))
            raise KeyError
        assert is_born(np.ones(1000, "u1"))
    assert not is_born(np.ones(LARGE))


def test_a_function_can_be_such_a_block():
    @forkshm.shared_allocations()
    def make(levels):
        return [numbers(), *(make(levels - 1) if levels else [])]

    assert all(map(is_born, make(2)))
    assert not is_born(numbers())


def test_other_threads_are_not_in_the_block_and_may_let_go():
    held = []
    outcome = []

    def other():
        held.clear()
        outcome.append(is_born(numbers()))
        with forkshm.shared_allocations():
            held.append(numbers())

    with forkshm.shared_allocations():
        held.append(numbers())
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert outcome == [False]
    assert arena.statistics().blocks == 1
    assert is_born(held[0])


def test_tasks_of_asyncio_have_blocks_of_their_own():
    async def make(turns):
        with forkshm.shared_allocations():
            for _ in range(turns):
                await asyncio.sleep(0)
            return is_born(numbers())

    async def both():
        without = asyncio.create_task(asyncio.sleep(0, is_born(numbers())))
        return await asyncio.gather(make(3), make(1)), await without, is_born(numbers())

    assert asyncio.run(both()) == ([True, True], False, False)


def test_many_threads_make_and_pass_them_on():
    def work(seed):
        generator = np.random.default_rng(seed)
        with forkshm.shared_allocations(min_bytes=5000):
            for _ in range(60):
                count = int(generator.integers(1, 5000))
                made.append((np.full(count, seed), seed, count))
                array, value, length = made.pop(0)
                if not (len(array) == length and (array == value).all()):
                    wrong.append(value)

    made, wrong = [], []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- what may go wrong ----------------------------------------------------------------


def test_allocations_under_the_lock_get_ordinary_memory():
    with forkshm.shared_allocations():
        array = numbers()
        with guard:  # like the garbage collector in the middle of a change
            made = numbers()
            del array
        assert not is_born(made)
        assert np.array_equal(made, numbers())
    assert arena.statistics().blocks == 0


def test_without_memory_or_fds_arrays_are_ordinary(monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    with forkshm.shared_allocations():
        array = numbers(10)
        monkeypatch.setattr(_segment.kernel, "lock_shared", refuse)
        made = np.zeros(LARGE)
        array.resize(LARGE, refcheck=False)
        monkeypatch.undo()
        assert (is_born(made), is_born(array)) == (False, False)
        assert np.array_equal(array[:10], numbers(10))
        born = numbers()
        monkeypatch.setattr(_segment.kernel, "lock_shared", refuse)
        born.resize(4 * LARGE, refcheck=False)
    assert np.array_equal(born[:LARGE], numbers())
    assert not is_born(born)


def test_at_the_limit_on_files_arrays_are_ordinary(run_script):
    run_script("""
import os, resource
import numpy as np
import forkshm
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with forkshm.shared_allocations():
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    arrays = [np.full(2**18, value) for value in range(5)]
    assert [int(array.sum()) >> 18 for array in arrays] == list(range(5))
    for fd in taken:
        os.close(fd)
    with forkshm.Pool(1) as pool:
        assert pool.apply(np.sum, (arrays[4],)) == 2**20
""")


def test_an_allocation_that_numpy_cannot_make_is_a_memory_error():
    with forkshm.shared_allocations():
        array = numbers()
        for make in (lambda: np.empty(2**58), lambda: np.zeros(2**58), lambda: array.resize(2**57, refcheck=False)):
            with pytest.raises(MemoryError):
                make()
        assert np.array_equal(array, numbers())


def test_an_exception_passes_by_arrays_that_are_let_go_on_its_way():
    def fail():
        raise LookupError("this one")

    with forkshm.shared_allocations():
        for _ in range(20):
            with pytest.raises(LookupError, match="this one"):
                (numbers() + 1, [numbers()], fail())
    assert arena.statistics().blocks == 0


class Ring(Exception):
    pass


@pytest.mark.parametrize("event", ["made", "zeros", "resized", "let go"])
def test_an_exception_of_a_signal_handler_is_not_lost(event, monkeypatch, capfd):
    """A signal that arrives while C code runs is handled in the callback, which must not raise."""

    def ring(*_):
        raise Ring

    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: lost.append(unraisable))
    lost = []
    old = signal.signal(signal.SIGUSR1, ring)
    try:
        with forkshm.shared_allocations():
            for _ in range(20):
                held = [numbers()]
                what = {
                    "made": map(np.empty, [LARGE]),
                    "zeros": map(np.zeros, [LARGE]),
                    "resized": itertools.starmap(functools.partial(held[0].resize, refcheck=False), [(2 * LARGE,)]),
                    "let go": map(list.clear, [held]),
                }[event]
                # One C call: no check for signals between the two.
                both = itertools.chain(map(_thread.interrupt_main, [signal.SIGUSR1]), what)
                del what
                with pytest.raises(Ring):
                    list(both)
                    for _ in range(10):
                        pass
                assert next(both, None) is None
                del both
                if event == "let go":
                    assert held == []
                    assert arena.statistics().blocks == 0
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert lost == []
    assert capfd.readouterr().err == ""


def test_at_the_limit_of_recursion_there_is_an_exception_and_no_crash(run_script):
    # ctypes reports on stderr a callback that cannot be entered.
    run_script("""
import sys
import numpy as np
import forkshm
sys.unraisablehook = lambda unraisable: None
def deeper(array):
    return deeper(array + 1)
with forkshm.shared_allocations(min_bytes=1000):
    for limit in range(150, 175):
        sys.setrecursionlimit(limit)
        try:
            deeper(np.zeros(200))
        except RecursionError:
            pass
        else:
            raise SystemExit("no limit")
    sys.setrecursionlimit(1000)
    assert (np.ones(1000) + 1).sum() == 2000
""")


EXIT = """
import atexit, os, sys, threading
import numpy as np
{early}
import forkshm
hold = forkshm.shared_allocations()
hold.__enter__()
arrays = [np.full(2**18, value) for value in range(5)]
sys.kept_to_the_end = arrays[0] + 1
class Last:
    def __del__(self, make=np.empty, kept=arrays[1], write=os.write):
        small, large = make(10), make(2**18)
        large[:] = kept
        large *= 2
        try:
            kept.resize(5, refcheck=False)
        except MemoryError:  # memory of ours is left alone by then
            write(1, b"last")
last = Last()
cycle = [np.ones(2**18)]
cycle.append(cycle)
started = threading.Event()
def work(share=forkshm.shared_allocations, make=np.ones):
    with share(min_bytes=1000):
        while True:
            made = [make(count) for count in (10, 500, 2**18)]
            started.set()
if {daemon}:
    threading.Thread(target=work, daemon=True).start()
    started.wait()
"""


@pytest.mark.parametrize("daemon", [False, True], ids=["alone", "daemon thread"])
@pytest.mark.parametrize("mode", ["", "dev"])
def test_the_program_ends_with_arrays_alive(tmp_path, daemon, mode):
    path = tmp_path / "script.py"
    path.write_text(EXIT.format(daemon=daemon, early="atexit.register(lambda: np.ones(2**18) + arrays[0])"))
    for _ in range(2 if daemon else 1):
        done = subprocess.run(
            [sys.executable, *(["-X", "dev"] if mode else []), str(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "last", "")


# -- where the hook is unavailable -----------------------------------------------------


@pytest.mark.parametrize("ask", ["forkshm.shared_allocations()", "forkshm.Pool(1, born_shared=True)"])
def test_without_numpy_the_error_names_numpy(run_script, ask):
    run_script(f"""
import sys
sys.modules["numpy"] = None
import forkshm
try:
    {ask}
except forkshm.errors.MissingDependencyError as error:
    assert error.extra == "numpy" and "pip install" in str(error), error
else:
    raise SystemExit("no exception")
""")


@pytest.mark.parametrize("ask", [lambda: forkshm.shared_allocations(), lambda: forkshm.Pool(1, born_shared=True)])
@pytest.mark.parametrize(
    ("where", "name", "value", "says"),
    [
        (numpy_hook.platform, "machine", lambda: "sparc64", "this is sparc64"),
        (numpy_hook, "_in_main_interpreter", lambda: False, "subinterpreter"),
        (numpy_memory.importlib, "import_module", lambda name: object(), "get_handler_name"),
    ],
)
def test_an_unusable_hook_raises_with_the_reason(monkeypatch, ask, where, name, value, says):
    monkeypatch.setattr(numpy_memory, "_hooks", [])
    monkeypatch.setattr(numpy_memory, "_handlers", {})
    monkeypatch.setattr(where, name, value)
    with pytest.raises(forkshm.UnsupportedError, match=says) as caught:
        ask()
    assert caught.value.capability == "born_shared"
    assert np.__version__ in str(caught.value)
