"""Send every kind of shared object in every way, and print the outcomes as a table or as JSON.

    python tests/crossing.py [fork forkserver spawn]         this backend (FORKSHM_BACKEND), JSON
    python tests/crossing.py --table linux posix > tests/sync/CROSSING.md

An object is *shared* if writes are seen in both directions, and no byte was copied: the peer changes it and this
process sees the change, this process changes it and the peer sees the change.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import forkshm
from forkshm.heap import BufferWrapper
from forkshm.shared_memory import ShareableList, SharedMemory

WAYS = ("argument", "result", "closure", "attribute", "Queue", "Pipe", "Process argument")
MEGABYTE = 1_000_000


class _Lock:
    """How to change an object, undo the change, and read it."""

    @staticmethod
    def change(thing):
        assert thing.acquire(timeout=20)

    @staticmethod
    def undo(thing):
        thing.release()

    @staticmethod
    def is_changed(thing):
        return getattr(thing, "_lock", thing)._semlock._is_zero()


class _Semaphore(_Lock):
    @staticmethod
    def is_changed(thing):
        return thing.get_value() == 1


class _Event:
    @staticmethod
    def change(thing):
        thing.set()

    @staticmethod
    def undo(thing):
        thing.clear()

    @staticmethod
    def is_changed(thing):
        return thing.is_set()


class _Barrier:
    @staticmethod
    def change(thing):
        thing.abort()

    @staticmethod
    def undo(thing):
        thing.reset()

    @staticmethod
    def is_changed(thing):
        return thing.broken


class _Value:
    @staticmethod
    def change(thing):
        thing.value = 1

    @staticmethod
    def undo(thing):
        thing.value = 0

    @staticmethod
    def is_changed(thing):
        return thing.value == 1


class _Items:
    @staticmethod
    def change(thing):
        thing[0] = 1

    @staticmethod
    def undo(thing):
        thing[0] = 0

    @staticmethod
    def is_changed(thing):
        return thing[0] == 1


class _Bytes:
    @staticmethod
    def buffer(thing):
        return thing.create_memoryview() if isinstance(thing, BufferWrapper) else thing.buf

    @classmethod
    def change(cls, thing):
        cls.buffer(thing)[0] = 1

    @classmethod
    def undo(cls, thing):
        cls.buffer(thing)[0] = 0

    @classmethod
    def is_changed(cls, thing):
        return cls.buffer(thing)[0] == 1


def _frombuffer():
    import numpy as np

    return np.frombuffer(forkshm.Array("d", MEGABYTE // 8).get_obj())


def _shareable_list():
    items = ShareableList([0, "x"])
    items.shm.unlink()
    return items


def _shared_memory():
    memory = SharedMemory(create=True, size=MEGABYTE)
    memory.unlink()
    return memory


THINGS = {
    "Lock": (forkshm.Lock, _Lock),
    "RLock": (forkshm.RLock, _Lock),
    "Semaphore": (lambda: forkshm.Semaphore(2), _Semaphore),
    "BoundedSemaphore": (lambda: forkshm.BoundedSemaphore(2), _Semaphore),
    "Condition": (forkshm.Condition, _Lock),
    "Event": (forkshm.Event, _Event),
    "Barrier": (lambda: forkshm.Barrier(2), _Barrier),
    "Value": (lambda: forkshm.Value("i", 0), _Value),
    "Array": (lambda: forkshm.Array("d", MEGABYTE // 8), _Items),
    "RawValue": (lambda: forkshm.RawValue("i", 0), _Value),
    "RawArray": (lambda: forkshm.RawArray("d", MEGABYTE // 8), _Items),
    "heap.BufferWrapper": (lambda: BufferWrapper(MEGABYTE), _Bytes),
    "np.frombuffer(array.get_obj())": (_frombuffer, _Items),
    "SharedMemory": (_shared_memory, _Bytes),
    "ShareableList": (_shareable_list, _Items),
}


class Holder:
    def __init__(self, thing):
        self.thing = thing


kept = {}


def act(name, what, thing=None):
    """Apply *what* to an object, or to the one kept under that name; called in the peer."""
    if thing is None:
        thing = kept[name]
    else:
        kept[name] = thing
    return getattr(THINGS[name][1], what)(thing)


def make(name):
    kept[name] = THINGS[name][0]()
    return kept[name]


def forget():
    kept.clear()


def serve(queue, pipe, things):
    """Serve the commands that come through the pipe; called in a process."""
    kept.update(things)
    while (asked := pipe.recv()) is not None:
        name, what, thing = asked
        if isinstance(thing, Holder):
            thing = thing.thing
        elif isinstance(thing, str):
            thing = queue.get()
        pipe.send(act(name, what, thing))
        del asked, thing


def judge(name, thing, ask):
    """Change the object in the peer and look here, and the other way round; *ask* sends the peer a command."""
    kind = THINGS[name][1]
    ask("change")
    seen_here = kind.is_changed(thing)
    ask("undo")
    seen_here = seen_here and not kind.is_changed(thing)
    kind.change(thing)
    seen_there = ask("is_changed")
    kind.undo(thing)
    seen_there = seen_there and not ask("is_changed")
    return "shared" if seen_here and seen_there else "COPIED"


def try_all(method):
    """Return the outcome for each object in each way."""
    context = forkshm.get_context(method)
    became = {name: {} for name in THINGS}
    with context.Pool(1) as pool:
        pool.apply(forget)
        ours, theirs = context.Pipe()
        queue = context.Queue()
        earlier = context.Process(target=serve, args=(queue, theirs, {}))
        earlier.start()

        def ask_server(pipe, name, what, thing=None):
            pipe.send((name, what, thing))
            return pipe.recv()

        def note(name, way, thing, ask):
            before = forkshm.statistics().bytes_copied
            found = judge(name, thing, ask)
            copied = forkshm.statistics().bytes_copied - before
            became[name][way] = f"{found}, {copied:,} bytes copied" if copied else found

        def try_one(name, thing):
            note(name, "argument", thing, lambda what: pool.apply(act, (name, what, thing)))
            note(name, "closure", thing, lambda what: pool.apply(lambda: act(name, what, thing)))
            note(name, "attribute", thing, lambda what: ask_server(ours, name, what, Holder(thing)))
            note(name, "Pipe", thing, lambda what: ask_server(ours, name, what, thing))

            def through_queue(what):
                queue.put(thing)
                return ask_server(ours, name, what, "queue")

            note(name, "Queue", thing, through_queue)
            note(name, "result", pool.apply(make, (name,)), lambda what: pool.apply(act, (name, what)))

        for name, (new, _) in THINGS.items():
            try_one(name, new())
        ours.send(None)
        earlier.join()
        things = {name: new() for name, (new, _) in THINGS.items()}
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(queue, theirs, things))
        process.start()
        for name, thing in things.items():
            note(name, "Process argument", thing, functools.partial(ask_server, ours, name))
        ours.send(None)
        process.join()
    return became


def run(backend, methods):
    """Return the same outcomes for another backend, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *methods],
        env={**os.environ, "FORKSHM_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{backend}: {done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)


def table(backends, methods):
    """Return the table as Markdown."""
    results = {backend: run(backend, methods) for backend in backends}
    lines = [
        "<!-- Generated: python tests/crossing.py --table " + " ".join(backends) + " -->",
        "",
        f"Each cell is about {', '.join(methods)} and the backends {', '.join(backends)}. *Shared*: no byte is copied.",
        "Writes are seen both ways.",
        "",
        "| | " + " | ".join(WAYS) + " |",
        "| --- " * (len(WAYS) + 1) + "|",
    ]
    for name in THINGS:
        cells = []
        for way in WAYS:
            found = {
                f"{method}, {backend}": results[backend][method][name][way]
                for backend in backends
                for method in methods
            }
            same = set(found.values())
            cells.append(
                same.pop() if len(same) == 1 else "; ".join(f"{where}: {what}" for where, what in found.items())
            )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


METHODS = ("fork", "forkserver", "spawn")

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--table"]:
        print(table(arguments[1:], METHODS), end="")
    else:
        print(json.dumps({method: try_all(method) for method in arguments or METHODS}))
