"""SharedMemory, ShareableList, SharedMemoryManager: names, lifetimes, and faults of the standard library's."""

from __future__ import annotations

import multiprocessing.shared_memory
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from started import IGNORE_EXPERIMENTS

import forkshm
from forkshm import _multiprocess
from forkshm.managers import SharedMemoryManager
from forkshm.shared_memory import ShareableList, SharedMemory

METHODS = forkshm.get_all_start_methods()


@pytest.fixture
def memory():
    made = SharedMemory(create=True, size=1000)
    yield made
    made.close()
    try:
        made.unlink()
    except FileNotFoundError:
        pass


def exists(name):
    try:
        SharedMemory(name).close()
    except FileNotFoundError:
        return False
    return True


def test_they_are_instances_of_both_libraries_classes(memory):
    items = ShareableList([1])
    for module in (multiprocessing.shared_memory, _multiprocess.shared_memory):
        assert isinstance(memory, module.SharedMemory)
        assert isinstance(items, module.ShareableList)
    items.shm.close()
    items.shm.unlink()


def test_the_standard_library_opens_the_same(memory):
    memory.buf[:3] = b"abc"
    if sys.version_info >= (3, 13):
        theirs = multiprocessing.shared_memory.SharedMemory(memory.name, track=False)
    else:
        theirs = multiprocessing.shared_memory.SharedMemory(memory.name)
        _forget_in_tracker(theirs._name)
    assert bytes(theirs.buf[:3]) == b"abc"
    theirs.close()


def _forget_in_tracker(name):
    from multiprocessing import resource_tracker

    resource_tracker.unregister(name, "shared_memory")
    resource_tracker._resource_tracker._stop()


def test_a_second_unlink_names_the_missing_memory(memory):
    memory.unlink()
    with pytest.raises(FileNotFoundError, match=f"cannot unlink shared memory '{memory.name}'"):
        memory.unlink()


def write(memory, value):
    memory.buf[0] = value
    return memory


def test_shared_memory_is_sent_as_a_descriptor_even_without_its_name(pool, memory):
    memory.unlink()
    back = pool.apply(write, (memory, 7))
    assert memory.buf[0] == 7
    assert back.name == memory.name
    back.buf[1] = 8
    assert memory.buf[1] == 8
    del back


def test_objects_of_one_memory_are_closed_one_by_one(pool, memory):
    back = pool.apply(_same, (memory,))
    again = pool.apply(_same, (back,))
    memory.buf[:3] = b"abc"
    back.close()
    assert bytes(again.buf[:3]) == b"abc"
    memory.close()
    again.buf[:1] = b"x"
    other = pool.apply(_same, (again,))
    assert bytes(other.buf[:3]) == b"xbc"
    other.close()
    again.close()


def _same(thing):
    return thing


def test_a_plain_pickle_carries_the_name(memory):
    again = pickle.loads(pickle.dumps(memory))
    memory.buf[0] = 5
    assert again.buf[0] == 5
    assert again.size == memory.size
    again.close()


def test_close_with_live_arrays_is_refused_and_changes_nothing(memory):
    array = np.ndarray((10,), dtype="u1", buffer=memory.buf)
    with pytest.raises(BufferError, match="1 view of it is alive"):
        memory.close()
    array[0] = 3
    assert memory.buf[0] == 3
    view = memory.buf[2:5]
    del array
    with pytest.raises(BufferError):
        memory.close()
    del view
    memory.close()
    memory.close()
    assert memory.buf is None


def test_a_plain_variable_does_not_keep_the_memory_open(memory):
    buffer = memory.buf
    buffer[0] = 1
    memory.close()
    with pytest.raises(ValueError, match="released"):
        buffer[0]


def test_an_array_outlives_its_memory_object():
    made = SharedMemory(create=True, size=100)
    made.unlink()
    array = np.frombuffer(made.buf, dtype="u1")
    del made
    assert array.sum() == 0
    del array


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"create": True}, ValueError),
        ({"create": True, "size": -1}, ValueError),
        ({}, ValueError),
        ({"name": "forkshm-there-is-none"}, FileNotFoundError),
        ({"name": "a\0b"}, ValueError),
    ],
)
def test_invalid_arguments_are_refused(arguments, error):
    with pytest.raises(error):
        SharedMemory(**arguments)


