"""PyTorch: tensors on the CPU cross as arrays do."""

# Where PyTorch is not installed pyright takes this module, which has its name, for it.
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

#: What of it has no types.
_untyped: Any = torch

#: Types that NumPy has not, by the type with as many bytes that carries them.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def reduce_tensor(tensor: torch.Tensor) -> Any:
    """Send a tensor: in place if it lies in shared memory, else its elements, once.

    Tensors on other devices, sparse and quantized ones take PyTorch's own way.
    """
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor._backward_hooks or not tensor.numel():
        return NotImplemented
    if vars(tensor):
        return NotImplemented  # attributes of its own
    untyped: Any = tensor
    if untyped.is_shared() and not mapping_at(tensor.data_ptr()):
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


def _reduce_shared(tensor: torch.Tensor) -> Any:
    """Send a tensor after ``share_memory_()``: an fd of PyTorch's own memory."""
    storage: Any = tensor.untyped_storage()
    if _untyped.multiprocessing.get_sharing_strategy() == "file_system":
        return _reduce_named(tensor, storage)
    fd, nbytes = storage._share_fd_cpu_()  # the storage's own
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
    """Return the tensor whose elements arrived; a copy of those that are for reading only."""
    if not elements.flags.writeable:
        elements = elements.copy()  # tensors can always be written to, and the kernel would end us
    tensor = torch.from_numpy(elements)
    if dtype is not None:
        tensor = tensor.view(dtype)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


register(torch.Tensor, reduce_tensor)


def settle_worker() -> None:
    """Let PyTorch compute in a forked worker: with one thread, as its own DataLoader does.

    The threads of OpenMP are not forked, and GNU's waits for them for ever.
    """
    torch.set_num_threads(1)
