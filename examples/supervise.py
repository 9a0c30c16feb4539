"""A server with long-lived workers: they are replaced when they die, reloaded by SIGHUP, drained by SIGTERM.

    python examples/supervise.py

All workers accept connections on one socket, and report their pid. A client sends a request, kills the worker that
answered, and sends another one. Then it makes the server reload, and stop.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time

import forkshm

WORKERS = 2

served = forkshm.zeros(1, int)
greeting = "hello"


def serve(me: forkshm.spmd.Supervised, listening: socket.socket) -> None:
    poll = select.poll()
    poll.register(listening, select.POLLIN)
    poll.register(me, select.POLLIN)
    while not me.stopping:
        poll.poll()
        try:
            connection, _ = listening.accept()
        except BlockingIOError:
            continue  # another worker accepted the connection, or it is time to stop
        with connection:
            served[0] += 1
            connection.sendall(f"{greeting} {os.getpid()}".encode())


def reload() -> None:
    global greeting
    greeting = "good day"


def ask(address: tuple[str, int]) -> tuple[str, int]:
    """Return a worker's answer and its process id."""
    while True:
        with socket.create_connection(address) as connection:
            said = connection.makefile().read()
        if said:
            words, _, pid = said.rpartition(" ")
            return words, int(pid)
        # The worker was killed before it could answer.


def client(address: tuple[str, int], server: int) -> None:
    said, first = ask(address)
    print(f"a worker said {said!r}, and was killed")
    os.kill(first, signal.SIGKILL)
    _, second = ask(address)
    print(f"another one answered: {second != first}")
    os.kill(server, signal.SIGHUP)
    while ask(address)[0] != "good day":
        time.sleep(0.01)
    print("after SIGHUP a worker said 'good day'")
    os.kill(server, signal.SIGTERM)


def main() -> int:
    logging.basicConfig(stream=sys.stdout, format="supervisor: %(message)s", level=logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        asking = forkshm.Process(target=client, args=(listening.getsockname(), os.getpid()))
        asking.start()
        forkshm.supervise(lambda me: serve(me, listening), workers=WORKERS, on_reload=reload)
        asking.join()
    if asking.exitcode:
        print(f"supervise: the client ended with {asking.exitcode}", file=sys.stderr)
        return 1
    print("after SIGTERM all workers had left")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
