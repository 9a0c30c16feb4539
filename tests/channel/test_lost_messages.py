"""Receivers that a signal handler interrupts: no message is lost, and none is taken for another."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import forkshm
from forkshm.channel import _connection, _spin


class Interrupt(BaseException):
    """Raised in place of a signal handler's exception."""


def raises_once(monkeypatch, owner, name):
    """Make a method raise the first time that this thread calls it."""
    real, me, left = getattr(owner, name), threading.get_ident(), [None]

    def method(*arguments):
        if left and threading.get_ident() == me:
            left.clear()
            raise Interrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, method)


def test_a_message_that_was_waited_for_stays_with_the_receiver(monkeypatch):
    receiver, sender = forkshm.Pipe(duplex=False)
    with receiver, sender:
        begin = _spin.Spin.begin

        def send_and_begin(spin):
            # The receiver has found no message, and waits for one from here on.
            sender.send(np.arange(20_000))
            return begin(spin)

        monkeypatch.setattr(_spin.Spin, "begin", send_and_begin)
        raises_once(monkeypatch, _spin.Spin, "end")
        with pytest.raises(Interrupt):
            receiver.recv()
        assert receiver.poll(5)
        assert (receiver.recv() == np.arange(20_000)).all()


def test_a_call_of_a_proxy_does_not_get_the_answer_of_an_interrupted_one(monkeypatch):
    with forkshm.Manager() as manager:
        given = manager.dict(a=1)
        assert given["a"] == 1
        raises_once(monkeypatch, _connection.Connection, "recv")
        with pytest.raises(Interrupt):
            given["b"] = 2
        assert given["a"] == 1
        del given
