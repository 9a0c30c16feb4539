"""Functions that the processes of the tests run: they are spawned, and find the functions by name."""

from __future__ import annotations

import os
import time

import numpy as np


def fill(array, value):
    array[:] = value
    return os.getpid()


def total(array):
    return float(array.sum())


def double(array):
    return array * 2


def die(code):
    os._exit(code)


def end_self(number):
    from forkshm.backend import kernel

    kernel.signal_process(kernel.open_process(os.getpid()), os.getpid(), number)
    time.sleep(30)


def sleep(seconds):
    time.sleep(seconds)


def put_and_end(queue, size):
    queue.put(np.arange(float(size)))


def answer(connection, region):
    region.buf[:5] = b"child"
    connection.send((os.getpid(), region.size))
    assert connection.recv() == "end"


def hold_mutex(region, connection):
    import forkshm

    assert forkshm.region.Mutex.attach(region, 0).acquire()
    connection.send("held")
    time.sleep(60)


def count(region, times):
    import forkshm

    mutex = forkshm.region.Mutex.attach(region, 0)
    words = region.buf.cast("Q")
    for _ in range(times):
        with mutex:
            words[-1] += 1


def send_region_and_wait(connection):
    import forkshm

    region = forkshm.anonymous_shared_memory(1000)
    region.buf[:3] = b"abc"
    connection.send(region)
    time.sleep(60)


def open_named(name):
    import forkshm

    shm = forkshm.region.WindowsSharedMemory("open_only", name)
    region = forkshm.MappedRegion(shm)
    region.buf[:2] = b"ok"
    return shm.size, region.size


def open_file_object(name):
    import forkshm

    with forkshm.SharedMemoryObject("open_only", name) as shm:
        region = forkshm.MappedRegion(shm)
        region.buf[:2] = b"ok"
        return region.size


def write_read_only(region):
    import forkshm

    return str(region.mode), forkshm.MappedRegion(region, "read_write")
