"""Names the arguments of calls whose workers died. A node passes arguments on without unpickling them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from forkshm.cluster._values import read
from forkshm.errors import TaskTimeoutError, WorkerDiedError
from forkshm.pool.observe import describe_call, describe_chunk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forkshm.cluster._calls import Group

__all__ = ("name_arguments",)


def name_arguments(error: BaseException, name: str, group: Group, values: Mapping[str, Any]) -> bool:
    """Name what a dead worker ran in its error, as a pool on this machine does; return False for other errors.

    Args:
        error: The error from the node.
        name: The name of the function.
        group: The items that the worker was given. They are unpickled here only if the worker could unpickle them.
        values: The arrays and results that the items name.
    """
    if not isinstance(error, (WorkerDiedError, TaskTimeoutError)) or error.task is None:
        return False
    item, error.index = error.index, group.first
    if group.first is None:
        what = f"{name}(...)"
    else:
        error.index = group.first + (item or 0)
        what = describe_chunk(name, group.first, group.length)
    if item is not None:
        with contextlib.suppress(Exception):  # an argument may refuse
            args, kwargs = read(group.items, values)[item]
            what = describe_call(name, args, kwargs, error.index)
    error.args = (str(error).replace(error.task, what, 1),)
    error.task = what
    return True
