"""Launched workers: a function in several ranked processes."""

from __future__ import annotations

import os
import signal
import sys

import pytest

import forkshm
from forkshm.errors import RemoteTraceback, TeamBrokenError, WorkerDiedError

pytestmark = pytest.mark.slow

np = pytest.importorskip("numpy")


class Boom(Exception):
    pass


EVERYWHERE = """
import sys
import forkshm
from forkshm.testing import check_leaks

class Boom(Exception):
    pass

def meet(rank, base, out):
    me = forkshm.worker()
    assert (me.rank, me.size) == (rank, 3)
    table = me.array("table", (3, 4), "int64")
    table[rank] = base + rank
    me.barrier()
    out[rank] = table.sum()
    assert me.reduce(rank) == 3

def boom(rank):
    if rank == 1:
        raise Boom(rank)
    forkshm.worker().barrier()

if __name__ == "__main__":
    method = sys.argv[1]
    warm = forkshm.get_context(method).Process()
    warm.start()
    warm.join()
    warm.close()
    with check_leaks():
        out = forkshm.zeros(3, int)
        forkshm.launch(meet, (5, out), 3, start_method=method)
        print(out)
        try:
            forkshm.launch(boom, workers=2, start_method=method)
        except Boom as error:
            print(error, "worker 1 of 2 raised:" in str(error.__cause__))
        del out
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.slow
def test_workers_meet_under_every_start_method(method, run_script):
    assert run_script(EVERYWHERE, method) == "[72 72 72]\n1 True\n"


def boom(rank):
    if rank == 1:
        raise Boom(rank)
    forkshm.worker().barrier()


def test_the_first_failure_is_raised_with_rank_and_traceback():
    with pytest.raises(Boom) as raised:
        forkshm.launch(boom, workers=3)
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert "worker 1 of 3 raised:" in str(raised.value.__cause__)
    assert "raise Boom(rank)" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("end", "exitcode", "signame"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, "SIGKILL"),
        (lambda: sys.exit(3), 3, None),
        (lambda: os._exit(0), 0, None),
    ],
    ids=["killed", "exit code", "left unsaid"],
)
def test_the_first_death_is_raised_and_stops_the_rest(end, exitcode, signame):
    pids = forkshm.zeros(2, int)

    def work(rank):
        pids[rank] = os.getpid()
        forkshm.worker().barrier()
        if rank == 1:
            end()
        signal.pause()

    with pytest.raises(WorkerDiedError, match=r"worker 1 of 2 .* while running .*work\(\)") as raised:
        forkshm.launch(work, workers=2)
    assert (raised.value.rank, raised.value.exitcode, raised.value.signal) == (1, exitcode, signame)
    assert raised.value.pid == pids[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids[0]), 0)


def test_a_worker_that_ignores_sigterm_is_killed():
    def work(rank):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forkshm.worker().barrier()
        if rank == 0:
            raise Boom(0)
        while True:
            signal.pause()

    with pytest.raises(Boom):
        forkshm.launch(work, workers=2)


def test_exit_code_0_is_a_good_end():
    forkshm.launch(lambda rank: sys.exit(), workers=2)
    forkshm.launch(lambda rank: sys.exit(0), workers=2)


def test_a_handle_is_joined_later(wait_until):
    go = forkshm.zeros(1, int)

    def work(rank, wait):
        wait(lambda: go[0])

    launched = forkshm.launch(work, (wait_until,), 2, join=False)
    assert repr(launched) == "<Launch of 2 workers, 2 running>"
    assert sorted(launched.pids) == [0, 1]
    assert not launched.join(timeout=0)
    go[0] = 1
    assert launched.join()
    assert launched.pids == {}
    launched.terminate()


def test_leaving_a_block_joins_and_an_exception_ends_the_workers():
    with forkshm.launch(lambda rank: None, workers=2, join=False):
        pass
    with pytest.raises(Boom), forkshm.launch(lambda rank: signal.pause(), workers=2, join=False) as launched:
        pids = launched.pids
        raise Boom
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_a_collected_handle():
    launched = forkshm.launch(lambda rank: signal.pause(), workers=2, join=False)
    pids = launched.pids
    del launched
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_array_of_another_shape_under_the_same_name_is_refused():
    def work(rank):
        me = forkshm.worker()
        assert me.array("empty", 0).shape == (0,)
        first = me.array("a", 2000)
        first[rank] = 1
        me.barrier()
        assert (me.array("a", (2000,), "float64")[:2] == 1).all()
        assert not me.array("b", 2000).any()
        me.array("a", 2001)

    with pytest.raises(ValueError, match=r"cannot use 'a' for .*2001.*: it already exists as .* \(2000,\)"):
        forkshm.launch(work, workers=2)


def test_a_worker_killed_while_creating_an_array_affects_no_other():
    def work(rank):
        me = forkshm.worker()
        if rank == 2:
            with me._team_state.guard:
                os.kill(os.getpid(), signal.SIGKILL)
        for number in range(50):
            me.array(f"array {number}", 10)[rank] = number
        with pytest.raises(TeamBrokenError):
            me.barrier()
        for number in range(50):
            assert me.array(f"array {number}", 10)[rank] == number
        me._team_state.states[2] = 1  # the state of a running worker

    with pytest.raises(WorkerDiedError, match="worker 2"):
        forkshm.launch(work, workers=3)


def test_a_worker_alone(run_script):
    script = """
import forkshm, os
from forkshm.testing import check_leaks
me = forkshm.worker()
assert (me.rank, me.size) == (0, 1)
assert me is forkshm.worker()
me.barrier()
assert me.reduce(5) == 5 and me.single() and list(me.range(3)) == [0, 1, 2]
a = me.array("a", 3)
a[:] = 1
assert me.array("a", 3).sum() == 3
if os.fork() == 0:
    child = forkshm.worker()
    assert child is not me and not child.array("a", 3).any()
    os._exit(0)
assert os.wait()[1] == 0
print(me)
"""
    assert run_script(script) == "<Worker 0 of 1>\n"


@pytest.mark.parametrize("workers", [0, -3])
def test_nonsense_is_refused(workers):
    with pytest.raises(ValueError, match="at least 1"):
        forkshm.launch(boom, workers=workers)
    with pytest.raises(TypeError, match="callable"):
        forkshm.launch(3)
    with pytest.raises(ValueError, match="knife"):
        forkshm.launch(boom, start_method="knife")
