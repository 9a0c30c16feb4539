"""Arrays born shared: NumPy allocates large ones in the arena.

Such an array is an ordinary array in all respects. It owns its memory, which is a block of the arena that this process
claims until NumPy frees it. Sending the array sends on the block.
"""

from __future__ import annotations

import array
import contextlib
import functools
import importlib
import operator
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from forkshm._interrupts import is_of_kernel, promptly
from forkshm.backend import kernel
from forkshm.backend.numpy_hook import Hook, malloc_usable_size
from forkshm.errors import UnsupportedError
from forkshm.region import at_fork, is_changing
from forkshm.region.blocks import Share, arena

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm.region.blocks import Hold

__all__ = ("MIN_BYTES", "has_born", "own_blocks", "shared_allocations", "use_own_blocks", "use_own_memory")

# Smaller arrays are allocated as usual. A block takes 12 us, a twentieth of the time it takes to fill this much.
MIN_BYTES = 1024 * 1024

# NumPy's free caches memory whose stated size is below 1 KiB, for the next array of that size.
_NOT_SMALL = 2**20

# Addresses of living arrays that were born in blocks.
_born: dict[int, Hold] = {}
# Created once, and kept forever.
_hooks: list[Hook] = []
_handlers: dict[tuple[Share, int], Any] = {}


def _hook() -> Hook:
    if not _hooks:
        package = "numpy._core" if int(np.__version__.partition(".")[0]) >= 2 else "numpy.core"
        try:
            umath = importlib.import_module(f"{package}._multiarray_umath")
            # This function was added with the hook, in NumPy 1.22.
            umath.get_handler_name  # noqa: B018
            hook = Hook(umath._ARRAY_API)
        except (ImportError, AttributeError, LookupError) as error:
            raise UnsupportedError(
                f"cannot make NumPy {np.__version__} allocate arrays in shared memory: {error}. "
                "Create them with forkshm.empty, zeros or array instead.",
                capability="born_shared",
            ) from error
        # Two threads may both have created one; both then use the first.
        _hooks.append(hook)
        at_fork(before=_before_fork)
    return _hooks[0]


def _handler(share: Share, min_bytes: int) -> Any:
    if operator.index(min_bytes) < 1:
        raise ValueError(f"min_bytes must be at least 1, got {min_bytes}")
    hook = _hook()
    found = _handlers.get((share, min_bytes))
    if found is None:
        made = hook.new_handler(
            min_bytes,
            lambda size, zeroed: _allocate(share, size, zeroed=zeroed),
            lambda old, size, answer: _reallocate(share, min_bytes, old, size, answer),
            _release,
        )
        found = _handlers.setdefault((share, min_bytes), made)
    return found


def shared_allocations(min_bytes: int = MIN_BYTES) -> contextlib._GeneratorContextManager[None]:
    """Return a context manager in which all large new arrays are in shared memory, whichever code creates them.

    NumPy itself asks forkshm for their memory, so the code that creates them needs no change:
    ``np.load``, arithmetic, a library. They are ordinary arrays that own their memory, also
    after the block. Passing one, or a view of it, to another process passes the memory: all
    processes see each other's writes, as with arrays of `forkshm.empty`.

    Args:
        min_bytes: Smaller arrays are allocated as usual, at the usual cost. A larger array costs
            12 us more. Its memory was used before, which is faster if the kernel would otherwise
            have to clear new pages.

    Returns:
        A context manager for a single use. Blocks may be nested; the innermost counts. It also
        works as a decorator: each call of the function is such a block.

    Raises:
        MissingDependencyError: NumPy is not installed.
        UnsupportedError: NumPy has no hook for its memory (it was added in 1.22), or forkshm
            cannot use the hook here. It needs x86-64 and the main interpreter. Create arrays
            with `forkshm.empty` instead.
        ValueError: *min_bytes* is less than 1.

    When the kernel has no memory or fds for shared arrays, arrays are allocated as usual, and
    sent as copies. Arrays of Python objects, and subclasses with their own pickling, such as
    masked arrays, are always sent as copies. Memory that grows or shrinks
    (``ndarray.resize``) moves; a process that has the old memory continues to see the old.

    Fork and threads:
        The block applies to one thread or asyncio task: NumPy keeps the hook in a
        `contextvars.Context`, and a new thread starts with an empty one. A forked child is
        in the block as well. It sees its parent's arrays and may write to them; it may also share
        the arrays that it creates. The workers of a `Pool` are never in the block in which the
        pool was created: see its ``born_shared``. Any thread may release any array.

    Example:
        >>> import forkshm, numpy
        >>> with forkshm.shared_allocations():
        ...     table = numpy.arange(1_000_000.0).reshape(1000, 1000)
        >>> def clear(column):
        ...     column[:] = 0
        >>> with forkshm.Pool(1) as pool:
        ...     pool.apply(clear, (table[:, 7],))
        >>> float(table[:, 7].sum()), float(table[0, 8])
        (0.0, 8.0)

    See Also:
        NEP 49, "Data allocation strategies".
    """
    _handler(Share.shared, min_bytes)
    return _sharing(min_bytes)


