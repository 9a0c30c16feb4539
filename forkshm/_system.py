"""What the standard library has on some systems only, under one name on all."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("CAN_FORK", "SIGCONT", "SIGKILL", "SIGSTOP", "register_at_fork")

#: Whether processes can be forked here.
CAN_FORK = hasattr(os, "fork")

#: Ends a process at once; the numbers stand for that also where signals have none.
SIGKILL: int = getattr(signal, "SIGKILL", 9)
#: Lets it not run, and run again.
SIGSTOP: int = getattr(signal, "SIGSTOP", 19)
SIGCONT: int = getattr(signal, "SIGCONT", 18)


def _never(
    *,
    before: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
    after_in_child: Callable[[], object] | None = None,
) -> None:
    """There is no fork on this system."""


#: As `os.register_at_fork`; nothing where there is no fork.
register_at_fork: Callable[..., None] = getattr(os, "register_at_fork", _never)
