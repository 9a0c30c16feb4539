"""RLIMIT_FSIZE (``ulimit -f``): small memory works, and errors for larger memory name the limit."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.needs("memfd")
pytest.importorskip("numpy")


def test_small_things_work_and_large_ones_name_the_limit(run_script):
    said = run_script("""
import json, os, resource, sys, tempfile
sys.dont_write_bytecode = True
path = os.path.join(tempfile.mkdtemp(), "trace.json")
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
import numpy as np
import forkshm
with forkshm.Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
    assert pool.apply(np.sum, (np.ones(50_000),)) == 50_000
    try:
        pool.apply(np.sum, (np.ones(2**20),))
    except forkshm.errors.RegionCreateError as error:
        assert "ulimit -f, RLIMIT_FSIZE" in str(error), error
    else:
        raise AssertionError
    with pool.trace(path):
        assert pool.map(abs, range(10), chunksize=1) == list(range(10))
json.load(open(path))
with forkshm.Executor(2) as executor:
    assert executor.submit(abs, -1).result() == 1
queue = forkshm.Queue()
queue.put(np.ones(1000))
assert queue.get().sum() == 1000
queue.close()
with forkshm.Lock():
    assert forkshm.zeros(1000).sum() == 0
try:
    forkshm.zeros(2**20)
except forkshm.errors.RegionCreateError as error:
    assert "ulimit -f, RLIMIT_FSIZE" in str(error), error
else:
    raise AssertionError
print("ok")
""")
    assert said.strip() == "ok"


def test_the_error_of_memory_with_a_name_names_the_limit(run_script):
    said = run_script("""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
from forkshm.shared_memory import SharedMemory
try:
    SharedMemory(create=True, size=2**21)
except OSError as error:
    print(error)
""")
    assert "to 2,097,152 bytes" in said
    assert "ulimit -f, RLIMIT_FSIZE" in said


def test_locks_and_values_need_less_where_the_limit_is_low(run_script):
    said = run_script("""
import resource, sys
sys.dont_write_bytecode = True  # Python would leave it incomplete
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
import forkshm
locks = [forkshm.Lock() for _ in range(500)]
value, array, event = forkshm.Value("i", 5), forkshm.Array("d", 100), forkshm.Event()
process = forkshm.Process(target=event.set)
process.start()
assert event.wait(20)
process.join()
with locks[0], locks[-1], value.get_lock():
    print(value.value, len(array))
""")
    assert said.strip() == "5 100"


@pytest.mark.parametrize("limit", [128 * 1024, 64 * 1024, 40 * 1024])
def test_pools_need_less_where_the_limit_is_low(run_script, limit):
    said = run_script(f"""
import resource, sys
import forkshm
sys.dont_write_bytecode = True
def raises(x):
    raise ValueError(x)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
with forkshm.Pool(3) as pool:
    assert pool.map(abs, range(-2000, 0), chunksize=1) == list(range(2000, 0, -1))
    assert pool.map("x".__mul__, [1, 3000, 20_000]) == ["x", "x" * 3000, "x" * 20_000]
    try:
        pool.apply(raises, (1,))
    except ValueError as error:
        print(error)
""")
    assert said.strip() == "1"


def test_the_error_of_a_pool_beyond_the_limit_names_its_size(run_script):
    said = run_script("""
import resource, sys
import forkshm
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
try:
    forkshm.Pool(2)
except forkshm.errors.RegionCreateError as error:
    print(error)
""")
    assert "cannot map 37,120 bytes" in said
    assert "ulimit -f" in said
