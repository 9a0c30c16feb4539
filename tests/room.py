"""What tests need of the machine beyond what forkshm needs."""

from __future__ import annotations

import os
import resource

import pytest


def needs_room_in_shm(nbytes):
    """Skip where memory with a name may not be as large as that."""
    status = os.statvfs("/dev/shm")
    room = status.f_bavail * status.f_frsize
    if room < nbytes:
        pytest.skip(f"/dev/shm has room for {room:,} bytes, and this takes {nbytes:,}")


def needs_fds(count):
    """Skip where a process may not have so many files open beside those of the test run."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < count + 100:  # what the test run itself has
        pytest.skip(f"needs {count} open files, and the hard limit is {hard}")
