"""Objects over shared memory are sent without a copy and keep their type: subclasses, frames, tensors."""

from __future__ import annotations

import pytest

import forkshm
from forkshm import assert_zero_copy

np = pytest.importorskip("numpy")


class Quantity(np.ndarray):
    """A subclass with an attribute that views inherit."""

    finalized = 0

    def __array_finalize__(self, parent):
        self.unit = getattr(parent, "unit", None)
        type(self).finalized += 1


class Mine(forkshm.SharedArray):
    pass


class OwnWay(np.ndarray):
    def __reduce__(self):
        return _own_way, (np.asarray(self),)


def _own_way(elements):
    return elements.copy().view(OwnWay)


def records():
    return np.asarray(forkshm.zeros(100_000, dtype=[("x", "f8"), ("y", "i4")])).view(np.recarray)


def quantity():
    made = forkshm.zeros((1000, 100)).view(Quantity)
    made.unit = "m"
    made.more = [1]
    return made


def masked():
    mask = np.asarray(forkshm.zeros((1000, 100), bool))
    made = np.ma.MaskedArray(np.asarray(forkshm.zeros((1000, 100))), mask=mask, copy=False, fill_value=-5)
    made.harden_mask()
    return made


SUBCLASSES = {
    "recarray": records,
    "part of a recarray": lambda: records()[10:50_000:3],
    "own": quantity,
    "own, strided": lambda: quantity()[::2, ::-1],
    "of SharedArray": lambda: forkshm.zeros(100_000).view(Mine),
    "chararray": lambda: np.asarray(forkshm.zeros(1000, "S5")).view(np.char.chararray),
    "masked": masked,
    "masked, without a mask": lambda: np.ma.MaskedArray(np.asarray(forkshm.zeros(100_000)), copy=False),
    "masked, a part": lambda: masked()[5:],
}


def write(array):
    np.asarray(array).view()[...] = np.ones((), array.dtype)
    return type(array), array.shape, array.dtype


@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # since NumPy 2.5
@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_over_shared_memory_is_shared_with_its_type(name):
    sent = SUBCLASSES[name]()
    with forkshm.Pool(1) as pool:
        with assert_zero_copy():
            assert pool.apply(write, (sent,)) == (type(sent), sent.shape, sent.dtype)
        expected = np.ones(sent.shape, sent.dtype)
        np.testing.assert_array_equal(np.asarray(sent), expected)
        with assert_zero_copy():
            back = pool.apply(lambda thing: thing, (sent,))
    assert type(back) is type(sent)
    np.asarray(sent)[...] = np.zeros((), sent.dtype)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(sent))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_matrix_over_shared_memory_is_shared():
    sent = np.asarray(forkshm.zeros((100, 100))).view(np.matrix)
    with forkshm.Pool(1) as pool, assert_zero_copy():
        assert pool.apply(write, (sent,))[0] is np.matrix
    assert (np.asarray(sent) == 1).all()


def test_attributes_and_finalize_of_the_type_are_kept(cross):
    sent = quantity()
    before = Quantity.finalized
    value = cross(sent).value
    assert (value.unit, value.more) == ("m", [1])
    assert Quantity.finalized > before
    assert value[3:].unit == "m"


def test_a_masked_array_keeps_fill_value_and_mask(cross):
    sent = masked()
    value = cross(sent).value
    np.ma.getmask(sent).view(np.ndarray)[3, 3] = True  # in shared memory, like the elements
    assert value.mask[3, 3]
    assert (value.fill_value, value.hardmask) == (-5, True)
    value[3, 3] = 9
    assert value.data[3, 3] == 0


def test_a_private_mask_is_copied_and_the_elements_are_not(cross):
    sent = np.ma.MaskedArray(np.asarray(forkshm.zeros(100_000)), mask=np.arange(100_000) % 2 == 0, copy=False)
    crossing = cross(sent)
    assert crossing.copied == 100_000
    assert crossing.value.sum() == 0
    sent.data[1] = 5
    assert crossing.value[1] == 5


