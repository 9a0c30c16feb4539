"""Every exception survives being sent between processes, and keeps its standard base classes."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import signal

import pytest

import forkshm
from forkshm import _multiprocess, errors
from forkshm.errors import ForkshmError, RemoteTraceback, WorkerDiedError, signal_name

# How to create exceptions that take more than a message.
SPECIAL = {
    errors.RegionCreateError: lambda: errors.RegionCreateError(12, "no memory", size=4096),
    errors.RegionBusyError: lambda: errors.RegionBusyError("still used", exports=3),
    errors.WorkerStartError: lambda: errors.WorkerStartError(11, "cannot fork"),
    errors.WorkerDiedError: lambda: errors.WorkerDiedError(123, -9, name="ForkProcess-1", task="resize(ndarray)"),
    errors.UnsupportedError: lambda: errors.UnsupportedError("needs more", capability="memfd"),
    errors.MissingDependencyError: lambda: errors.MissingDependencyError("needs numpy", extra="numpy"),
    errors.ChannelClosedError: lambda: errors.ChannelClosedError(9, "cannot send"),
}


def walk(cls):
    yield cls
    for below in cls.__subclasses__():
        if below in vars(errors).values():  # other modules define some, too, and may not be imported yet
            yield from walk(below)


CLASSES = sorted(set(walk(ForkshmError)), key=lambda cls: cls.__name__)


def make(cls):
    if cls in SPECIAL:
        return SPECIAL[cls]()
    # The others take an optional errno, a message, and their attributes by keyword.
    taken = inspect.signature(cls.__init__).parameters.values()
    keywords = {parameter.name: 17 for parameter in taken if parameter.kind is parameter.KEYWORD_ONLY}
    first = (2,) if any(parameter.name == "errno" for parameter in taken) else ()
    return cls(*first, "what was tried; what to do", **keywords)


def attributes(error):
    found = dict(error.__dict__)
    for name in ("errno", "strerror", "filename"):
        if hasattr(error, name):
            found[name] = getattr(error, name)
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_every_exception_survives_pickling_with_its_attributes(cls, protocol):
    error = make(cls)
    error.note = ["added later"]
    loaded = pickle.loads(pickle.dumps(error, protocol))
    assert type(loaded) is cls
    assert (str(loaded), repr(loaded), loaded.args) == (str(error), repr(error), error.args)
    assert attributes(loaded) == attributes(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_exception_can_be_copied(cls):
    error = make(cls)
    assert attributes(copy.copy(error)) == attributes(copy.deepcopy(error)) == attributes(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_exception_is_documented_and_exported(cls):
    assert cls.__doc__
    assert cls.__name__ in errors.__all__
    assert cls.__module__ == "forkshm.errors"
    if cls is errors.BufferTooShort:
        # The exported class is the one that the connections of multiprocess raise, too.
        assert issubclass(cls, forkshm.BufferTooShort)
    else:
        assert getattr(forkshm, cls.__name__) is cls


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_every_declared_attribute_is_there(name):
    cls = getattr(errors, name)
    error = make(cls)
    for declared in inspect.get_annotations(cls):
        assert hasattr(error, declared)


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.RegionCreateError, OSError),
        (errors.RegionClosedError, ValueError),
        (errors.RegionBusyError, BufferError),
        (errors.RegionGoneError, LookupError),
        (errors.NotPicklableError, pickle.PicklingError),
        (errors.NotPicklableError, RuntimeError),
        (errors.NotPicklableError, TypeError),
        (errors.NotUnpicklableError, pickle.UnpicklingError),
        (errors.ChannelClosedError, OSError),
        (errors.ChannelClosedError, ValueError),
        (errors.ChannelBrokenError, EOFError),
        (errors.ChannelBrokenError, BrokenPipeError),
        (errors.WorkerStartError, OSError),
        (errors.PoolClosedError, ValueError),
        (errors.TaskTimeoutError, _multiprocess.TimeoutError),
        (errors.TaskTimeoutError, multiprocessing.TimeoutError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.MissingDependencyError, ImportError),
        (errors.ForkshmWarning, UserWarning),
    ],
)
def test_except_clauses_written_for_the_standard_library_keep_working(cls, base):
    assert issubclass(cls, base)


@pytest.mark.parametrize(
    ("family", "members"),
    [
        (errors.RegionError, {"RegionCreateError", "RegionClosedError", "RegionBusyError", "RegionGoneError"}),
        (errors.SerializationError, {"NotPicklableError", "NotUnpicklableError"}),
        (errors.ChannelError, {"ChannelClosedError", "ChannelBrokenError"}),
        (errors.WorkerError, {"WorkerStartError", "WorkerDiedError"}),
    ],
)
def test_each_family_has_its_members(family, members):
    assert members <= {cls.__name__ for cls in walk(family)}


def test_errno_is_kept():
    error = make(errors.RegionCreateError)
    assert (error.errno, error.strerror, error.size) == (12, "no memory", 4096)
    assert str(error) == "[Errno 12] no memory"


@pytest.mark.parametrize(
    ("exitcode", "task", "text"),
    [
        (-9, "f(1)", "w (pid 7) was killed by SIGKILL while running f(1); the usual cause is the kernel's"),
        (-11, None, "w (pid 7) was killed by SIGSEGV before it could run a task"),
        (3, "f(1)", "w (pid 7) exited with code 3 while running f(1)"),
        (0, None, "w (pid 7) exited with code 0 before it could run a task"),
    ],
)
def test_a_death_is_told_with_how_and_during_what(exitcode, task, text):
    error = WorkerDiedError(7, exitcode, name="w", task=task)
    assert str(error).startswith(text)
    assert (error.pid, error.exitcode, error.task) == (7, exitcode, task)
    assert error.signal == signal_name(exitcode)


@pytest.mark.parametrize(
    ("exitcode", "name"),
    [(None, None), (0, None), (1, None), (-signal.SIGTERM, "SIGTERM"), (-200, "signal 200")],
)
def test_signals_have_names(exitcode, name):
    assert signal_name(exitcode) == name


def test_a_remote_traceback_shows_its_text_and_survives_pickling():
    cause = RemoteTraceback("Traceback: line 3")
    assert "Traceback: line 3" in str(cause)
    assert str(pickle.loads(pickle.dumps(cause))) == str(cause)


def test_a_gone_error_reads_as_a_sentence_and_not_as_a_key():
    assert str(errors.RegionGoneError("the region was closed")) == "the region was closed"
    assert str(errors.RegionGoneError()) == ""
