"""Tensors: private elements are copied once, and shared ones never."""

from __future__ import annotations

import pytest

import forkshm

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

TENSORS = {
    "float64": lambda: torch.arange(50_000, dtype=torch.float64),
    "float32, two axes": lambda: torch.arange(60_000.0).reshape(200, 300),
    "turned": lambda: torch.arange(60_000.0).reshape(200, 300).T,
    "every other": lambda: torch.arange(60_000)[::2],
    "expanded": lambda: torch.arange(3000.0).expand(50, 3000),
    "bfloat16": lambda: torch.arange(60_000).to(torch.bfloat16),
    "float16": lambda: torch.arange(60_000).to(torch.float16),
    "bool": lambda: torch.arange(60_000) % 3 == 0,
    "complex": lambda: torch.arange(60_000) * 1j,
    "conjugate": lambda: (torch.arange(60_000) * 1j).conj(),
    "one number": lambda: torch.tensor(3.5),
    "nothing": lambda: torch.empty(0, 3),
    "sparse": lambda: torch.eye(100).to_sparse(),
    "with gradient": lambda: torch.arange(50_000.0, requires_grad=True),
}


def dense(tensor):
    return tensor.to_dense() if tensor.is_sparse else tensor


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_unchanged(pool, name):
    sent = TENSORS[name]()
    back = pool.apply(lambda tensor: tensor, (sent,))
    assert (back.dtype, back.shape, back.requires_grad, back.layout) == (
        sent.dtype,
        sent.shape,
        sent.requires_grad,
        sent.layout,
    )
    assert torch.equal(dense(back), dense(sent))


def test_a_tensor_is_copied_once_each_way_at_most(pool):
    sent = torch.arange(1_000_000, dtype=torch.float64)
    before = pool.statistics()
    back = pool.apply(lambda tensor: tensor + 1, (sent,))
    after = pool.statistics()
    assert torch.equal(back, sent + 1)
    assert after.bytes_copied - before.bytes_copied < 2.01 * 8_000_000
    back += 1


def filled(tensor):
    tensor.fill_(9)
    return tensor


@pytest.mark.parametrize("size", [100, 30_000, 300_000])
def test_a_tensor_that_pytorch_mapped_from_a_file_shares_the_file(pool, tmp_path, size):
    mapped = torch.from_file(str(tmp_path / "numbers"), shared=True, size=size)
    back = pool.apply(filled, (mapped[5:],))
    assert mapped.tolist() == [0] * 5 + [9] * (size - 5)
    back.fill_(8)
    assert mapped[5] == 8


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # PyTorch 2.14, whatever it loads
def test_a_tensor_of_a_private_mapping_arrives_by_value(pool, tmp_path):
    torch.save({"weights": torch.zeros(100_000)}, tmp_path / "saved.pt")
    private = [
        torch.load(tmp_path / "saved.pt", mmap=True)["weights"],
        torch.from_file(str(tmp_path / "saved.pt"), shared=False, size=50_000).zero_(),
    ]
    for tensor in private:
        assert pool.apply(filled, (tensor,)).sum() == 9 * len(tensor)
        assert tensor.sum() == 0


def test_the_memory_of_a_tensor_is_sent_as_the_tensor_is(pool):
    def fill(storage):
        storage.fill_(1)
        return storage

    private, shared = torch.zeros(50_000, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.uint8).share_memory_()
    assert bytes(pool.apply(fill, (private.untyped_storage(),))) == bytes([1]) * 50_000
    assert not private.any()
    back = pool.apply(fill, (shared.untyped_storage(),))
    assert shared.all()
    back[0] = 7
    assert shared[0] == 7


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", ["strided", "jagged"])
def test_a_nested_tensor_comes_back(pool, layout):
    sent = torch.nested.nested_tensor([torch.ones(2), torch.arange(50_000.0)], layout=getattr(torch, layout))
    back = pool.apply(lambda tensor: tensor, (sent,))
    assert [part.tolist() for part in back.unbind()] == [part.tolist() for part in sent.unbind()]


def test_an_executor_takes_a_sparse_tensor():
    eye = torch.eye(100).to_sparse()
    with forkshm.Executor(1) as executor:
        assert torch.equal(executor.submit(torch.Tensor.to_dense, eye).result(), torch.eye(100))


def test_a_tensor_in_shared_memory_is_the_same_memory_there(pool):
    array = forkshm.zeros(100_000)
    tensor = torch.from_numpy(np.asarray(array))

    def fill(given):
        given += 5

    before = pool.statistics().bytes_copied
    pool.apply(fill, (tensor,))
    pool.apply(fill, (tensor[10:20],))
    assert pool.statistics().bytes_copied == before
    assert tensor[15] == 10
    assert tensor[25] == 5


def test_tensors_that_share_memory_share_memory_at_the_receiver(pool):
    tensor = torch.zeros(100_000)

    def write(pair):
        pair[0].fill_(3)
        return float(pair[1].sum())

    assert pool.apply(write, ([tensor, tensor[50:150]],)) == 300
    assert tensor.sum() == 0


def test_a_module_with_its_parameters(pool):
    model = torch.nn.Linear(300, 200)
    given = torch.ones(300)
    back = pool.apply(lambda m, x: m(x).detach(), (model, given))
    assert torch.equal(back, model(given).detach())
    assert isinstance(pool.apply(lambda m: m, (model,)).weight, torch.nn.Parameter)


def test_a_read_only_tensor_arrives_as_a_copy(pool):
    array = forkshm.ones(1000)
    tensor = torch.from_numpy(np.asarray(array))

    def write(given):
        given += 1
        return float(given.sum())

    assert pool.apply(write, (forkshm.view(tensor, "read_only"),)) == 2000
    assert array.sum() == 1000
