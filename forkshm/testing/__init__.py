"""Leak checks for tests: what this process holds, and whether that grew."""

from forkshm._help import publish
from forkshm.testing._leaks import Holdings, check_leaks, holdings

__all__ = ("Holdings", "check_leaks", "holdings")

publish(globals())
