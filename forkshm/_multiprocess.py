"""The only file that imports ``multiprocess``.

``multiprocess`` carries no types, so for the type checker these names are those of the
standard library it was forked from. Every seam that forkshm leans on is listed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing import TimeoutError
    from multiprocessing import context as context
    from multiprocessing import process as process
    from multiprocessing import util as util
else:
    from multiprocess import (
        TimeoutError,  # noqa: A004
        context,
        process,
        util,
    )

__all__ = ("TimeoutError", "context", "current_process", "get_logger", "let_have_children", "process", "util")

current_process = process.current_process
get_logger = util.get_logger


def let_have_children() -> None:
    """Allow this daemonic process to start processes of its own.

    The flag keeps a *parent* from waiting for its daemons; it also forbids the daemon
    to have children. A pool worker needs the first and not the second: its own
    workers die with it, because their lifeline does.
    """
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the seam has no public name