MASKED = {
    "large": lambda: np.ma.masked_less(np.arange(300_000), 5),
    "small": lambda: np.ma.array([1, 2], mask=[0, 1], fill_value=9),
    "without a mask": lambda: np.ma.array(np.ones(50_000)),
    "hard": lambda: np.ma.array(np.ones(50_000), mask=True, hard_mask=True),
    "of structures": lambda: np.ma.array(np.zeros(50_000, "f4,i4"), mask=[(0, 1)] * 50_000),
    "every other column": lambda: np.ma.masked_equal(np.arange(90_000).reshape(300, -1)[:, ::2], 4),
    "of text": lambda: np.ma.array(["a", "b"], mask=[1, 0]),
    "of a matrix": lambda: np.ma.array(np.asmatrix([[1, 2]]), mask=[[0, 1]]),
    "read-only": lambda: np.ma.array(np.frombuffer(bytes(400_000))),
    "of objects": lambda: np.ma.array([1, None], mask=[0, 1]),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", MASKED)
def test_a_private_masked_array_is_a_copy(cross, name):
    sent = MASKED[name]()
    value = cross(sent).value
    assert (type(value), value.dtype, value.shape, value.baseclass) == (
        type(sent),
        sent.dtype,
        sent.shape,
        sent.baseclass,
    )
    assert value.data.tolist() == sent.data.tolist()
    assert value.mask.tolist() == sent.mask.tolist()
    assert (str(value.fill_value), value.hardmask) == (str(sent.fill_value), sent.hardmask)
    assert value.flags.writeable
    value[...] = np.ma.masked
    assert value.mask.tolist() != sent.mask.tolist() or name == "hard"


def test_a_private_masked_array_is_copied_once_and_a_broadcast_one_stays_small(cross):
    sent = np.ma.masked_less(np.arange(300_000), 5)
    assert cross(sent).copied < 1.1 * (sent.data.nbytes + sent.mask.nbytes)
    sent = np.ma.array(np.broadcast_to(np.arange(1000), (5000, 1000)))
    crossing = cross(sent)
    assert crossing.copied < 100_000
    assert crossing.value.shape == (5000, 1000)


@pytest.mark.parametrize("make", [lambda: np.zeros(50_000).view(Quantity), lambda: forkshm.zeros(9).view(OwnWay)])
def test_private_arrays_and_custom_reductions_are_copied(cross, make):
    sent = make()
    value = cross(sent).value
    assert type(value) is type(sent)
    value[:] = 1
    assert not sent.any()


@pytest.fixture
def cross():
    from consuming import receive

    from forkshm.backend import kernel
    from forkshm.pickler import pack

    class Crossing:
        def __init__(self, thing):
            payload = pack(thing)
            fds = [kernel.duplicate(fd) for fd in payload.fds]
            self.copied, self.shared = payload.copied, payload.shared
            payload.close()
            self.value = receive(payload.data, 0, fds)[0].open()

    return Crossing


# -- frames ---------------------------------------------------------------------------


FRAMES = {
    "all": lambda df: df,
    "rows": lambda df: df.iloc[1000:50_000],
    "every other row": lambda df: df.iloc[::2],
    "rows from behind": lambda df: df.iloc[::-1],
    "columns": lambda df: df.iloc[:, 2:5],
    "rows and columns": lambda df: df.iloc[100:200, 1:3],
    "a column": lambda df: df["c"],
    "part of a column": lambda df: df["c"].iloc[7:5000],
}


@pytest.mark.parametrize("layout", ["columns by rows", "rows by columns"])
@pytest.mark.parametrize("name", FRAMES)
def test_rows_and_columns_of_a_frame_over_shared_memory_are_not_copied(cross, layout, name):
    pandas = pytest.importorskip("pandas")
    memory = forkshm.zeros((8, 100_000)) if layout == "columns by rows" else forkshm.zeros((100_000, 8))
    memory[:] = np.arange(memory.size).reshape(memory.shape)
    whole = pandas.DataFrame(memory.T if layout == "columns by rows" else memory, columns=list("abcdefgh"), copy=False)
    frame = FRAMES[name](whole)
    crossing = cross(frame)
    assert crossing.copied == 0
    (pandas.testing.assert_frame_equal if frame.ndim == 2 else pandas.testing.assert_series_equal)(
        crossing.value, frame
    )
    assert not isinstance(crossing.value.to_numpy(), forkshm.SharedArray) or crossing.value.to_numpy().region
    memory[:] = -1
    assert (crossing.value.to_numpy() == -1).all()


def test_a_frame_in_private_memory_is_a_copy(cross):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.zeros((8, 10_000)).T, copy=False).iloc[5:]
    value = cross(frame).value
    pandas.testing.assert_frame_equal(value, frame)


