"""What happens at a fork, where there is such a thing."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("at_fork",)

if sys.platform == "win32":

    def at_fork(
        *,
        before: Callable[[], object] | None = None,
        after_in_parent: Callable[[], object] | None = None,
        after_in_child: Callable[[], object] | None = None,
    ) -> None:
        """Have these called around each fork: there are none here."""

else:
    at_fork = os.register_at_fork
