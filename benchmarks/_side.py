"""The process of one side of a comparison.

Each side has a process of its own. So no side forks the threads of another, holds its memory, or ends the whole run
when it crashes or hangs. The measuring program sends commands through a socket::


    set up a row            -> None, a reason why this is impossible, or an exception
    take a turn             -> the times of the calls
    tear down               -> None
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from _peers import PEERS, CannotDoError, Peer
from _rows import LIMIT, Scale, Work


class WrongAnswerError(Exception):
    """A side returned a wrong answer."""


def set_up(
    peer: Peer | None, module: str, row: str, scale: Scale, parameters: dict[str, Any]
) -> contextlib.AbstractContextManager[Work]:
    return importlib.import_module(module).ROWS[row].set_up(peer, scale, **parameters)


def measure(work: Work) -> float:
    work.prepare()
    began = time.perf_counter()
    answer = work.call()
    took = time.perf_counter() - began
    if not work.is_right(answer):
        raise WrongAnswerError(f"{answer!r:.200}")
    return work.value(answer) if work.value else took / work.per


def take_turn(work: Work, calls: int, seconds: float) -> list[float]:
    """Measure *calls* calls, or fewer if *seconds* have passed; at least one."""
    end = time.perf_counter() + seconds
    taken = [measure(work)]
    while len(taken) < calls and time.perf_counter() < end:
        taken.append(measure(work))
    return taken


def serve(connection: Connection, peer: Peer | None) -> None:
    with contextlib.ExitStack() as stack:
        work: Work | None = None
        while True:
            command, *arguments = connection.recv()
            answer: Any = None
            try:
                if command == "set up":
                    try:
                        work = stack.enter_context(set_up(peer, *arguments))
                    except CannotDoError as reason:
                        answer = str(reason)
                    gc.collect()
                elif command == "turn" and work is not None:
                    answer = take_turn(work, *arguments)
                elif command == "tear down":
                    work = None
                    stack.close()
                elif command == "end":
                    break
            except Exception:
                connection.send((False, traceback.format_exc()))
            else:
                connection.send((True, answer))


def main() -> None:
    fd, name = sys.argv[1:]
    connection = Connection(int(fd))
    peer = None
    try:
        if name != LIMIT:
            peer = PEERS[name]()
    except ModuleNotFoundError as error:
        connection.send((False, f"{error.name} is not installed"))
        return
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    connection.send((True, peer.version if peer else ""))
    try:
        serve(connection, peer)
    except EOFError:
        pass  # the measuring program has ended
    finally:
        if peer:
            peer.close()


if __name__ == "__main__":
    main()
