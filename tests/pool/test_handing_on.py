"""Copies that are sent on travel by descriptor, and stay copies: no process sees another's writes."""

from __future__ import annotations

import gc
import os

import pytest
from functions import echo

import forkshm
from forkshm.region.blocks import _claim, _segment
from forkshm.region.blocks._arena import arena

np = pytest.importorskip("numpy")

MIB = 2**20


def numbers():
    return np.arange(MIB // 8, dtype=float)


def block_of(array):
    """Return the identity of the segment and the offset of the block that an array is in."""
    claim = _claim.claim_at(array.ctypes.data)
    return claim and (claim.segment.identity, claim.offset)


def returned(array):
    return array


kept = []


def keep(array):
    kept.append(array)
    return array


def change_kept(value):
    kept[0][:] = value


def read_kept():
    return float(kept[0][5]), kept.clear()


@pytest.mark.needs("written_pages")
def test_an_array_that_is_returned_is_copied_once_only(pool):
    sent = numbers()
    before = pool.statistics()
    answer = pool.apply(returned, (sent,))
    after = pool.statistics()
    assert np.array_equal(answer, sent)
    assert after.bytes_copied - before.bytes_copied == sent.nbytes
    assert after.bytes_shared - before.bytes_shared == sent.nbytes
    assert answer.flags.writeable


def test_an_array_dropped_by_the_worker_belongs_to_the_parent(pool):
    answer = pool.apply(returned, (numbers(),))
    assert _claim.claim_at(answer.ctypes.data).share is _claim.Share.exclusive


def test_sender_and_receiver_of_a_kept_array_see_only_their_own_writes():
    with forkshm.Pool(1) as pool:
        answer = pool.apply(keep, (numbers(),))
        answer[5] = -1
        assert pool.apply(read_kept) == (5.0, None)
        answer = pool.apply(keep, (numbers(),))
        pool.apply(change_kept, (7,))
        assert np.array_equal(answer, numbers())
        assert pool.apply(read_kept) == (7.0, None)


def test_writes_after_sending_on_are_private_to_the_sender(pool):
    first = pool.apply(returned, (numbers(),))
    pending = pool.apply_async(returned, (first,))
    first[:] = 0
    second = pending.get()
    assert np.array_equal(second, numbers())
    second[:] = 1
    assert first.sum() == 0


def test_changes_before_sending_on_arrive(pool):
    first = pool.apply(returned, (numbers(),))
    first[100] = -1
    second = pool.apply(returned, (first,))
    assert second[100] == -1
    # Now the array is mapped copy-on-write here, and its own writes are in no block.
    first[200] = -2
    third = pool.apply(returned, (first,))
    assert (third[100], third[200], third[300]) == (-1, -2, 300)
    assert second[200] == 200


@pytest.mark.needs("written_pages")
@pytest.mark.needs("pagemap")
def test_a_slice_of_a_received_array_is_sent_on_without_a_copy(pool):
    first = pool.apply(returned, (numbers(),))
    before = pool.statistics()
    part = pool.apply(returned, (first[1000:50_000],))
    assert pool.statistics().bytes_copied == before.bytes_copied
    assert np.array_equal(part, numbers()[1000:50_000])


def test_few_bytes_of_a_large_block_are_copied(pool):
    first = pool.apply(returned, (numbers(),))
    part = pool.apply(returned, (first[:100],))
    del first
    gc.collect()
    assert block_of(part) is None


@pytest.mark.needs("written_pages")
@pytest.mark.needs("pagemap")
def test_the_memory_comes_back_when_the_last_has_let_go(pool, wait_until):
    sent = numbers()
    answer = pool.apply(returned, (sent,))
    again = pool.apply(returned, (answer,))
    assert arena.statistics().blocks == 1
    del answer
    assert np.array_equal(again, sent)
    assert arena.statistics().blocks == 1
    del again
    gc.collect()
    # The worker closes its lease after it has answered, which may be a moment later.
    wait_until(lambda: arena.statistics().blocks == 0)


def test_a_block_made_private_is_reused(pool):
    for value in range(5):
        first = pool.apply(returned, (np.full(MIB, value),))
        second = pool.apply(returned, (first,))
        first[:] = -1
        assert (second == value).all()
        del first, second


@pytest.mark.needs("written_pages")
def test_closures_and_arrays_with_many_receivers_are_sent_on(pool):
    answers = pool.map(returned, [numbers()] * 3, chunksize=1)
    big = answers[0]
    before = pool.statistics().bytes_copied
    assert pool.map(lambda index: float(big[index]), range(20), chunksize=1) == list(map(float, range(20)))
    assert pool.statistics().bytes_copied == before


@pytest.mark.needs("inheritance")
def test_a_forked_child_does_not_see_writes_to_a_copy(pool, in_child):
    answer = pool.apply(returned, (numbers(),))

    def child():
        answer[3] = -3
        return answer[4] != 4

    assert in_child(child) == 0
    assert answer[3] == 3
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0 if answer[7] == 7 else 1)
    os.close(read_end)
    answer[7] = -7
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_handed_on_through_three_processes(pool):
    def through(array, levels):
        if not levels:
            return array
        with forkshm.Pool(1) as inner:
            return inner.apply(through, (array, levels - 1))

    sent = numbers()
    answer = pool.apply(through, (sent, 2))
    assert np.array_equal(answer, sent)
    answer[:] = 0


