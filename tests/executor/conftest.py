"""Fixtures for the tests of executors."""

from __future__ import annotations

from started import CAN_FORK, gate  # noqa: F401

if not CAN_FORK:
    from started import _what_there_is, in_child, run_script  # noqa: F401
