"""The names that `import forkshm` provides, and the cost of the import."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import forkshm

PACKAGES = [
    "forkshm",
    "forkshm.accounting",
    "forkshm.backend",
    "forkshm.channel",
    "forkshm.descriptor",
    "forkshm.aio",
    "forkshm.executor",
    "forkshm.decorator",
    "forkshm.containers",
    "forkshm.errors",
    "forkshm.integrations.numpy",
    "forkshm.pickler",
    "forkshm.pool",
    "forkshm.processes",
    "forkshm.region",
    "forkshm.testing",
    "forkshm.spmd",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_that_is_offered_is_there(package):
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


@pytest.mark.parametrize("name", ["aio", "decorator", "executor", "joblib", "pandas", "pytest", "testing"])
def test_a_module_of_its_own_is_found_without_an_import(name):
    """As in ``forkshm.pandas.Engine(4)``."""
    if importlib.util.find_spec(name) is None and name in ("joblib", "pandas"):
        pytest.skip(f"needs {name}")
    program = f"import forkshm, sys; assert 'forkshm.{name}' not in sys.modules; print(forkshm.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == f"forkshm.{name}\n"


def test_everything_public_is_offered():
    """Check that __all__ has exactly the names that the package imports for its users."""
    source = pathlib.Path(forkshm.__file__).read_text()
    imported = {
        name.strip()
        for names in re.findall(r"^\s*from forkshm\.\S+ import (?:\(([^)]*)\)|(.*))$", source, re.MULTILINE)
        for name in re.sub(r"#.*", "", ",".join(names)).replace("\n", ",").split(",")
        if name.strip()
    }
    imported = {name.rpartition(" as ")[2] for name in imported} - {"numpy", "publish"}
    assert imported <= set(forkshm.__all__)
    assert "SharedArray" in imported


def test_the_order_of_all_can_be_searched():
    assert list(forkshm.__all__) == sorted(forkshm.__all__)


def test_dir_lists_names_before_their_first_use(run_script):
    said = run_script("import forkshm; print(*dir(forkshm))")
    assert said.split() == dir(forkshm)
    assert set(forkshm.__all__) < set(dir(forkshm))
    assert [name for name in dir(forkshm) if not hasattr(forkshm, name)] == []


def test_a_star_import_has_all_names(run_script):
    said = run_script("from forkshm import *; print(zeros(3).tolist(), Pool.__name__, Mode.read_only)")
    assert said == "[0.0, 0.0, 0.0] Pool read_only\n"


@pytest.mark.parametrize("library", ["numpy", "pandas", "forkshm.integrations.numpy", "asyncio"])
def test_importing_forkshm_imports_no_optional_library(run_script, library):
    assert run_script(f"import sys, forkshm; print({library!r} in sys.modules)") == "False\n"


@pytest.mark.needs("proc")
def test_importing_forkshm_starts_nothing(run_script):
    script = """
import os, threading
def opened():
    paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    # libffi, which ctypes uses, opens its own file.
    return [path for path in paths if os.path.exists(path) and "libffi" not in os.readlink(path)]
before = opened()
import forkshm
assert threading.active_count() == 1
assert opened() == before, (before, opened())
assert not open("/proc/self/task/%d/children" % os.getpid()).read()
"""
    run_script(
        script.replace('not open("/proc', 'not __import__("pathlib").Path("/proc').replace(").read()", ").read_text()")
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'forkshm' has no attribute 'no_such_thing'"):
        forkshm.no_such_thing  # noqa: B018
    assert not hasattr(forkshm, "no_such_thing")


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|a|b|rc)\d+)?", forkshm.__version__)


def public_callables():
    for name in forkshm.__all__:
        thing = getattr(forkshm, name)
        if callable(thing) and getattr(thing, "__module__", "").startswith("forkshm"):
            yield name, thing
            if inspect.isclass(thing):
                for attribute, value in vars(thing).items():
                    if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                        yield f"{name}.{attribute}", value


def test_everything_that_can_be_called_has_a_docstring():
    assert [name for name, thing in public_callables() if not inspect.getdoc(thing)] == []


def test_the_package_has_a_py_typed_marker():
    assert (pathlib.Path(forkshm.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_classes_have_the_path_by_which_they_are_imported(package):
    module = importlib.import_module(package)
    things = [getattr(module, name) for name in module.__all__]
    private = [thing for thing in things if isinstance(thing, type) and "._" in thing.__module__]
    assert [thing for thing in private if thing.__module__.startswith("forkshm.")] == []


# forkshm's word for a parameter, and other words for the same.
WORDS = {
    "workers": {"max_workers", "n_jobs", "n_workers", "nprocs", "num_workers", "processes"},
    "timeout": {"patience", "wait_seconds"},
    "chunksize": {"batch_size", "chunk", "chunk_size"},
    "worker_init": {"worker_state"},
    "task_timeout": {"call_timeout", "item_timeout"},
}
# Callables that have another word because an interface of another library has it.
THEIRS = {"processes": {"Pool", "ThreadPool"}, "max_workers": {"ClusterExecutor", "Executor"}}


def signatures():
    """Yield the name and the signature of each public class, function and method, and the options of `parallel`."""
    yield "parallel", inspect.signature(importlib.import_module("forkshm.decorator._settings").Settings)
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            methods = vars(thing) if inspect.isclass(thing) else {}
            found = {name: thing, **{f"{name}.{key}": value for key, value in methods.items() if key[0] != "_"}}
            for path, each in found.items():
                with contextlib.suppress(ValueError, TypeError):  # not callable, or without a signature
                    yield path, inspect.signature(each)


def test_one_meaning_has_one_word():
    found = list(signatures())
    assert len(found) > 500
    others = {other: word for word, words in WORDS.items() for other in words}
    wrong = [
        f"{path}({parameter}=): say {others[parameter]}"
        for path, signature in found
        for parameter in signature.parameters
        if parameter in others and path.partition(".")[0] not in THEIRS.get(parameter, ())
    ]
    assert wrong == []
    # A limit on the time of one task is not a limit on the time of a call.
    assert "timeout" not in dict(found)["parallel"].parameters
    assert "size" not in dict(found)["team"].parameters
