"""PyTorch: tensors on the CPU cross as arrays do."""

# Where PyTorch is not installed pyright takes this module, which has its name, for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from forkshm.integrations import numpy as _  # noqa: F401 - registers how arrays cross
from forkshm.pickler._reducers import register

if TYPE_CHECKING:
    import numpy as np

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