@pytest.mark.needs("written_pages")
def test_pages_that_could_not_be_mapped_back_are_mapped_before_the_next_use(pool, monkeypatch):
    first = pool.apply(returned, (numbers(),))
    second = pool.apply(returned, (first,))  # first is copy-on-write now
    real = _segment.kernel.replace
    refusals = []

    def refuse(address, *args):
        refusals.append(address)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_segment.kernel, "replace", refuse)
    first[:] = 9
    address = first.ctypes.data
    del first, second
    gc.collect()
    assert refusals == [address - address % 4096]
    with pytest.raises(OSError, match="Cannot allocate"):
        pool.apply(returned, (numbers(),))
    monkeypatch.setattr(_segment.kernel, "replace", real)
    assert np.array_equal(pool.apply(returned, (numbers(),)), numbers())


@pytest.mark.needs("written_pages")
def test_echo_of_many_containers(pool):
    sent = {"a": numbers(), "b": [numbers() + 1, numbers() + 2]}
    before = pool.statistics().bytes_copied
    (answer,), _ = pool.apply(echo, (sent,))
    assert pool.statistics().bytes_copied - before == 3 * sent["a"].nbytes
    assert np.array_equal(answer["b"][1], sent["b"][1])


# -- arguments shared by several tasks of a call -------------------------------------------


def total(array, index):
    return float(array[index]), array.flags.writeable


def overwrite(array, index):
    before = float(array[index])
    array[:] = -1
    return before


def total_of(holder):
    return float(holder["array"].sum())


def test_an_argument_of_many_tasks_is_copied_once(pool):
    big = numbers()
    before = pool.statistics()
    answers = pool.starmap(total, [(big, index) for index in range(40)], chunksize=3)
    assert answers == [(float(index), True) for index in range(40)]
    after = pool.statistics()
    assert after.bytes_copied - before.bytes_copied == big.nbytes
    assert after.bytes_shared - before.bytes_shared == 13 * big.nbytes
    assert arena.statistics().blocks == 0


def test_writes_of_one_task_are_invisible_to_others(pool):
    big = numbers()
    assert pool.starmap(overwrite, [(big, index) for index in range(20)], chunksize=1) == list(map(float, range(20)))
    assert np.array_equal(big, numbers())


@pytest.mark.parametrize("wrap", [dict, list, "object"])
def test_writes_inside_of_common_arguments_are_private(pool, wrap):
    array = numbers()
    holder = {dict: {"array": array}, list: [array, array[5:]], "object": forkshm.view({"array": array}, "read_only")}[
        wrap
    ]
    before = pool.statistics().bytes_copied
    if wrap is list:
        answers = pool.map(lambda pair: float(pair[0].sum()), [holder] * 10, chunksize=1)
    else:
        answers = pool.map(total_of, [holder] * 10, chunksize=1)
    assert answers == [float(array.sum())] * 10
    assert pool.statistics().bytes_copied - before == array.nbytes


def test_a_common_data_frame(pool):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": numbers(), "b": numbers() + 1})
    before = pool.statistics().bytes_copied
    assert pool.map(lambda df: float(df.b[7]), [frame] * 20, chunksize=1) == [8.0] * 20
    assert pool.statistics().bytes_copied - before < 2.1 * numbers().nbytes


def test_different_arguments_are_not_taken_for_one(pool):
    arrays = [np.full(50_000, value) for value in range(20)]
    assert pool.map(lambda array: int(array[-1]), arrays, chunksize=1) == list(range(20))
    # Created again for each item, at the same address.
    assert pool.map(lambda array: int(array[-1]), (np.full(50_000, v) for v in range(20)), chunksize=1) == list(
        range(20)
    )


def test_a_common_argument_that_cannot_be_pickled_fails_the_call(pool):
    class Wrong:
        nbytes = 1 << 20

        def __reduce__(self):
            raise ValueError("no")

    wrong = Wrong()
    with pytest.raises(ValueError, match="no"):
        pool.map(str, [wrong, wrong, 1], chunksize=1)
    assert arena.statistics().blocks == 0
