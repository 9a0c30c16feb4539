"""``Pool(retries=...)``: the task of a dead worker is repeated."""

import os
import signal

import functions as f
import numpy as np
import pytest

import forkshm
from forkshm import WorkerDiedError
from forkshm.region.blocks._arena import arena


@pytest.fixture
def patient(_warm_up):
    with forkshm.Pool(2, retries=2) as pool:
        yield pool


def test_a_task_whose_worker_dies_is_repeated(patient, tmp_path):
    assert patient.apply(f.die_once, (tmp_path / "apply", 5)) == 5
    calls = [(tmp_path / f"map{x}", x) for x in range(10)]
    assert patient.starmap(f.die_once, calls, chunksize=1) == list(range(10))
    lazy = patient.imap(lambda x: f.die_once(tmp_path / f"imap{x}", x), range(10))
    assert list(lazy) == list(range(10))
    result = patient.apply_async(f.die_once, (tmp_path / "async", 6))
    assert result.get() == 6
    assert patient.statistics().workers_replaced == 22


def test_the_last_death_fails_the_task_and_says_how_many_there_were(patient):
    with pytest.raises(WorkerDiedError, match=r"die\('SIGKILL'\), which has now killed 3 workers") as caught:
        patient.apply(f.die, ("SIGKILL",))
    assert caught.value.attempts == 3
    assert patient.apply(f.square, (3,)) == 9


def test_a_task_that_raises_is_not_repeated(patient, tmp_path):
    def work():
        f.touch_file(tmp_path / "marks", 1)
        raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        patient.apply(work)
    assert (tmp_path / "marks").read_text() == "1\n"


def test_the_writes_of_the_dead_do_not_show(patient, tmp_path):
    def work(array, path):
        array += 1
        captured[:] += 1
        f.die_once(path, None)
        return float(array.sum()), float(captured.sum())

    captured, large, small = np.zeros(200_000), np.zeros(200_000), np.zeros(10)
    assert patient.apply(work, (large, tmp_path / "a")) == (200_000.0, 200_000.0)
    assert patient.apply(work, (small, tmp_path / "b")) == (10.0, 200_000.0)
    arrived = patient.apply(np.zeros, (200_000,))  # a received copy, which is sent on
    assert patient.apply(work, (arrived, tmp_path / "c")) == (200_000.0, 200_000.0)
    calls = [(large, tmp_path / f"d{x}") for x in range(4)]  # one copy for all calls
    assert patient.starmap(work, calls, chunksize=1)[3][0] == 200_000.0
    assert (large == 0).all()
    assert (arrived == 0).all()


def test_a_repeated_task_gets_the_original_arguments(patient, tmp_path):
    """Later changes of the arguments have no effect."""
    go, begun = tmp_path / "go", tmp_path / "begun"

    def work(array):
        if f.die_is_due(tmp_path / "once"):
            f.hold(begun, go)
            os.kill(os.getpid(), signal.SIGKILL)
        return float(array[0])

    array = np.zeros(200_000)
    result = patient.apply_async(work, (array,))
    while not begun.exists():
        result.wait(0.01)
    array[:] = 7
    go.touch()
    assert result.get() == 0.0


def test_the_order_is_kept_and_every_item_is_answered_once(patient, tmp_path):
    def work(x):
        if x % 7 == 0:
            f.die_once(tmp_path / str(x), x)
        return x * x

    assert patient.map(work, range(100)) == [x * x for x in range(100)]
    unordered = list(patient.imap_unordered(work, range(100, 150)))
    assert sorted(unordered) == [x * x for x in range(100, 150)]


def test_nothing_is_kept_for_a_task_that_was_answered(patient, tmp_path, wait_until):
    for x in range(3):
        patient.apply(f.die_once, (tmp_path / str(x), 1), {})
        with pytest.raises(WorkerDiedError):
            patient.apply(lambda _: f.end("SIGKILL"), (np.ones(200_000),))
    # The kernel takes some time to drop the messages of a killed process.
    wait_until(lambda: arena.statistics().blocks == 0)


def test_a_pool_that_is_closed_still_tries_again(tmp_path):
    pool = forkshm.Pool(1, retries=1)
    result = pool.apply_async(f.die_once, (tmp_path / "mark", 5))
    pool.close()
    pool.join()
    assert result.get() == 5


def test_by_default_nothing_is_done_twice(pool, tmp_path):
    with pytest.raises(WorkerDiedError):
        pool.apply(f.die_once, (tmp_path / "mark", 5))


@pytest.mark.parametrize(("retries", "error"), [(-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_a_bad_number_is_refused(retries, error):
    with pytest.raises(error, match=r"retries|integer"):
        forkshm.Pool(1, retries=retries)
