"""Few open files: what still works, and which errors name the limit."""

from __future__ import annotations

import builtins

import pytest
from room import needs_fds

import forkshm

pytestmark = pytest.mark.slow

PROLOGUE = """
import resource, sys
HARD = {hard}
resource.setrlimit(resource.RLIMIT_NOFILE, (256, HARD))
import numpy as np
import forkshm

def total(arrays):
    return float(sum(array[0] for array in arrays))

def made(count):
    return [forkshm.full(10, float(number)) for number in range(count)]
"""

# The largest hard limit here.
ANY = "resource.getrlimit(resource.RLIMIT_NOFILE)[1]"
EXPECTED = float(sum(range(1000)))


@pytest.mark.needs("file_limits")
def test_1000_shared_arrays_cross_when_the_soft_limit_is_256(run_script):
    needs_fds(2100)
    run_script(
        PROLOGUE.format(hard=ANY)
        + f"""
with forkshm.Pool(2) as pool:
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, HARD), "it was raised before there was need"
    arrays = made(1000)
    assert pool.apply(total, (arrays,)) == {EXPECTED}
    assert pool.map(total, [arrays, arrays]) == [{EXPECTED}] * 2
    back = pool.apply(made, (1000,))
    assert total(back) == {EXPECTED}
    back[7][0] = 0
"""
    )


@pytest.mark.needs("file_limits")
def test_1000_arrays_of_one_region_cross_when_the_hard_limit_is_256(run_script):
    run_script(
        PROLOGUE.format(hard=256)
        + f"""
with forkshm.Pool(2) as pool:
    whole = forkshm.zeros((1000, 10))
    arrays = list(whole)
    whole[:, 0] = range(1000)
    assert pool.apply(total, (arrays,)) == {EXPECTED}
    plain = [np.full(10_000, float(number)) for number in range(1000)]
    assert pool.apply(total, (plain,)) == {EXPECTED}
"""
    )


@pytest.mark.needs("file_limits")
def test_regions_beyond_a_hard_limit_raise_with_their_number_and_advice(run_script):
    out = run_script(
        PROLOGUE.format(hard=256)
        + """
held = []
try:
    while True:
        held.append(forkshm.anonymous_shared_memory(2**21))
except forkshm.errors.RegionCreateError as error:
    print(error.errno, len(held), error)
held.clear()
assert forkshm.zeros(10).sum() == 0
"""
    )
    errno, count, message = out.split(maxsplit=2)
    assert errno == "24"
    assert int(count) > 240
    assert f"{count} of them for regions" in message
    assert "ulimit -n" in message


@pytest.mark.needs("file_limits")
def test_a_worker_that_cannot_hold_all_says_so_and_the_pool_goes_on(run_script):
    out = run_script(
        PROLOGUE.format(hard=256)
        + """
import os
def fill():
    global kept
    kept = [os.dup(0) for _ in range(170)]
with forkshm.Pool(1) as pool:
    arrays = made(180)
    pool.apply(fill)
    try:
        pool.apply(total, (arrays,))
    except forkshm.errors.RegionGoneError as error:
        print(error)
    del arrays[30:]
    assert pool.apply(total, (arrays,)) == 435.0
"""
    )
    assert "memory objects and only" in out
    assert "EMFILE" in out


@pytest.mark.needs("file_limits")
@pytest.mark.parametrize("hard", [256, ANY], ids=["256", "any"])
def test_a_thousand_tasks_that_each_copy_are_no_matter(run_script, hard):
    run_script(
        PROLOGUE.format(hard=hard)
        + """
with forkshm.Pool(2) as pool:
    answers = [pool.apply_async(np.sum, (np.full(10_000, float(n)),)) for n in range(1000)]
    assert [answer.get() for answer in answers] == [n * 10_000.0 for n in range(1000)]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (256, HARD)
"""
    )


