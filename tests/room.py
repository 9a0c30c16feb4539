"""Requirements of tests beyond those of forkshm."""

from __future__ import annotations

import os
import resource

import pytest


def needs_room_in_shm(nbytes):
    """Skip a test if named memory cannot have that size."""
    status = os.statvfs("/dev/shm")
    room = status.f_bavail * status.f_frsize
    if room < nbytes:
        pytest.skip(f"/dev/shm has room for {room:,} bytes, and this takes {nbytes:,}")


def needs_fds(count):
    """Skip a test if a process cannot have that many open files besides those of the test run."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < count + 100:  # open files of the test run itself
        pytest.skip(f"needs {count} open files, and the hard limit is {hard}")
