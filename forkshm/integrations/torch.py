"""PyTorch: tensors on the CPU are sent as arrays are."""

# Without PyTorch installed, pyright resolves the name torch to this module.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

import torch

from forkshm.integrations import numpy as _  # noqa: F401 - registers how arrays cross
from forkshm.pickler import Handle, ReceivedFd, register
from forkshm.region import mapping_at

if TYPE_CHECKING:
    import numpy as np

# The parts of PyTorch without type annotations.
_untyped: Any = torch

# Types that NumPy lacks, mapped to a type of the same size that carries them.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def reduce_tensor(tensor: torch.Tensor) -> Any:
    """Reduce a tensor: as a descriptor if it lies in shared memory, else with one copy of its elements.

    Tensors on other devices, and sparse, quantized and nested tensors are left to PyTorch.
    """
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor._backward_hooks or not tensor.numel():
        return NotImplemented
    if vars(tensor):
        return NotImplemented  # it has attributes of its own
    untyped: Any = tensor
    if tensor.is_nested:
        return NotImplemented  # its elements have no common shape
    if untyped.is_shared() and not mapping_at(tensor.data_ptr()) and not _is_of_file(tensor):
        return _reduce_shared(tensor)
    bits = tensor.detach()
    dtype = None
    try:
        elements = bits.numpy()
    except TypeError:
        carrier = _CARRIERS.get(bits.element_size())
        if carrier is None:
            return NotImplemented
        dtype = bits.dtype
        elements = bits.view(carrier).numpy()
    return rebuild_tensor, (elements, dtype, tensor.requires_grad)


def _is_of_file(tensor: torch.Tensor) -> bool:
    """Return whether the memory of a tensor is a file that PyTorch has mapped, as ``torch.from_file`` does.

    PyTorch calls such memory shared, but has no fd for it. It is sent as other mappings of files are.
    """
    storage: Any = tensor.untyped_storage()
    if _untyped.multiprocessing.get_sharing_strategy() == "file_system":
        return storage.filename is not None
    return bool(storage._share_fd_cpu_()[0] < 0)


def _reduce_shared(tensor: torch.Tensor) -> Any:
    """Reduce a tensor after ``share_memory_()`` to an fd of PyTorch's own memory."""
    storage: Any = tensor.untyped_storage()
    if _untyped.multiprocessing.get_sharing_strategy() == "file_system":
        return _reduce_named(tensor, storage)
    fd, nbytes = storage._share_fd_cpu_()  # the fd belongs to the storage
    handle = Handle(fd)
    layout = tensor.dtype, tensor.storage_offset(), tuple(tensor.size()), tensor.stride(), tensor.requires_grad
    return rebuild_shared, (pickle.PickleBuffer(handle), nbytes, *layout)


def _reduce_named(tensor: torch.Tensor, storage: Any) -> Any:
    manager, name, nbytes = storage._share_filename_cpu_()
    layout = tensor.dtype, tensor.storage_offset(), tuple(tensor.size()), tensor.stride(), tensor.requires_grad
    return rebuild_named, (manager, name, nbytes, *layout)


def rebuild_shared(received: ReceivedFd, nbytes: int, *layout: Any) -> torch.Tensor:
    """Return the tensor whose shared memory arrived."""
    fd = received.take()
    try:
        storage = _untyped.UntypedStorage._new_shared_fd_cpu(fd, nbytes)
    finally:
        os.close(fd)
    return _over(storage, *layout)


def rebuild_named(manager: bytes, name: bytes, nbytes: int, *layout: Any) -> torch.Tensor:
    """Return the tensor whose memory has that name."""
    return _over(_untyped.UntypedStorage._new_shared_filename_cpu(manager, name, nbytes), *layout)


def _over(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: Any, stride: Any, requires_grad: bool
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


def rebuild_tensor(elements: np.ndarray[Any, Any], dtype: torch.dtype | None, requires_grad: bool) -> torch.Tensor:
    """Return the tensor whose elements arrived; read-only elements are copied."""
    if not elements.flags.writeable:
        elements = elements.copy()  # tensors are writable, and writing to this memory would kill the process
    tensor = torch.from_numpy(elements)
    if dtype is not None:
        tensor = tensor.view(dtype)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


def reduce_storage(storage: torch.UntypedStorage) -> Any:
    """Reduce the memory of a tensor as the tensor of its bytes."""
    if storage.device.type != "cpu":
        return NotImplemented
    if not storage.nbytes():
        return torch.UntypedStorage, (0,)  # an empty tensor is sent with its storage
    return rebuild_storage, (torch.empty(0, dtype=torch.uint8).set_(storage),)


def rebuild_storage(content: torch.Tensor) -> torch.UntypedStorage:
    """Return the memory whose bytes arrived."""
    return content.untyped_storage()


def reduce_typed(storage: torch.TypedStorage) -> Any:
    """Reduce the memory of a tensor that PyTorch reduces, such as a subclass or a conjugate view."""
    return rebuild_typed, (storage._untyped_storage, storage.dtype)


def rebuild_typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    """Return the memory that arrived, with the type of its elements."""
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


register(torch.Tensor, reduce_tensor)
register(torch.UntypedStorage, reduce_storage)
register(torch.TypedStorage, reduce_typed)


def settle_worker() -> None:
    """Limit PyTorch to one thread in a forked worker, as its own DataLoader does.

    A fork does not copy OpenMP's threads, and GNU's OpenMP waits for them forever.
    """
    torch.set_num_threads(1)