@pytest.mark.needs("file_limits")
def test_1000_shared_arrays_cross_when_the_hard_limit_is_256(run_script):
    run_script(
        PROLOGUE.format(hard=256)
        + f"""
import os
with forkshm.Pool(2) as pool:
    arrays = made(1000)
    assert all(type(array) is forkshm.SharedArray and array.region.size == 80 for array in arrays)
    assert forkshm.statistics().descriptors < 250
    assert pool.apply(total, (arrays,)) == {EXPECTED}
    assert pool.map(total, [arrays, arrays]) == [{EXPECTED}] * 2
    def clear(some):
        for array in some:
            array[0] = 0
    pool.apply(clear, (arrays[500:],))
    assert total(arrays) == sum(range(500))
    del arrays
    back = pool.apply(made, (1000,))
    assert total(back) == {EXPECTED}
    back[7][0] = 0
    del back
    open("/dev/null").close()
assert forkshm.statistics().regions == 0
links = [f"/proc/self/fd/{{number}}" for number in range(256)]
assert not [link for link in links if os.path.islink(link) and "small-regions" in os.readlink(link)], "memory is left"
assert made(3)[2][0] == 2.0
"""
    )


@pytest.mark.needs("file_limits")
def test_regions_of_the_commons_are_apart_in_parent_and_child_and_cannot_be_sealed(run_script):
    run_script(
        PROLOGUE.format(hard=256)
        + """
import os
kept = made(200)
common = forkshm.anonymous_shared_memory(5000)
assert common.offset > 0 and common.sealed is False
try:
    common.seal()
except forkshm.UnsupportedError:
    pass
else:
    raise SystemExit("it was sealed, and the others with it")
pid = os.fork()
if pid == 0:
    mine = [forkshm.full(10, -1.0) for _ in range(50)]
    os._exit(0)
theirs = [forkshm.full(10, 5.0) for _ in range(50)]
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert all((array == 5.0).all() for array in theirs)
assert total(kept) == sum(range(200))
common.buf[:] = bytes(5000)
"""
    )


def test_parts_of_one_file_have_one_fd_for_reading_and_one_for_writing(pool, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    with forkshm.FileMapping(path, "read_only") as for_reading, forkshm.FileMapping(path, "read_write") as for_writing:
        regions = [forkshm.MappedRegion(for_reading, "read_only", offset=n, size=100) for n in range(10)]
        regions += [forkshm.MappedRegion(for_writing, "read_write", offset=4096 + n, size=100) for n in range(10)]

    def write(regions):
        assert [region.buf[0] for region in regions] == [n % 256 for n in [*range(10), *range(10)]]
        regions[15].buf[7] = 99
        return {region.fileno() for region in regions}

    assert len(pool.apply(write, (regions,))) == 2
    assert regions[15].buf[7] == 99


def test_a_part_keeps_the_fd_that_others_let_go():
    with forkshm.anonymous_shared_memory(3 * 4096) as whole:
        parts = [forkshm.MappedRegion(whole, "read_write", offset=n * 4096, size=4096) for n in range(3)]

    def keep_last(regions):
        builtins.kept = regions.pop()  # of the worker

    def write_and_return():
        builtins.kept.buf[0] = 55
        return builtins.kept

    with forkshm.Pool(1) as pool:
        pool.apply(keep_last, (parts,))
        back = pool.apply(write_and_return)
    assert (parts[2].buf[0], back.buf[0]) == (55, 55)


def test_arrays_come_back_to_a_process_that_has_them_and_no_room_for_their_fds(run_script):
    needs_fds(1500)
    run_script(
        """
import resource
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1500, HARD))
import forkshm

def back(arrays):
    arrays[5][0] = 77
    return arrays

def with_another(arrays):
    return [*arrays, forkshm.zeros(3)]

with forkshm.Pool(1) as pool:
    pool.apply(len, ([],))
    arrays = [forkshm.full(10, float(number)) for number in range(400)]
    assert len({array.region.fileno() for array in arrays}) == 400
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
    there = pool.apply(back, (arrays,))
    assert all(one.region is other.region for one, other in zip(arrays, there))
    assert arrays[5][0] == 77
    try:
        pool.apply(with_another, (arrays,))
    except forkshm.errors.RegionGoneError as error:
        assert "memory objects and only" in str(error), error
    else:
        raise AssertionError("an object that is not here, and no fd for it")
    assert pool.apply(len, (arrays,)) == 400
"""
    )


@pytest.mark.needs("file_limits")
def test_200_shared_arrays_cross_when_the_hard_limit_is_64(run_script):
    said = run_script("""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
import forkshm

def total(arrays):
    return float(sum(array[-1] for array in arrays))

if __name__ == "__main__":
    with forkshm.Pool(2) as pool:
        arrays = [forkshm.full(20_000, number) for number in range(200)]
        print(pool.apply(total, (arrays,)), sum(pool.map(np.max, arrays)))
""")
    assert said.strip() == "19900.0 19900"
