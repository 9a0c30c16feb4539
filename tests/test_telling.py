"""Messages to users name public names, and alternatives."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading

import pytest

import forkshm
from forkshm._system import path_of


@pytest.mark.parametrize("make", [forkshm.SharedDict, forkshm.SharedList])
def test_a_read_only_container_raises_with_an_alternative(make):
    items = make({1: 2} if make is forkshm.SharedDict else [0, 1])
    name = make.__name__
    factory = "dict" if make is forkshm.SharedDict else "list"
    with pytest.raises(TypeError, match=rf"cannot set item 1 of a {name}: it is read-only.*Manager\(\).{factory}\(\)"):
        items[1] = 2
    with pytest.raises(TypeError, match=rf"cannot delete item 1 of a {name}: it is read-only"):
        del items[1]
    for method in ("pop", "clear", *(("update", "setdefault") if factory == "dict" else ("append", "sort"))):
        with pytest.raises(AttributeError, match=rf"cannot call {method}\(\) of a {name}: it is read-only"):
            getattr(items, method)
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'nonsense'"):
        _ = items.nonsense


def test_read_only_containers_are_still_copied_and_pickled():
    import copy

    for items in (forkshm.SharedDict({1: 2}), forkshm.SharedList([1])):
        assert copy.copy(items) == items
        assert copy.deepcopy(items) == items
        assert pickle.loads(pickle.dumps(items)) == items


def test_names_in_reprs_and_errors_are_public():
    class Sub(forkshm.Pool):
        pass

    with forkshm.Pool(1) as pool:
        assert repr(pool) == "<forkshm.Pool state=RUN pool_size=1>"
        with pytest.raises(forkshm.ResultNotPicklableError) as caught:
            pool.apply(threading.Lock)
    error = caught.value
    assert f"{type(error).__module__}.{type(error).__qualname__}" == "forkshm.ResultNotPicklableError"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is forkshm.ResultNotPicklableError
    assert again.args == error.args
    assert path_of(Sub).endswith("test_names_in_reprs_and_errors_are_public.<locals>.Sub")
    assert path_of(int) == "int"
    assert path_of(forkshm.Queue) == "forkshm.Queue"
    assert path_of(forkshm.pool.MapResult) == "forkshm.pool.MapResult"
    assert repr(forkshm.Barrier(1)).startswith("<forkshm.sync.Barrier at")


def test_the_name_of_an_asyncio_pool_is_public():
    async def main():
        async with forkshm.aio.Pool(1) as pool:
            assert repr(pool) == "<forkshm.aio.Pool of <forkshm.Pool state=RUN pool_size=1>>"

    asyncio.run(main())


def test_an_unpicklable_part_is_named_in_the_users_terms():
    with forkshm.Pool(1) as pool, pytest.raises(Exception, match=r"forkshm\.Pool") as caught:
        pool.apply(len, ([pool],))
    assert "._pool" not in str(caught.value)


def test_the_version_is_told():
    said = subprocess.run([sys.executable, "-m", "forkshm", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"forkshm {forkshm.__version__} (Python {sys.version.split()[0]})")