# -- Arrow ----------------------------------------------------------------------------


def table():
    pa = pytest.importorskip("pyarrow")
    words = [None if n % 7 == 0 else f"word {n}" for n in range(100_000)]
    return pa.table(
        {
            "numbers": np.arange(100_000.0),
            "words": words,
            "lists": pa.array([[n, n] for n in range(100_000)]),
            "kinds": pa.array(["abc"[n % 3] for n in range(100_000)]).dictionary_encode(),
            "flags": pa.array([n % 3 == 0 for n in range(100_000)]),
        },
        metadata={"of": "tests"},
    )


ARROW = {
    "rows": lambda t: t.slice(50_001, 10),
    "the last row": lambda t: t.slice(99_999),
    "no rows": lambda t: t.slice(5, 0),
    "a column": lambda t: t["words"].slice(77, 10),
    "a batch": lambda t: t.to_batches()[0].slice(77, 10),
    "an array": lambda t: t["words"].chunk(0).slice(77, 10),
    "an array of lists": lambda t: t["lists"].chunk(0).slice(77, 10),
    "an array of flags": lambda t: t["flags"].chunk(0).slice(77, 10),
    "chunks": lambda t: __import__("pyarrow").chunked_array(
        [t["words"].chunk(0).slice(5, 3), t["words"].chunk(0).slice(9, 3)]
    ),
    "a frame": lambda t: t.select(["numbers", "words"]).to_pandas().iloc[10:20],
}


@pytest.mark.parametrize("name", ARROW)
def test_only_the_rows_of_an_arrow_slice_are_sent(cross, name):
    sent = ARROW[name](table())
    crossing = cross(sent)
    assert crossing.copied < 10_000
    if name == "a frame":
        assert crossing.value.equals(sent)
        return
    assert type(crossing.value) is type(sent)
    assert crossing.value.equals(sent)
    assert getattr(crossing.value, "schema", None) == getattr(sent, "schema", None)
    if hasattr(sent, "validate"):
        crossing.value.validate(full=True)


def views_of_text():
    """Return Arrow objects whose elements refer to text in buffers that all elements share."""
    pa = pytest.importorskip("pyarrow")
    if not hasattr(pa, "string_view"):
        pytest.skip("needs an Arrow with views of text")

    class Label(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.string_view(), "forkshm.tests.label")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls()

        def __reduce__(self):
            return Label, ()

    words = [None if n % 7 == 0 else f"a word of more than 12 bytes, {n}" for n in range(20_000)]
    texts = pa.array(words, pa.string_view())
    records = [None if word is None else {"word": [word]} for word in words]
    pairs = [[(f"the key of number {n}", word)] for n, word in enumerate(words)]
    required = pa.field("required", pa.binary_view(), nullable=False, metadata={"of": "tests"})
    return {
        "text": texts,
        "bytes": texts.cast(pa.binary_view()),
        "chunks": pa.chunked_array([texts, texts[5:]]),
        "records of lists": pa.array(records, pa.struct([("word", pa.large_list(pa.string_view()))])),
        "lists of two": pa.array([[word, word] for word in words], pa.list_(pa.string_view(), 2)),
        "maps": pa.array(pairs, pa.map_(pa.string_view(), pa.string_view())),
        "an extension": pa.ExtensionArray.from_storage(Label(), texts),
        "a table": pa.table({"label": pa.ExtensionArray.from_storage(Label(), texts), "n": range(20_000)}),
        "a batch": pa.RecordBatch.from_arrays(
            [pa.array([str(word).encode() for word in words], pa.binary_view()), texts],
            schema=pa.schema([required, pa.field("required", pa.string_view())], metadata={"of": "tests"}),
        ),
    }


@pytest.mark.parametrize("rows", [10, 0])
def test_only_the_text_of_an_arrow_slice_of_views_is_sent(cross, rows):
    for name, whole in views_of_text().items():
        sent = whole.slice(10_001, rows)
        crossing = cross(sent)
        assert crossing.copied < 10_000, name
        assert type(crossing.value) is type(sent)
        assert crossing.value.equals(sent), name
        assert crossing.value.get_total_buffer_size() < 10_000
        crossing.value.validate(full=True)
        if hasattr(sent, "schema"):
            assert crossing.value.schema.equals(sent.schema, check_metadata=True)
        else:
            assert crossing.value.type == sent.type


