"""The names of multiprocessing exist here, have the same meaning, and take the same arguments."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import multiprocessing.connection
import multiprocessing.managers
import multiprocessing.pool
import multiprocessing.queues
import pkgutil
import time

import pytest

import forkshm
import forkshm.managers
import forkshm.pool

METHODS = ["fork", "spawn", "forkserver"]

# Imported by the module itself, and not meant for users.
NOT_OFFERED = {"sys"}

# Classes that multiprocess uses to start processes; users do not import them.
NOT_MODULES = {"popen_fork", "popen_forkserver", "popen_spawn_posix", "popen_spawn_win32"}

# Takes one more positional argument: it is the class, like that of multiprocessing.pool.
CLASSES_HERE = {"Pool"}


def public(names):
    return {name for name in names if not name.startswith("_")}


def modules_of_the_standard_library():
    # Not by its files, because it may be in a zip archive.
    for module in sorted(pkgutil.iter_modules(multiprocessing.__path__), key=lambda module: module.name):
        if module.name not in NOT_MODULES:
            yield module.name
            if module.ispkg:
                inside = importlib.import_module(f"multiprocessing.{module.name}").__path__
                yield from (f"{module.name}.{part.name}" for part in pkgutil.iter_modules(inside))


def parameters(function):
    return list(inspect.signature(function).parameters.values())


def differences(theirs, ours):
    """Return arguments that only one of the two accepts; annotations and new keyword-only options do not count."""
    theirs, ours = parameters(theirs), parameters(ours)
    for mine, other in zip(ours, theirs, strict=False):
        if (mine.name, mine.kind, mine.default) != (other.name, other.kind, other.default):
            yield f"{other} is {mine}"
    for other in theirs[len(ours) :]:
        yield f"{other} is missing"
    for mine in ours[len(theirs) :]:
        if mine.kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            yield f"{mine} is new, and not keyword-only"


def test_every_name_is_here():
    names = public(dir(multiprocessing)) - NOT_OFFERED - NOT_MODULES
    assert names - set(dir(forkshm)) == set()
    assert set(multiprocessing.__all__) <= set(forkshm.__all__)
    for name in names:
        assert hasattr(forkshm, name)


def test_the_names_come_with_a_star(run_script):
    names = sorted(multiprocessing.__all__)
    said = run_script(f"from forkshm import *\nprint(all(name in globals() for name in {names}))")
    assert said == "True\n"


@pytest.mark.parametrize("name", sorted(multiprocessing.__all__))
def test_a_name_takes_the_same_arguments(name):
    theirs, ours = getattr(multiprocessing, name), getattr(forkshm, name)
    assert callable(ours) == callable(theirs)
    if inspect.isclass(theirs) and issubclass(theirs, Exception):
        assert inspect.isclass(ours)
        assert [base.__name__ for base in ours.__mro__] == [base.__name__ for base in theirs.__mro__]
    elif callable(theirs):
        if name in CLASSES_HERE:
            theirs = getattr(multiprocessing.pool, name)
        assert list(differences(theirs, ours)) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted({*multiprocessing.__all__} - {"get_all_start_methods"}))
def test_a_context_has_the_same(name, method):
    theirs = getattr(multiprocessing.get_context(method), name)
    ours = getattr(forkshm.get_context(method), name)
    assert callable(ours) == callable(theirs)
    if callable(theirs) and not (inspect.isclass(theirs) and issubclass(theirs, Exception)):
        assert list(differences(theirs, ours)) == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (multiprocessing.Process, forkshm.Process),
        (multiprocessing.pool.Pool, forkshm.Pool),
        (multiprocessing.pool.AsyncResult, forkshm.pool.AsyncResult),
        (multiprocessing.pool.MapResult, forkshm.pool.MapResult),
        (multiprocessing.pool.IMapIterator, forkshm.pool.IMapIterator),
        (multiprocessing.queues.Queue, forkshm.Queue),
        (multiprocessing.queues.SimpleQueue, forkshm.SimpleQueue),
        (multiprocessing.queues.JoinableQueue, forkshm.JoinableQueue),
        (multiprocessing.connection.Connection, forkshm.connection.Connection),
        (multiprocessing.managers.BaseManager, forkshm.managers.BaseManager),
        (multiprocessing.managers.SyncManager, forkshm.managers.SyncManager),
    ],
    ids=lambda kind: f"{kind.__module__}.{kind.__name__}",
)
def test_a_class_has_the_same_methods(theirs, ours):
    missing = public(dir(theirs)) - public(dir(ours)) - {"Process", "mro"}
    assert missing == set()
    for name in public(dir(theirs)) - {"Process"}:
        method = getattr(theirs, name)
        if inspect.isroutine(method):
            assert list(differences(method, getattr(ours, name))) == [], name
        elif isinstance(method, property):
            assert isinstance(getattr(ours, name), property), name


@pytest.mark.parametrize("name", list(modules_of_the_standard_library()))
def test_a_module_is_here_and_has_the_same_names(name):
    theirs, ours = importlib.import_module(f"multiprocessing.{name}"), importlib.import_module(f"forkshm.{name}")
    for known in {*getattr(theirs, "__all__", ()), *public(dir(theirs))}:
        if inspect.ismodule(getattr(theirs, known)):
            continue  # imported by the module itself
        assert getattr(ours, known, None) is not None or getattr(theirs, known) is None, known
        assert known in dir(ours)


@pytest.mark.parametrize("name", list(modules_of_the_standard_library()))
def test_a_module_is_imported_in_every_way(name, run_script):
    head, _, last = name.rpartition(".")
    above = f"forkshm.{head}".removesuffix(".")
    run_script(f"""
