"""The contract: whether each type is shared or copied, for each way of sending it.

``python tests/integrations/test_contract.py`` prints it.
"""

from __future__ import annotations

import mmap
import tempfile

import pytest

import forkshm
from forkshm.backend import kernel

np = pytest.importorskip("numpy")

N = 50_000


def mapped(mode):
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8 * N))
        file.flush()
        return np.memmap(file.name, float, mode)


def of_mmap():
    with tempfile.TemporaryFile() as file:
        file.truncate(8 * N)
        return mmap.mmap(file.fileno(), 0)


def shared():
    return forkshm.zeros(N)


def read_only(array):
    array.flags.writeable = False
    return array


def masked():
    mask = np.asarray(forkshm.zeros(N, bool))
    return np.ma.MaskedArray(np.asarray(shared()), mask=mask, copy=False)


def frame(memory):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(memory.reshape(5, -1).T, copy=False).iloc[10:]


def tensor():
    return pytest.importorskip("torch").zeros(N).share_memory_()


def arrow(memory):
    pa = pytest.importorskip("pyarrow")
    return pa.Array.from_buffers(pa.float64(), N, [None, pa.py_buffer(memory)])


# Creates a value, and the outcome: shared (all see writes), copied (the receiver's own), or read-only (shared, without
# write access).
CONTRACT = {
    "ndarray": (lambda: np.zeros(N), "copied"),
    "ndarray, read-only": (lambda: read_only(np.zeros(N)), "copied"),
    "ndarray, view": (lambda: np.zeros(2 * N)[::2], "copied"),
    "ndarray, broadcast": (lambda: np.broadcast_to(np.zeros(N), (3, N)), "copied"),
    "ndarray of structures": (lambda: np.zeros(N, [("a", "f8"), ("b", "i4")])["a"], "copied"),
    "matrix, recarray (private)": (lambda: np.zeros(N, [("a", "f8")]).view(np.recarray), "copied"),
    "SharedArray": (shared, "shared"),
    "SharedArray, view": (lambda: shared()[::-2], "shared"),
    "ndarray over shared memory": (lambda: np.asarray(shared())[5:], "shared"),
    "ndarray over shared memory, read-only": (lambda: read_only(np.asarray(shared())), "for reading"),
    "recarray over shared memory": (
        lambda: np.asarray(forkshm.zeros(N, [("a", "f8")])).view(np.recarray),
        "shared",
    ),
    "masked array over shared memory": (masked, "shared"),
    "view(SharedArray, 'read_only')": (lambda: forkshm.view(shared(), "read_only"), "for reading"),
    "view(ndarray, 'read_only')": (lambda: forkshm.view(np.zeros(N), "read_only"), "copied, for reading"),
    "list of small arrays": (lambda: [np.zeros(10) for _ in range(500)], "copied"),
    "list of small shared arrays": (lambda: list(forkshm.zeros((500, 10))), "shared"),
    "DataFrame": (lambda: frame(np.zeros(N)), "copied"),
    "DataFrame over shared memory, rows": (lambda: frame(shared()), "shared"),
    "Arrow array": (lambda: arrow(np.zeros(N)), "copied, for reading"),
    "Tensor after share_memory_()": (tensor, "shared"),
}
OF_FILES = {
    "memmap 'r+'": (lambda: mapped("r+"), "shared"),
    "memmap 'r'": (lambda: mapped("r"), "for reading"),
    "memmap 'c'": (lambda: mapped("c"), "copied"),
    "ndarray over memmap 'r+'": (lambda: np.asarray(mapped("r+"))[5:], "shared"),
    "ndarray over memmap 'r'": (lambda: np.asarray(mapped("r"))[5:], "copied"),
    "mmap.mmap": (of_mmap, "shared"),
}
if kernel.name == "linux":
    CONTRACT.update(OF_FILES)


def elements(thing):
    """Return an array over the memory of a value."""
    if isinstance(thing, list):
        return elements(thing[7])
    if isinstance(thing, mmap.mmap):
        return np.frombuffer(thing)
    if hasattr(thing, "to_numpy"):
        return thing.to_numpy()
    if hasattr(thing, "share_memory_"):
        return thing.numpy()
    made = np.asarray(thing)
    return made["a"] if made.dtype.names else made


def write(thing):
    array = elements(thing)
    if type(thing).__module__.startswith("pandas"):
        thing.iloc[0, 0] = 7.0
        return True
    if not array.flags.writeable:
        return False
    array[(0,) * array.ndim] = 7.0
    return True


def through_closure(pool, thing):
    return pool.apply(lambda: write(thing))


def through_queue(pool, thing):
    queue = forkshm.Queue()
    queue.put(thing)
    return write(queue.get())


def through_result(pool, thing):
    return write(pool.apply(give_back, (thing,)))


def give_back(thing):
    return thing


WAYS = {
    "argument": lambda pool, thing: pool.apply(write, (thing,)),
    "map": lambda pool, thing: pool.map(write, [thing])[0],
    "closure": through_closure,
    "result": through_result,
    "queue": through_queue,
}


def outcome(pool, make, way):
    thing = make()
    sender = thing.value if isinstance(thing, forkshm.pickler.View) else thing
    before = pool.statistics().bytes_copied
    written = WAYS[way](pool, thing)
    copied = pool.statistics().bytes_copied - before
    seen = elements(sender).ravel()[0] == 7.0
    if written and seen:
        return "shared" if not copied else f"shared, and {copied} bytes copied"
    return "copied" if written else None


@pytest.fixture(scope="module")
def pool():
    with forkshm.Pool(1) as made:
        yield made


@pytest.mark.parametrize("name", CONTRACT)
def test_each_type_by_each_way(pool, name):
    make, expected = CONTRACT[name]
    for way in WAYS:
        found = outcome(pool, make, way)
        if "for reading" in expected:
            assert found is None, f"{way}: may be written to"
        elif "DataFrame over" in name:
            assert found in ("shared", "copied"), way  # pandas shares until it writes, and copies before that
        else:
            assert found == expected, way


if __name__ == "__main__":
    width = max(map(len, CONTRACT))
    for name, (_, what) in CONTRACT.items():
        print(f"{name:{width}}  {what}")