def test_a_slice_with_most_of_an_arrow_table_is_sent_whole(cross):
    sent = table()
    for part in (sent, sent.slice(10), sent.slice(0, 90_000)):
        assert cross(part).value.equals(part)


def test_a_slice_of_an_arrow_array_in_shared_memory_is_shared(cross):
    pa = pytest.importorskip("pyarrow")
    memory = forkshm.array(np.arange(100_000.0))
    sent = pa.Array.from_buffers(pa.float64(), 100_000, [None, pa.py_buffer(memory)]).slice(50_000, 10)
    crossing = cross(sent)
    assert crossing.copied == 0
    memory[50_003] = -1
    assert crossing.value[3].as_py() == -1


# -- tensors --------------------------------------------------------------------------


def fill(tensor):
    tensor.fill_(7)
    return tensor.is_shared(), tensor.stride(), tensor.dtype


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_a_tensor_after_share_memory_stays_shared(strategy):
    torch = pytest.importorskip("torch")
    tensors = {
        "all": torch.zeros(50, 70).share_memory_(),
        "turned": torch.zeros(50, 70).share_memory_().T,
        "a part": torch.zeros(5000).share_memory_()[10:2000:3],
        "bfloat16": torch.zeros(5000, dtype=torch.bfloat16).share_memory_(),
    }
    before = torch.multiprocessing.get_sharing_strategy()
    if strategy == "file_system":
        pytest.skip("needs PyTorch's manager process")
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        with forkshm.Pool(1) as pool:
            for tensor in tensors.values():
                with assert_zero_copy():
                    assert pool.apply(fill, (tensor,)) == (True, tensor.stride(), tensor.dtype)
                assert (tensor == 7).all()
        queue = forkshm.Queue()
        queue.put(tensors)
        for name, tensor in queue.get().items():
            tensor.fill_(8)
            assert (tensors[name] == 8).all()
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def put_seven(tensor):
    elements = tensor.untyped() if type(tensor).__name__ == "TypedStorage" else tensor
    if type(elements).__name__ == "UntypedStorage":
        elements[0] = 7
    else:
        elements.detach().reshape(-1)[:1].fill_(7)


def kinds_of_tensors(torch):
    """Return tensors over shared memory that PyTorch reduces, or that have attributes of their own."""

    class Sub(torch.Tensor):
        pass

    tagged = torch.zeros(5000).share_memory_()
    tagged.tag = "a"
    return {
        "subclass": torch.zeros(5000).as_subclass(Sub).share_memory_(),
        "subclass over ours": torch.from_numpy(forkshm.zeros(5000)).as_subclass(Sub),
        "attribute": tagged,
        "parameter": torch.nn.Parameter(torch.zeros(5000)).share_memory_(),
        "buffer": torch.nn.Buffer(torch.zeros(5000)).share_memory_(),
        "conjugate": torch.zeros(5000, dtype=torch.complex64).share_memory_().conj(),
        "negative": torch.zeros(5000, dtype=torch.complex64).share_memory_().conj().imag,
        "typed storage": torch.zeros(5000).share_memory_()._typed_storage(),
        "untyped storage": torch.zeros(5000).share_memory_().untyped_storage(),
    }


@pytest.mark.parametrize("way", ["argument", "queue"])
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_of_any_kind_over_shared_memory_is_shared(way):
    torch = pytest.importorskip("torch")
    queue = forkshm.Queue()
    with forkshm.Pool(1) as pool:
        for name, tensor in kinds_of_tensors(torch).items():
            if way == "argument":
                pool.apply(put_seven, (tensor,))
            else:
                queue.put(tensor)
                put_seven(queue.get())
            storage = tensor if "storage" in name else tensor.untyped_storage()
            assert any(bytes(storage.untyped() if name == "typed storage" else storage)), name


def test_an_empty_tensor_that_pytorch_reduces_crosses(cross):
    torch = pytest.importorskip("torch")
    assert cross(torch.nn.Parameter(torch.zeros(0, 3))).value.shape == (0, 3)
    assert cross(torch.zeros(0)).value.untyped_storage().nbytes() == 0