import sys
import forkshm as mp
assert mp.{name.partition(".")[0]}.__name__ == "forkshm.{name.partition(".")[0]}"
import forkshm.{name}
import forkshm.{name} as one
from {above} import {last} as other
from forkshm.{name} import *
assert one is other is sys.modules["forkshm.{name}"]
""")


def test_names_whose_value_changes_are_looked_up_each_time(run_script):
    run_script("""
import forkshm.process, forkshm.util

def work():
    assert forkshm.process._current_process.name == "Bee"
    assert forkshm.parent_process().pid and forkshm.current_process().name == "Bee"

if __name__ == "__main__":
    process = forkshm.Process(target=work, name="Bee")
    process.start()
    process.join()
    assert process.exitcode == 0
    assert forkshm.util._logger is None
    logger = forkshm.get_logger()
    assert forkshm.util._logger is logger
""")


def test_an_unknown_name_of_a_module_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        forkshm.synchronize.no_such_thing  # noqa: B018
    with pytest.raises(ImportError, match="no_such_thing"):
        exec("from forkshm.pool import no_such_thing")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("forkshm.util.no_such_thing")


def test_exported_exceptions_are_the_raised_ones(pool):
    with pytest.raises(forkshm.TimeoutError) as timed_out:
        pool.apply_async(time.sleep, (0.2,)).get(timeout=0.001)
    assert isinstance(timed_out.value, multiprocessing.TimeoutError)
    here, there = forkshm.Pipe()
    with here, there:
        here.send_bytes(b"12345678")
        with pytest.raises(forkshm.BufferTooShort) as caught:
            there.recv_bytes_into(bytearray(2))
    assert isinstance(caught.value, multiprocessing.BufferTooShort)
    assert issubclass(forkshm.TimeoutError, forkshm.ProcessError)
    assert forkshm.context.TimeoutError is forkshm.TimeoutError is forkshm.pool.TimeoutError
    assert forkshm.context.AuthenticationError is forkshm.AuthenticationError


def test_created_objects_are_instances_of_exported_classes(run_script):
    run_script("""
import forkshm

def main():
    assert isinstance(forkshm.Queue(), forkshm.queues.Queue)
    assert isinstance(forkshm.get_context("spawn").SimpleQueue(), forkshm.queues.SimpleQueue)
    assert isinstance(forkshm.Lock(), forkshm.synchronize.Lock)
    assert isinstance(forkshm.Event(), forkshm.synchronize.Event)
    assert isinstance(forkshm.Value("i"), forkshm.sharedctypes.Synchronized)
    assert all(isinstance(end, forkshm.connection.Connection) for end in forkshm.Pipe())
    assert isinstance(forkshm.get_context("spawn").Process(), forkshm.process.BaseProcess)
    assert isinstance(forkshm.get_context(), forkshm.context.BaseContext)
    with forkshm.pool.ThreadPool(2) as threads:
        assert threads.map(abs, [-1, 2]) == [1, 2]
    with forkshm.Pool(1) as pool:
        assert isinstance(pool, forkshm.pool.Pool)
        assert isinstance(pool.apply_async(abs, (1,)), forkshm.pool.AsyncResult)
    with forkshm.Manager() as manager:
        assert isinstance(manager, forkshm.managers.BaseManager)
        assert isinstance(manager.list(), forkshm.managers.BaseProxy)

if __name__ == "__main__":
    main()
""")
