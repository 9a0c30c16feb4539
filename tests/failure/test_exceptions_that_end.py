"""Exceptions that do not derive from Exception, raised by a task: the caller gets them, and the worker lives on."""

import asyncio
import os
import time

import functions as f
import pytest
import started

import forkshm

KINDS = [SystemExit, GeneratorExit, asyncio.CancelledError, KeyboardInterrupt, f.OwnEnd, BaseException]
METHODS = started.methods("fork", "forkserver")


def raises(kind):
    return pytest.raises(kind, match="17") if kind is not SystemExit else pytest.raises(SystemExit)


@pytest.fixture(scope="module")
def executor():
    with forkshm.Executor(1) as executor:
        executor.submit(f.nothing).result(60)
        yield executor


@pytest.mark.usefixtures("_fork_server")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_raises_the_exception_and_keeps_its_worker(kind, method):
    with forkshm.get_context(method).Pool(1) as pool:
        pid = pool.apply(f.pid)
        for call in (
            lambda: pool.apply(f.raise_kind, (kind,)),
            lambda: pool.map(f.raise_kind, [kind] * 3),
            lambda: pool.apply_async(f.raise_kind, (kind,)).get(60),
            lambda: list(pool.imap(f.raise_kind, [kind])),
            lambda: pool.apply(f.nothing, (f.RaiseKindAtUnpickle(kind),)),
            lambda: pool.apply(f.make, (f.RaiseKindAtPickle, kind, os.getpid())),
        ):
            with raises(kind) as caught:
                call()
            assert type(caught.value) is kind
            assert caught.value.args == (17,)
            assert "raise_kind" in str(caught.value.__cause__)  # the worker's traceback
        assert pool.apply(f.pid) == pid
        assert pool.statistics().workers_replaced == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_executor_raises_the_exception(executor, kind):
    pid = executor.submit(f.pid).result(60)
    error = executor.submit(f.raise_kind, kind).exception(60)
    assert type(error) is kind
    assert error.args == (17,)
    with raises(kind):
        list(executor.map(f.raise_kind, [kind]))
    assert executor.submit(f.pid).result(60) == pid


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_receive_the_exception(pool, kind, wait_until):
    heard = []
    pool.apply_async(f.raise_kind, (kind,), error_callback=heard.append)
    wait_until(lambda: heard)
    assert type(heard[0]) is kind


def test_a_task_that_raised_the_exception_is_not_retried(tmp_path):
    """Like every exception, it is an answer."""
    with forkshm.Pool(1, retries=3) as pool, pytest.raises(SystemExit):
        pool.apply(f.touch_and_raise, (tmp_path / "marks", SystemExit))
    assert (tmp_path / "marks").read_text() == "."


@pytest.mark.parametrize("kind", [KeyboardInterrupt, f.OwnEnd, GeneratorExit])
def test_the_pool_fails_with_the_initializers_exception(kind):
    with forkshm.Pool(2, f.raise_kind, (kind,)) as pool, raises(kind):
        pool.apply(f.square, (2,))


@pytest.mark.needs("interrupts")
def test_a_real_interrupt_of_the_group_still_does_not_reach_the_workers(run_script):
    out = run_script(
        """
import os, signal, time, forkshm
os.setpgrp()
signal.signal(signal.SIGINT, lambda *_: None)
with forkshm.Pool(2) as pool:
    results = [pool.apply_async(time.sleep, (0.3,)) for _ in range(2)]
    time.sleep(0.1)
    os.killpg(0, signal.SIGINT)
    print([result.get() for result in results], pool.statistics().workers_replaced)
"""
    )
    assert out == "[None, None] 0\n"


@pytest.mark.needs("signals")
def test_a_task_that_exits_at_SIGTERM_does_not_hold_up_terminate(tmp_path, wait_until):
    pool = forkshm.Pool(1)
    pool.apply_async(f.die_at_sigterm, (tmp_path / "mark", "sys.exit"))
    wait_until((tmp_path / "mark").exists)
    began = time.monotonic()
    pool.terminate()
    assert time.monotonic() - began < 0.9  # otherwise SIGKILL would follow after a second
