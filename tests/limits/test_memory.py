"""Little memory, a small or closed /dev/shm, and large amounts of everything."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SMALL_SHM = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
CLOSED_SHM = "mount -t tmpfs -o ro,size=1m tmpfs /dev/shm"

EVERYTHING = """
import os, threading
import numpy as np
import forkshm

def double(array):
    array *= 2
    return array

def locked(mutex, counter):
    for _ in range(100):
        with mutex:
            counter[0] += 1

if __name__ == "__main__":
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 2**20
    shared = forkshm.ones(10_000_000)
    with forkshm.Pool(2) as pool:
        assert pool.apply(np.sum, (shared,)) == 1e7
        assert pool.apply(double, (np.ones(5_000_000),)).sum() == 1e7
        pool.apply(double, (shared,))
        assert pool.map(np.sum, [shared[:4], shared[::2]]) == [8.0, 1e7]
        assert len(pool.apply(bytes, (20_000_000,))) == 20_000_000
        region = forkshm.anonymous_shared_memory(8192)
        mutex = forkshm.region.Mutex(region, 0)
        counter = np.frombuffer(region.buf, "int64", 1, 4096)
        pool.starmap(locked, [(mutex, counter)] * 4)
        assert counter[0] == 400
    queue = forkshm.Queue()
    process = forkshm.Process(target=queue.put, args=(np.ones(3_000_000),))
    process.start()
    assert queue.get().sum() == 3e6
    process.join()
    queue.close()
    queue.join_thread()
    with forkshm.Manager() as manager:
        values = manager.list([shared])
        assert values[0][7] == 2
    print("all of it")
"""

NAMED = """
import errno, forkshm
try:
    with forkshm.SharedMemoryObject("create_only", "forkshm-test-of-limits") as memory:
        try:
            memory.truncate(2**21)
        finally:
            forkshm.SharedMemoryObject.remove("forkshm-test-of-limits")
except OSError as error:
    print(errno.errorcode[error.errno], error)
"""


@pytest.fixture
def with_mount(tmp_path):
    """Run a program with another /dev/shm."""

    def run(mount, source):
        probe = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)
        if probe.returncode:
            pytest.skip(f"no mount namespace of its own for a test: {probe.stderr.strip()}")
        script = tmp_path / "script.py"
        script.write_text(source)
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$1"', sys.executable, str(script)],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.needs("memory_limits")
@pytest.mark.needs("memfd")
@pytest.mark.parametrize("mount", [SMALL_SHM, CLOSED_SHM], ids=["1 MB", "read-only"])
def test_everything_works_whatever_dev_shm_is(with_mount, mount):
    assert with_mount(mount, EVERYTHING).strip() == "all of it"


@pytest.mark.needs("memory_limits")
@pytest.mark.needs("memfd", only="read-only")
@pytest.mark.parametrize(("mount", "said"), [(SMALL_SHM, "ENOSPC"), (CLOSED_SHM, "EROFS")], ids=["1 MB", "read-only"])
def test_memory_with_a_name_says_that_dev_shm_has_no_room(with_mount, mount, said):
    assert with_mount(mount, NAMED).startswith(said)


@pytest.mark.needs("memory_limits")
def test_a_limit_on_address_space_raises_and_smaller_requests_work(run_script):
    out = run_script("""
import resource
import numpy as np
import forkshm

source = np.ones(40_000_000)  # 320 MB
with forkshm.Pool(1) as pool:
    pool.apply(np.sum, (np.ones(1000),))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
    for attempt in (lambda: forkshm.empty(10**9), lambda: pool.apply(np.sum, (source,))):
        try:
            attempt()
        except OSError as error:
            print(error.errno)
    assert pool.apply(np.sum, (np.ones(100_000),)) == 100_000
    assert pool.apply(np.sum, (forkshm.ones(100_000),)) == 100_000
""")
    assert out.split() == [str(errno.ENOMEM)] * 2


@pytest.mark.needs("memory_limits")
def test_a_worker_without_address_space_says_so_and_the_pool_goes_on(run_script):
    run_script("""
import errno, resource
import numpy as np
import forkshm

def limit():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))