def test_a_name_that_was_changed_removes_no_other(memory):
    name, memory._name = memory._name, memory._name + "\0a"
    with pytest.raises(ValueError, match="NUL"):
        memory.unlink()
    memory._name = name
    assert exists(memory.name)


def test_a_name_that_is_taken(memory):
    with pytest.raises(FileExistsError):
        SharedMemory(memory.name, create=True, size=10)
    assert exists(memory.name)


def run(source):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", IGNORE_EXPERIMENTS, "-c", source],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.split(), done.stderr


PROGRAM = """
import os, signal, sys
import forkshm
from forkshm.shared_memory import SharedMemory

def make(kill):
    memory = SharedMemory(create=True, size=10)
    named = SharedMemory("forkshm-test-" + str(os.getpid()), create=True, size=10)
    kept = SharedMemory(create=True, size=10, track=False)
    print(memory.name, named.name, kept.name, flush=True)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    {main}
"""


@pytest.mark.parametrize("method", METHODS)
def test_names_of_a_killed_creator_are_removed_at_the_end_of_its_family(method, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        PROGRAM.format(
            main=f"""process = forkshm.get_context("{method}").Process(target=make, args=(True,))
    process.start()
    process.join()
    assert all(SharedMemory(name, track=False).buf for name in ["forkshm-test-" + str(process.pid)])"""
        )
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    memory, named, kept = done.stdout.split()
    assert not exists(memory)
    assert not exists(named)
    assert exists(kept)
    left = SharedMemory(kept)
    left.close()
    left.unlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_remove_the_names_of_the_family():
    code, said, errors = run(
        """
import os
from forkshm.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=10)
if os.fork() == 0:
    raise SystemExit(0)
os.wait()
SharedMemory(memory.name).close()
print(memory.name)
"""
    )
    assert (code, errors) == (0, "")
    assert not exists(said[0])


def test_another_object_of_that_name_is_left_alone():
    code, said, errors = run(
        """
from forkshm import SharedMemoryObject
from forkshm.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=10)
memory.unlink()
with SharedMemoryObject("create_only", memory.name) as other:
    other.truncate(20)
print(memory.name)
"""
    )
    assert (code, errors) == (0, "")
    assert exists(said[0])
    SharedMemory(said[0]).unlink()


def test_records_of_unlinked_names_are_removed():
    code, said, errors = run(
        """
import os
from forkshm.backend import kernel
from forkshm.region import family
from forkshm.shared_memory import SharedMemory
family._TOO_MANY = 10
def size():
    return os.stat(family._file()).st_size if os.path.exists(family._file()) else 0
kept = SharedMemory(create=True, size=1)
for _ in range(100):
    memory = SharedMemory(create=True, size=1)
    memory.unlink()
    assert size() < 1000
print(kept.name)
kept.unlink()
assert size() == 0
"""
    )
    assert (code, errors) == (0, "")
    assert not exists(said[0])


def test_opening_shared_memory_removes_nothing(memory):
    code, _, errors = run(f"from forkshm.shared_memory import SharedMemory\nSharedMemory({memory.name!r}).buf[0] = 9")
    assert (code, errors) == (0, "")
    assert exists(memory.name)
    assert memory.buf[0] == 9


@pytest.mark.needs("memory_limits")
def test_each_block_takes_an_fd_and_the_error_says_so():
    """A thousand blocks at 256 fds: each is a kernel object, and needs an fd to be sent."""
    code, said, errors = run(
        """
import resource
from forkshm.shared_memory import SharedMemory
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
made = []
try:
    for _ in range(1000):
        made.append(SharedMemory(create=True, size=100))
        print(made[-1].name)
except OSError as error:
    print(len(made), str(error).replace(" ", "_"))
"""
    )
    assert (code, errors) == (0, "")
    *names, count, message = said
    assert not any(exists(name) for name in names)  # although no fd was left at the end
    assert 230 <= int(count) <= 256
    assert "EMFILE" in message or "Too_many_open_files" in message or "as_many_files_open" in message


# -- the list ---------------------------------------------------------------------------------


@pytest.fixture
def listed():
    made = []

    def make(*arguments, **options):
        made.append(ShareableList(*arguments, **options))
        return made[-1]

    yield make
    for items in made:
        items.shm.close()
        try:
            items.shm.unlink()
        except FileNotFoundError:
            pass


ITEMS = [
    "",
    "a",
    "x" * 8,
    "héé",
    "日本語",
    "a\0",
    "\0",
    b"",
    b"\0\0\0",
    b"12345678",
    b"ab\0\0",
    1,
    -(2**63),
    2.5,
    True,
    False,
    None,
]


def test_items_are_read_back_unchanged(listed):
    items = listed(ITEMS)
    assert list(items) == ITEMS
    assert [type(item) for item in items] == [type(item) for item in ITEMS]
    again = ShareableList(name=items.shm.name)
    assert list(again) == ITEMS
    again.shm.close()


def test_a_shareable_list_can_be_sent(pool, listed):
    items = listed(["abc", 1])
    assert pool.apply(_change, (items,)) == ["abc", 1]
    assert list(items) == ["é\0", 2.5]


def _change(items):
    before = list(items)
    items[0], items[1] = "é\0", 2.5
    return before


@pytest.mark.parametrize("value", ["x" * 8, "éééé", b"y" * 8, "abc\0\0", "", 12, None])
def test_an_item_grows_into_its_room_and_the_others_stay(listed, value):
    items = listed(["a", "b", b"c"])
    for position in range(3):
        items[position] = value
        assert items[position] == value
    assert list(items) == [value] * 3


def test_an_item_that_is_too_long_changes_nothing(listed):
    items = listed(["a", "é" * 7, b"c"])
    for position, value in ((0, "x" * 9), (0, "é" * 5), (2, b"z" * 9)):
        with pytest.raises(ValueError, match="exceeds available storage"):
            items[position] = value
    assert list(items) == ["a", "é" * 7, b"c"]
    with pytest.raises(IndexError):
        items[3] = 1
    with pytest.raises(IndexError):
        items[-4]


def test_forkshm_and_the_standard_library_read_each_others_lists(listed):
    items = listed(["ab", 5, None, b"xyz"])
    code = f"""
from multiprocessing import resource_tracker
resource_tracker.register = lambda *_: None
from multiprocessing.shared_memory import ShareableList
items = ShareableList(name={items.shm.name!r})
assert list(items) == ["ab", 5, None, b"xyz"], list(items)
items[0] = "longer"
items.shm.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert items[0] == "longer"


# -- the manager ------------------------------------------------------------------------------


def test_a_manager_removes_its_names():
    with SharedMemoryManager() as manager:
        memory, items = manager.SharedMemory(100), manager.ShareableList([1, "two\0"])
        names = [memory.name, items.shm.name]
        assert all(exists(name) for name in names)
        assert list(items) == [1, "two\0"]
        memory.close()
        items.shm.close()
    assert not any(exists(name) for name in names)


def test_a_manager_that_lives_until_the_end_prints_nothing():
    source = """
from forkshm.managers import SharedMemoryManager
with SharedMemoryManager() as manager:
    print(list(manager.ShareableList([1])))
"""
    assert run(source) == (0, ["[1]"], "")


def test_a_manager_that_is_not_running_creates_nothing():
    with pytest.raises(ValueError, match="is not running"):
        SharedMemoryManager().SharedMemory(10)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_names_of_a_killed_manager_are_removed_with_the_family(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        """
import os, signal
from forkshm.managers import SharedMemoryManager

if __name__ == "__main__":
    manager = SharedMemoryManager()
    manager.start()
    print(manager.SharedMemory(10).name, flush=True)
    os.kill(manager._process.pid, signal.SIGKILL)
    manager._process.join()
"""
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    assert not exists(done.stdout.strip()), done.stderr
