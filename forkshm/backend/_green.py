"""Blocking functions of the standard library, also in programs in which gevent or eventlet has replaced them.

A channel's end is a socket of the kernel: their own sockets wrap one, and cannot be received or detached.
"""

from __future__ import annotations

import importlib
import select
import sys
from typing import TYPE_CHECKING, Any

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

__all__ = ("Socket", "close", "new_poll")


def _original(module: str, name: str) -> Any:
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched(module):
        return gevent.get_original(module, name)
    if eventlet is not None and eventlet.is_monkey_patched(module):
        return getattr(eventlet.original(module), name)
    return getattr(importlib.import_module(module), name)


if TYPE_CHECKING:
    from os import close
    from socket import socket as Socket  # noqa: N812 - a class
else:
    Socket, close = _original("socket", "socket"), _original("os", "close")
"""The close of gevent fails at the end of the interpreter."""

_poll: Any = _original("select", "poll")


def new_poll() -> select.poll:
    """Return a new `select.poll`. That of gevent lets other tasks run while it waits; eventlet has removed it."""
    made: select.poll = getattr(select, "poll", _poll)()
    return made