shared = forkshm.empty(10**8)  # 800 MB that nobody touches
with forkshm.Pool(1) as pool:
    pool.apply(np.sum, (np.ones(1000),))
    pool.apply(limit)
    late = forkshm.empty(10**8)
    try:
        pool.apply(len, (late,))
    except forkshm.errors.RegionCreateError as error:
        assert error.errno == errno.ENOMEM, error
    else:
        raise SystemExit("800 MB were mapped")
    assert pool.apply(np.sum, (np.ones(100_000),)) == 100_000
""")


@pytest.mark.needs("memory_limits")
def test_ten_thousand_regions_live_at_once(run_script):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 11_000:
        pytest.skip("the hard limit on open files is below 11,000")
    run_script("""
import resource
import forkshm
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
regions = [forkshm.anonymous_shared_memory(1) for _ in range(10_000)]
for number, region in enumerate(regions):
    region.buf[0] = number % 251
assert forkshm.statistics().regions == 10_000
assert all(region.buf[0] == number % 251 for number, region in enumerate(regions))
with forkshm.Pool(1) as pool:
    assert pool.apply(len, (regions[7777],)) == 1
del regions, region
assert forkshm.statistics().regions == 0
""")


AT_THE_LIMIT = """
import ctypes, mmap, os, resource, sys
import numpy as np
import forkshm

def no_mappings():
    with open("/proc/sys/vm/max_map_count") as file:
        count = int(file.read())
    space = mmap.mmap(-1, 2 * (count + 1) * mmap.PAGESIZE, prot=mmap.PROT_READ)
    address = np.frombuffer(space, "uint8").ctypes.data
    mprotect = ctypes.CDLL(None).mprotect
    while mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0:
        address += 2 * mmap.PAGESIZE
    return space

def no_address_space():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))

def fork(arrays, ready, written):
    pid = os.fork()
    if pid == 0:
        os.read(ready, 1)
        seen = [array[0] for array in arrays]
        arrays[1][:] = -1.0
        os._exit(0 if seen == [0.0, 1.0] else 1)
    arrays[0][:] = -1.0
    os.write(written, b".")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if __name__ == "__main__":
    ready, written = os.pipe()
    with forkshm.Pool(1) as pool:
        arrays = [pool.apply(np.full, (100_000, float(number))) for number in range(2)]
        held = globals()[sys.argv[1]]()
        code = fork(arrays, ready, written)
        assert code in (0, os.EX_OSERR), code
        assert [array[0] for array in arrays] == [-1.0, 1.0], "the child's write is seen here"
    os._exit(0)  # without the memory that ending in the usual way takes
"""


@pytest.mark.needs("memory_limits")
@pytest.mark.parametrize("limit", ["no_mappings", "no_address_space"])
def test_a_child_has_received_arrays_by_value_or_ends(run_script, limit):
    run_script(AT_THE_LIMIT, limit)


@pytest.mark.nightly
@pytest.mark.parametrize("gigabytes", [2, 5])
def test_payloads_beyond_32_bits_cross_by_value_and_shared(run_script, gigabytes):
    run_script(
        f"""
import numpy as np
import forkshm

def look(array):
    return array.nbytes, int(array[0]), int(array[-1]), int(array[2**31 + 5])

def give(nbytes):
    made = np.zeros(nbytes, "uint8")
    made[-1] = 9
    return made

nbytes = {gigabytes} * 2**30 + 4099
with forkshm.Pool(1) as pool:
    plain = np.zeros(nbytes, "uint8")
    plain[-1], plain[2**31 + 5] = 7, 8
    assert pool.apply(look, (plain,)) == (nbytes, 0, 7, 8)
    del plain
    back = pool.apply(give, (nbytes,))
    assert (back.nbytes, back[-1]) == (nbytes, 9)
    del back
    shared = forkshm.zeros(nbytes, "uint8")
    shared[-1], shared[2**31 + 5] = 7, 8
    assert pool.apply(look, (shared,)) == (nbytes, 0, 7, 8)
""",
        timeout=500,
    )


@pytest.mark.nightly
def test_a_million_tasks_may_be_queued(run_script):
    run_script(
        """
import forkshm
with forkshm.Pool(2) as pool:
    answers = [pool.apply_async(abs, (-number,)) for number in range(1_000_000)]
    assert all(answer.get() == number for number, answer in enumerate(answers))
""",
        timeout=1500,
    )
