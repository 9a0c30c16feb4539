"""WindowsSharedMemory on other systems: the error names alternatives."""

from __future__ import annotations

import inspect
import os
import pickle

import pytest

from forkshm import Creation, Mode, UnsupportedError
from forkshm.region import WindowsSharedMemory

pytestmark = pytest.mark.skipif(os.name == "nt", reason="here it works")


@pytest.mark.parametrize("creation", list(Creation))
@pytest.mark.parametrize("mode", [Mode.read_only, Mode.read_write, Mode.copy_on_write])
def test_windows_shared_memory_is_refused_with_an_alternative(creation, mode):
    for arguments in ((creation, "name", mode), (creation.value, None, mode.value, 1000), (creation, r"Local\name")):
        with pytest.raises(UnsupportedError) as caught:
            WindowsSharedMemory(*arguments)
        assert caught.value.capability == "windows_sections"
        for telling in ("Windows only", "anonymous_shared_memory()", "SharedMemoryObject"):
            assert telling in str(caught.value)


def test_the_refusal_is_a_not_implemented_error_and_survives_pickling():
    with pytest.raises(NotImplementedError) as caught:
        WindowsSharedMemory("create_only", "name", "read_write", 1000)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.capability) == (UnsupportedError, str(caught.value), "windows_sections")


@pytest.mark.parametrize(("creation", "mode"), [("create", "read_write"), ("create_only", "rw")])
def test_a_wrong_argument_is_said_on_every_system(creation, mode):
    with pytest.raises(ValueError, match="must be one of '"):
        WindowsSharedMemory(creation, "name", mode)


def test_windows_shared_memory_has_the_interface_of_mappables():
    """The methods that Boost.Interprocess lacks are missing here, too: truncate and remove."""
    for member in ("name", "mode", "size", "closed", "fileno", "close", "__enter__", "__exit__"):
        assert hasattr(WindowsSharedMemory, member)
    assert not hasattr(WindowsSharedMemory, "truncate")
    assert not hasattr(WindowsSharedMemory, "remove")
    assert list(inspect.signature(WindowsSharedMemory).parameters) == [
        "creation",
        "name",
        "mode",
        "size",
        "permissions",
    ]


def test_every_method_of_a_forced_instance_is_refused():
    made = WindowsSharedMemory.__new__(WindowsSharedMemory)
    for use in (
        lambda: made.name,
        lambda: made.mode,
        lambda: made.size,
        lambda: made.closed,
        made.fileno,
        made.close,
        made.__enter__,
        lambda: made.__exit__(None, None, None),
    ):
        with pytest.raises(UnsupportedError):
            use()
