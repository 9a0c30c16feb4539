"""Run one scenario at some points, one after the other: ``python trial.py SCENARIO VARIANT FIRST STEP [LAST [AGAIN]]``.

Prints a line of JSON for each point. A run that takes too long ends the program with the stacks of all threads; `all`
then starts another one, which continues after that point.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import functools
import gc
import json
import os
import re
import signal
import sys
import time
import traceback

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from points import Interrupt, Points, Trouble
from scenarios import SCENARIOS, work

import forkshm
from forkshm.backend import IS_FREE_THREADED, kernel
from forkshm.testing import holdings

# Exit code for a run that took too long; that of faulthandler is 1.
HANGS = 1


def say(**what):
    print(json.dumps(what), flush=True)


class Uses:
    """A handler that uses the library, and returns."""

    def __init__(self, scenario):
        self._scenario = scenario
        self.here, self.there = forkshm.Pipe()
        self.pool = getattr(scenario, "pool", None)
        self.executor = getattr(scenario, "executor", None)

    def __call__(self):
        self.here.send(np.full(10_000, 5.0))
        assert (self.there.recv() == 5.0).all(), "an array arrived wrong in the handler"
        pool = getattr(self._scenario, "pool", None)
        if pool is not None and pool._state == "RUN" and pool._dispatcher._accepting:
            (number,) = self._scenario.new(1)
            with contextlib.suppress(forkshm.DeadlockError):  # it has interrupted the start of the only worker
                assert pool.apply(work, (number,)) == 3 * number
        executor = getattr(self._scenario, "executor", None)
        if isinstance(executor, forkshm.Executor) and not executor._work._closed:
            (number,) = self._scenario.new(1)
            assert executor.submit(work, number).result(10) == 3 * number

    def close(self):
        self.here.close()
        self.there.close()


def _raise_interrupt():
    raise Interrupt


def _raise_trouble():
    raise Trouble


def _is_ours(error, seen=()):
    """Return whether an exception is the raised one, or was caused by it."""
    while error is not None:
        if isinstance(error, (Interrupt, Trouble)):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(name, variant, first, step, last=0, again=0):
    # Exceptions that Python ignores count as not raised. They are not kept, because their frames have views.
    sys.unraisablehook = lambda _: None
    excepthook, sys.excepthook = sys.excepthook, lambda *_: None
    scenario = SCENARIOS[name]()
    scenario.make()
    uses = Uses(scenario) if variant == "uses" else None
    handler = {"interrupt": _raise_interrupt, "exception": _raise_trouble, "uses": uses}[variant]
    if kernel.name == "posix":
        # A real signal, because this backend defers signals inside functions of several steps.
        called = handler
        signal.signal(signal.SIGUSR2, lambda *_: called())
        handler = functools.partial(signal.raise_signal, signal.SIGUSR2)
    faulthandler.dump_traceback_later(120, exit=True)
    total = 0
    try:
        for _ in range(3):
            with Points() as points:
                scenario.run()
            total = max(total, points.seen)
            scenario.check()
            scenario.check_counts()
    except BaseException as error:
        excepthook(type(error), error, error.__traceback__)
        os._exit(2)
    del points
    _ignore_what_is()
    before = _kinds(holdings())
    last = min(last, total) if last else total
    say(total=total)
    for at in range(first, last + 1, step):
        faulthandler.dump_traceback_later(scenario.seconds, exit=True)
        problem = None
        points = Points(at, handler, say, again=again)
        say(at=at)
        try:
            try:
                with points:
                    scenario.run()
            except AssertionError:
                raise
            except BaseException as error:
                if not _is_ours(error):
                    raise
        except BaseException as error:
            problem = "run: " + _text(error)
        try:
            scenario.check()
            scenario.check_counts()
        except BaseException as error:
            problem = f"{problem or ''} check: " + _text(error)
            scenario.numbers = []
        points = points.where
        # `holdings` collects garbage; processes that are ending get a moment.
        deadline = time.monotonic() + 0.7
        while scenario.is_checked_for_leaks and (left := _more(before, _kinds(holdings()))):
            if time.monotonic() > deadline:
                problem = f"{problem or ''} left: {left}"
                break
            time.sleep(0.005)
        if problem is not None:
            say(bad=at, where=points, problem=problem)
            if "check" in problem or "left" in problem:
                try:
                    faulthandler.dump_traceback_later(scenario.seconds, exit=True)
                    scenario.drop()
                except BaseException as error:
                    say(note="drop: " + _text(error))
                say(resume=at + step)
                os._exit(0)
    faulthandler.dump_traceback_later(30, exit=True)
    scenario.drop()
    say(done=True)


def _ignore_what_is():
    """Make garbage collections faster."""
    gc.collect()
    if not IS_FREE_THREADED:  # where a pool that is replaced may be freed by the collector only
        gc.freeze()


def _kinds(now):
    """Return the number of objects of each kind: recreated objects have other numbers."""
    return collections.Counter(
        {
            **collections.Counter(re.sub(r"-[0-9a-f]{12}\b|[\d\[\]]+", "", target) for _, target in now.fds),
            **collections.Counter(f"thread {name}" for _, name in now.threads),
            "children": len(now.children),
            "mappings": now.mappings,
            "blocks": now.blocks,
        }
    )


def _more(before, now):
    return {kind: count - before[kind] for kind, count in now.items() if count > before[kind]}


def _text(error):
    last = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{os.path.basename(entry.filename)}:{entry.lineno}" for entry in reversed(last))
    return f"{type(error).__name__}: {str(error)[:300]} [{where}]"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
