"""Received memory that its sender could shrink is refused, so reading it causes no SIGBUS."""

import os
import signal

import numpy as np
import pytest

import forkshm
from forkshm.errors import RegionGoneError

pytestmark = pytest.mark.needs("seals")


def send_unsealed(end, make):
    """Send an object whose memory is not sealed; then truncate the memory."""
    from forkshm.backend import _linux

    class NoSeals:
        def __getattr__(self, name):
            return getattr(real, name)

        def fcntl(self, fd, command, *rest):
            return 0 if command == _linux.F_ADD_SEALS else real.fcntl(fd, command, *rest)

    real, _linux.fcntl = _linux.fcntl, NoSeals()
    thing = make()
    end.send(thing)
    end.recv()
    for name in os.listdir("/proc/self/fd"):
        try:
            if "forkshm-" in os.readlink(f"/proc/self/fd/{name}"):
                os.ftruncate(int(name), 0)
        except OSError:
            pass  # sealed memory of the parent
    end.send("cut")
    signal.pause()


KINDS = {
    "a region": lambda: forkshm.anonymous_shared_memory(100_000),
    "an array in a region": lambda: forkshm.zeros(100_000),
    "a copied array": lambda: np.ones(100_000),
    "copied arrays": lambda: {"a": np.ones(100_000), "b": np.zeros(50_000), "c": bytes(200_000)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_not_sealed_is_refused(kind):
    here, there = forkshm.Pipe()
    child = forkshm.Process(target=send_unsealed, args=(there, KINDS[kind]))
    child.start()
    try:
        with pytest.raises(RegionGoneError, match=r"smaller|shrink"):
            here.recv()
        here.send("go on")
        assert here.recv() == "cut"
    finally:
        child.kill()
        child.join()
        child.close()
    there.send(KINDS[kind]())  # memory of other senders still arrives
    here.recv()
    here.close()
    there.close()


def test_memory_with_a_name_cannot_be_sealed_and_arrives():
    name = f"hostile-{os.getpid()}"
    named = forkshm.SharedMemoryObject(forkshm.region.create_only, name, forkshm.region.read_write)
    try:
        named.truncate(100_000)
    finally:
        forkshm.SharedMemoryObject.remove(name)
    region = forkshm.MappedRegion(named, forkshm.region.read_write)
    region.buf[:3] = b"abc"
    with forkshm.get_context("fork").Pool(1) as pool:
        assert pool.apply(first_bytes, (region,)) == b"abc"
    region.close()
    named.close()


def first_bytes(region):
    return bytes(region.buf[:3])