@contextlib.contextmanager
def _sharing(min_bytes: int) -> Iterator[None]:
    hook = _hook()
    before = hook.set(_handler(Share.shared, min_bytes))
    try:
        yield
    finally:
        hook.set(before)


def has_born() -> bool:
    """Return whether any array of this process was born in a block."""
    return bool(_born)


def own_blocks() -> Any:
    """Return the handler that allocates arrays in blocks used only by this process.

    Raises:
        UnsupportedError: NumPy's hook cannot be used here.
    """
    return _handler(Share.exclusive, MIN_BYTES)


def use_own_blocks() -> None:
    """Allocate new arrays of this thread in such blocks from now on."""
    _hook().set(own_blocks())


def use_own_memory() -> None:
    """Allocate new arrays of this thread in NumPy's own memory from now on."""
    for hook in _hooks:
        hook.set(hook.default)


# -- called by NumPy, anywhere --------------------------------------------------------


def _allocate(share: Share, size: int, *, zeroed: bool) -> int:
    if is_changing():  # the collector or a signal handler allocates in the middle of a change
        return 0
    try:
        block = arena.allocate(size)
        held = arena.hold(block, share)
    except OSError as error:
        if not is_of_kernel(error):
            raise  # a signal handler raised it
        return 0  # memory, address space or fds are used up; NumPy's own allocation may succeed
    address = held.claim.address
    if zeroed and block.used:
        kernel.clear_memory(address, min(block.used, size))
    # Last, and no call behind it: an interrupted allocation returns its block.
    _born[address] = held
    return address


def _reallocate(share: Share, min_bytes: int, old: int, size: int, answer: Any) -> None:
    hook = _hooks[0]
    held = _born.get(old)
    if held is not None:
        room = held.claim.size
        if size <= room <= 2 * size:
            answer.value = old
            return
    else:
        room = malloc_usable_size(old) if malloc_usable_size is not None and old else 0
        if size < min_bytes or (old and not room):
            # The call and the store of its result are one C call.
            all(map(setattr, (answer,), ("value",), map(hook.own_realloc, (0,), (old,), (size,))))
            return
    new = [_allocate(share, size, zeroed=False)] if size >= min_bytes else [0]
    try:
        if not new[0]:
            new[:] = map(hook.own_malloc, (0,), (size,))
        if new[0]:
            kernel.copy_memory(new[0], old, min(room, size))
            # NumPy has the new memory before the old is released, also when this is interrupted in between.
            answer.value = new[0]
            _release(old)
    except BaseException:
        if not answer.value:
            _release(new[0])
        raise


@promptly
def _release(address: int) -> None:
    # No call before the memory is released.
    if address in _born:
        del _born[address]
    elif address:
        _hooks[0].own_free(0, address, _NOT_SMALL)


# -- fork -----------------------------------------------------------------------------

# Offset of the type's address in an object, and the type at the end of every chain of types.
_TYPE_AT = object.__basicsize__ - 8
_TYPE = id(type)


def _before_fork() -> None:
    # Addresses of objects are valid in one process only, so a fork must copy the memory of an array
    # of objects like all other memory. NumPy does not say which type it allocates for.
    for held in list(_born.values()):
        claim = held.claim
        if claim.share is Share.shared and _may_hold_objects(kernel.bytes_at(claim.address, kernel.page_size)):
            with contextlib.suppress(OSError):
                claim.part()


def _may_hold_objects(content: bytes) -> bool:
    words = {word for word in array.array("Q", content) if not word % 8 and kernel.page_size <= word < 2**47}
    if not words:
        return False
    try:
        memory = kernel.open_own_memory()
    except OSError:
        return True
    try:
        return True in map(functools.partial(_is_object, memory), words)
    finally:
        kernel.close(memory)


def _is_object(memory: int, address: int) -> bool:
    """Return whether *address* holds a Python object; read through *memory*, where a bad address does not crash."""
    assert sys.platform != "win32"  # Windows has no file of a process's memory
    for _ in range(4):  # object, type, type of types, and one more
        try:
            address = int.from_bytes(os.pread(memory, 8, address + _TYPE_AT), "little")
        except (OSError, OverflowError):
            return False
        if address == _TYPE:
            return True
    return False
