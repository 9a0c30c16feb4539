"""Fixtures for the tests of child processes."""

from __future__ import annotations

from started import CAN_FORK

if not CAN_FORK:
    from started import _what_there_is, in_child, run_script  # noqa: F401
